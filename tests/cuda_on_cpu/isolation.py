"""Runs a function in a process of its own: a crash or an endless loop ends that process only."""

import os
import pickle
import select
import signal
import traceback
import warnings

from .on_device import WANTED


class Crash(AssertionError):
    """The process died, or did not end in time."""


def isolated(function, *arguments, timeout=120):
    """``function(*arguments)`` in a forked process; what it returns or raises comes back.

    Raises:
        Crash: the process was killed by a signal, or ran longer than ``timeout`` seconds.
        AssertionError: the function raised one; the text is its own.
    """
    if WANTED:  # CUDA does not survive a fork; a crash there ends the whole run
        return function(*arguments)
    reader, writer = os.pipe()
    with warnings.catch_warnings():  # of threads, which the child does not use
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(writer, function, arguments)
    os.close(writer)
    answer, late = _receive(reader, timeout)
    os.close(reader)
    if late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if late:
        raise Crash(f"did not end within {timeout} s")
    if os.WIFSIGNALED(status):
        raise Crash(f"died of signal {os.WTERMSIG(status)}")
    kind, value = pickle.loads(answer)
    if kind == "returned":
        return value
    if kind == "failed":
        raise AssertionError(value)
    raise RuntimeError(value)


def _answer(writer, function, arguments):
    try:
        answer = "returned", function(*arguments)
    except AssertionError as error:
        answer = "failed", str(error) or traceback.format_exc()
    except BaseException:
        answer = "raised", traceback.format_exc()
    with os.fdopen(writer, "wb") as pipe:
        pickle.dump(answer, pipe)
    os._exit(0)


def _receive(reader, timeout):
    """All bytes until the other end closes, and whether that took too long."""
    answer = b""
    while select.select([reader], [], [], timeout)[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            return answer, False
        answer += part
    return answer, True
