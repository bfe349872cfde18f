"""Compiles csrc/ into rnn_ext._C. pyproject.toml holds the metadata, build_backend/ the checks.

Environment: CXX, MAX_JOBS, RNN_EXT_WERROR=0|1 (warnings in our own files are errors; default: with
the compilers we test), RNN_EXT_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, RNN_EXT_NVCC_FLAGS.
"""

import hashlib
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_backend import cuda, environment  # noqa: E402

VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "rnn_ext/version.py").read_text())[1]
WITHOUT_COMPILING = {"egg_info", "dist_info", "sdist"}


def required_torch():
    """A source distribution goes with any torch, a wheel with the minor version it is built for."""
    version = None if {"egg_info", "sdist"} & set(sys.argv) else environment.torch_version()
    if version is None:
        return "torch>=" + ".".join(map(str, environment.OLDEST_TORCH))
    return f"torch=={'.'.join(version.split('.')[:2])}.*"


def files(*patterns):
    return sorted(str(f.relative_to(ROOT)) for p in patterns for f in (ROOT / "csrc").glob(p))


def compile_flags(compiler):
    tested = compiler.major <= environment.NEWEST_TESTED_COMPILER[compiler.family]
    flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # Contraction to FMA is g++'s default and not clang's; Python's own flags forbid to assume that
    # pointers and signed indices do not wrap, which costs vectorization.
    flags += ["-ffp-contract=fast", "-fstrict-overflow"]
    if os.environ.get("RNN_EXT_WERROR", "1" if tested else "0") == "1":
        flags += ["-Werror"]
    if compiler.family == "clang":  # flags that Python was built with by g++
        flags += ["-Wno-unused-command-line-argument", "-Wno-ignored-optimization-argument"]
    return flags


def compiled_extension():
    """The extension and the build_ext that compiles it against the installed torch."""
    torch_version, compiler = environment.require()
    os.environ["CXX"] = compiler.command  # torch's default is c++ whatever is there
    scripts = sysconfig.get_path("scripts")
    if Path(scripts, "ninja").exists():  # of this environment, activated or not
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    jobs = os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:
        environment.stop(f"torch {torch_version} is installed but cannot be imported ({error}).")

    kernels = files("cuda/*.cu")
    toolkit = cuda.wanted_toolkit(torch.version.cuda) if kernels else None
    macros = [("RNN_EXT_TORCH_VERSION", f'"{torch.__version__}"')]
    link_flags = []
    system_includes = [sysconfig.get_path("include")]
    if toolkit:
        names = ";".join(cuda.architectures(toolkit))
        macros += [("RNN_EXT_WITH_CUDA", None), ("RNN_EXT_CUDA_ARCHS", f'"{names}"')]
        link_flags += toolkit.link_flags
        system_includes += [str(toolkit.home / "include")]

    sources = files("ops/*.cpp", "cpu/*.cpp", "cuda/*.cpp")
    if not toolkit:
        sources = [f for f in sources if "ops/cuda_" not in f]

    # No -fopenmp, neither here nor at the link: parallel regions call the OpenMP runtime that
    # torch has loaded, and a second one must not come in.
    extension = CppExtension(
        "rnn_ext._C",
        sources,
        define_macros=macros,
        depends=files("**/*.h", "**/*.cuh", "**/*.cu"),
        extra_link_args=link_flags,
    )
    # Warnings in the headers of torch, pybind11 and Python are not ours.
    system_includes += extension.include_dirs
    extension.include_dirs = [str(ROOT / "csrc")]
    flags = compile_flags(compiler)
    extension.extra_compile_args = flags + [f"-isystem{folder}" for folder in system_includes]
    # Objects are kept between builds, editable or not. ninja sees a changed flag or header of
    # ours but not a changed torch or compiler: those are in the folder's name.
    identity = repr((torch.__file__, torch.__version__, torch.version.git_version, compiler, flags))
    key = hashlib.sha256(f"{identity}{macros}".encode()).hexdigest()[:8]
    tag = sysconfig.get_config_var("SOABI")

    class BuildTorchExtension(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / f"{tag}-torch{torch.__version__}-{key}")

        def build_extension(self, ext):
            if toolkit:
                include = ext.include_dirs[0]
                ext.extra_objects = cuda.compile_sources(
                    toolkit, kernels, self.build_temp, include, compiler.command, int(jobs)
                )
            try:
                super().build_extension(ext)
            except (RuntimeError, BaseError) as error:
                environment.stop(f"compiling failed, the compiler's words are above ({error}).")

    kind = f"CUDA kernels for {names}" if toolkit else "no CUDA kernels"
    environment.notice(
        f"torch {torch.__version__}, {compiler.family} {compiler.major} ({compiler.command}), "
        f"{jobs} jobs, {kind}"
    )
    return extension, BuildTorchExtension


if WITHOUT_COMPILING & set(sys.argv):
    ext_modules, commands = (
        [Extension("rnn_ext._C", files("ops/*.cpp", "cpu/*.cpp", "cuda/*.cpp"))],
        {},
    )
else:
    extension, build_ext = compiled_extension()
    ext_modules, commands = [extension], {"build_ext": build_ext}
    for leftover in (ROOT / "build").glob("lib*"):  # or a module deleted since would be packaged
        shutil.rmtree(leftover)

setup(
    version=VERSION,
    packages=find_packages(include=["rnn_ext", "rnn_ext.*"]),
    package_data={"rnn_ext": ["py.typed", "*.pyi"]},
    include_package_data=False,
    ext_modules=ext_modules,
    cmdclass=commands,
    install_requires=[required_torch(), "numpy>=1.24"],
    zip_safe=False,
)
