"""Build backend: setuptools.build_meta, compiled against the torch that is already installed.

torch is not in `build-system.requires`. An isolated build would download another torch, gigabytes
of it with CUDA, and compile against that one instead of the one the module will be imported with.
Here the isolated build sees the torch of the environment that pip serves, and whatever is missing
for the build is said in one sentence before pip starts to download dependencies.
"""

import functools

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

from . import environment

__all__ = [*build_meta.__all__]

environment.expose_torch()


def _checked(hook):
    @functools.wraps(hook)
    def run(*args, **kwargs):
        environment.require()
        return hook(*args, **kwargs)

    return run


get_requires_for_build_wheel = _checked(build_meta.get_requires_for_build_wheel)
get_requires_for_build_editable = _checked(build_meta.get_requires_for_build_editable)
prepare_metadata_for_build_wheel = _checked(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _checked(build_meta.prepare_metadata_for_build_editable)
build_wheel = _checked(build_meta.build_wheel)
build_editable = _checked(build_meta.build_editable)
