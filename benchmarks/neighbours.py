"""Other processes that keep a CPU busy, as on a machine that is shared."""

import contextlib
import subprocess
import sys

# Ends by itself when its parent is gone, so that a killed measurement leaves nothing behind.
SPIN = """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    sum(range(10000))
"""


@contextlib.contextmanager
def busy(count):
    """``count`` processes compute, each on one CPU, as long as the context lasts."""
    started = []
    try:
        for _ in range(count):
            started.append(
                subprocess.Popen([sys.executable, "-S", "-c", SPIN], stdout=subprocess.PIPE)
            )
        for process in started:
            process.stdout.readline()  # it computes from here on
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
