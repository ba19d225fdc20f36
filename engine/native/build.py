"""Compiles kernels.cpp once per machine, into the cache; a matter of seconds.

The library calls OpenMP without linking it: it runs on the threads of the one that torch
has loaded, so the two never fight for cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

from baton.checkpoint.cache import build_once, cache_root
from baton.errors import BatonError, ConfigurationError

_SOURCE = Path(__file__).with_name("kernels.cpp")
_NAME = "kernels.so"
_LONGEST_BUILD_S = 120.0
_OPTIONS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-fopenmp"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
)
# https://gitlab.com/x86-psABIs/x86-64-ABI, table 3.1; Linux' names of what v3 and v4 add.
_X86_64_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}


def find_library() -> Path:
    """The library, built if need be, and this process ready to load it.

    Raises ConfigurationError where it cannot be had, saying what is missing.
    """
    _share_openmp()
    return build()


def build() -> Path:
    """The library for this machine. Raises ConfigurationError."""
    if sys.platform != "linux":
        raise ConfigurationError(f"the CPU kernels are for Linux, not {sys.platform}")
    options = (*_OPTIONS, *_target_options())
    key = hashlib.sha256(_SOURCE.read_bytes() + shlex.join(options).encode()).hexdigest()[:16]
    try:
        folder = build_once(
            cache_root() / "kernels" / key, [_NAME], lambda folder: _compile(options, folder)
        )
    except ConfigurationError:
        raise
    except BatonError as error:
        raise ConfigurationError(error.message) from error
    return folder / _NAME


def _compile(options: tuple[str, ...], folder: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise ConfigurationError("the CPU kernels need a C++ compiler; install g++ or set CXX")
    built = folder / "kernels.o"
    # Linked without -fopenmp, which would bring a second OpenMP into the process.
    for command in (
        (compiler, *options, "-c", str(_SOURCE), "-o", str(built)),
        (compiler, "-shared", str(built), "-o", str(folder / _NAME)),
    ):
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_LONGEST_BUILD_S
            )
        except subprocess.CalledProcessError as error:
            raise ConfigurationError(
                f"the CPU kernels do not compile: {shlex.join(command)}\n{error.stderr.strip()}"
            ) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigurationError(f"the CPU kernels do not compile: {error}") from error
    built.unlink()


def _target_options() -> tuple[str, ...]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return options_for(set(found[1].split()) if found else set())


def options_for(flags: Set[str]) -> tuple[str, ...]:
    """The compiler's options for an x86-64 processor with these flags, as Linux names them."""
    for level, needed in _X86_64_LEVELS.items():
        if needed <= flags:
            if level != "x86-64-v4":
                return (f"-march={level}",)
            pairs = ("-mavx512bf16",) if "avx512_bf16" in flags else ()
            return (f"-march={level}", "-mprefer-vector-width=512", *pairs)
    return ()


def _share_openmp() -> None:
    """Makes the OpenMP that is in this process visible to libraries that are loaded later."""
    found = re.search(r"\s(/\S*/lib(?:gomp|iomp5|omp)[-.\w]*)$", _mappings(), re.MULTILINE)
    if found is None:
        raise ConfigurationError("torch has loaded no OpenMP that the CPU kernels could share")
    ctypes.CDLL(found[1], mode=ctypes.RTLD_GLOBAL)


def _mappings() -> str:
    try:
        return Path("/proc/self/maps").read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    try:
        print(build())
    except ConfigurationError as error:
        sys.exit(error.message)
