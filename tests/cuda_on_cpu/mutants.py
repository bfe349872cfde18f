"""Planted bugs: tests that would not notice them prove nothing."""

import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

from .build import ROOT
from .isolation import Crash, isolated
from .kernels import Kernels

FIRST_COME, RANDOM = (0, 0), (1, 0)  # seed, preempt


class Mutant(NamedTuple):
    """A bug: in ``file`` (relative to the repository, under csrc), ``old`` becomes ``new``.

    ``old`` must be there exactly once, so that a mutant never plants nothing.
    """

    name: str
    file: str
    old: str
    new: str

    def plant(self, folder):
        """A copy of csrc and of the emulator's tests with the bug; returns the copy's root."""
        text = (ROOT / self.file).read_text()
        found = text.count(self.old)
        if found != 1:
            raise RuntimeError(
                f"mutant {self.name!r}: its text is in {self.file} {found} times, not once"
            )
        root = Path(folder) / hashlib.sha256(repr(self).encode()).hexdigest()[:12]
        for part in ("csrc", "tests/cuda_on_cpu"):
            shutil.copytree(ROOT / part, root / part, dirs_exist_ok=True)
        (root / self.file).write_text(text.replace(self.old, self.new))
        return root


def catch(mutant, sources, run, *, schedules=(FIRST_COME, RANDOM), race=True, flags=(), timeout=60):
    """How ``run(kernels)`` fails with the bug planted: the text of its AssertionError or crash.

    Args:
        run: function of a `Kernels` that raises AssertionError (`KernelError`, or a comparison of
            its own) when something is wrong.
        schedules: pairs of seed and preempt to try, each in a process of its own.
        race: use the race build, which sees missing barriers and fences whatever the schedule.

    Raises:
        AssertionError: no schedule made it fail: the tests are blind to the bug.
    """

    def attempt(seed, preempt):
        kernels = Kernels(sources, race=race, flags=flags, mutant=mutant)
        kernels.schedule(seed, preempt)
        run(kernels)

    Kernels(sources, race=race, flags=flags, mutant=mutant)  # compiled outside the time limit
    for schedule in schedules:
        try:
            isolated(attempt, *schedule, timeout=timeout)
        except Crash as crash:
            return f"crash: {crash}"
        except AssertionError as failure:
            return str(failure)
    raise AssertionError(f"mutant {mutant.name!r} was not caught")
