"""Compiles kernels.cpp once, into the cache, or for images into the package: some seconds.

The library calls OpenMP without linking it: it runs on the threads of the one that torch
has loaded, so the two never fight for cores.
"""

from __future__ import annotations

import argparse
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
# https://gitlab.com/x86-psABIs/x86-64-ABI, table 3.1, by Linux' names of the flags.
_V3 = frozenset({"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_WIDE = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_X86_64 = (
    (_V4 | {"avx512_bf16"}, (*_WIDE, "-mavx512bf16")),
    (_V4, _WIDE),
    (_V3, ("-march=x86-64-v3",)),
    (frozenset[str](), ()),
)
"""The best first: what a processor needs, and the compiler's options for it."""
_INSTALLED = Path(__file__).with_name("built")
"""Where an image has libraries for every kind of processor of its architecture."""


def find_library() -> Path:
    """The library, built if need be, and this process ready to load it.

    Raises ConfigurationError where it cannot be had, saying what is missing.
    """
    _share_openmp()
    return build()


def build() -> Path:
    """The library for this machine: installed, or in the cache.

    Raises ConfigurationError.
    """
    if sys.platform != "linux":
        raise ConfigurationError(f"the CPU kernels are for Linux, not {sys.platform}")
    options = (*_OPTIONS, *_target_options())
    try:
        installed = _INSTALLED / _key(options) / _NAME
        return installed if installed.is_file() else _build_in(cache_root() / "kernels", options)
    except ConfigurationError:
        raise
    except (BatonError, OSError) as error:  # no cache, or one that may not be used
        raise ConfigurationError(f"the CPU kernels cannot be kept: {error}") from error


def install() -> list[Path]:
    """Builds them for every kind of processor of this architecture, into the package."""
    variants = [options for _, options in _X86_64] if _is_x86_64() else [()]
    return [_build_in(_INSTALLED, (*_OPTIONS, *options)) for options in variants]


def options_for(flags: Set[str]) -> tuple[str, ...]:
    """The compiler's options for an x86-64 processor with these flags, as Linux names them."""
    return next(options for needed, options in _X86_64 if needed <= flags)


def _key(options: tuple[str, ...]) -> str:
    built_with = shlex.join([platform.machine(), *options])
    found = hashlib.sha256(built_with.encode())
    for file in sorted({_SOURCE, *_SOURCE.parent.glob("*.h")}):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def _build_in(parent: Path, options: tuple[str, ...]) -> Path:
    folder = build_once(parent / _key(options), [_NAME], lambda folder: _compile(options, folder))
    return folder / _NAME


def _compiler_words() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "") or ["g++"]


def _compile(options: tuple[str, ...], folder: Path) -> None:
    compiler, *arguments = _compiler_words()
    if shutil.which(compiler) is None:
        raise ConfigurationError("the CPU kernels need a C++ compiler; install g++ or set CXX")
    built = folder / "kernels.o"
    # Linked without -fopenmp, which would bring a second OpenMP into the process.
    for command in (
        (compiler, *arguments, *options, "-c", str(_SOURCE), "-o", str(built)),
        (compiler, *arguments, "-shared", str(built), "-o", str(folder / _NAME)),
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
    if not _is_x86_64():
        return ()
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return options_for(set(found[1].split()) if found else set())


def _is_x86_64() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def _share_openmp() -> None:
    """Makes the OpenMP that is in this process visible to libraries that are loaded later."""
    found = re.findall(r"\s(/.*/lib(?:gomp|iomp5|omp)[-.][-.\w]*)$", _mappings(), re.MULTILINE)
    if not found:
        raise ConfigurationError("torch has loaded no OpenMP that the CPU kernels could share")
    of_torch = [path for path in found if "/torch" in path]
    ctypes.CDLL((of_torch or found)[0], mode=ctypes.RTLD_GLOBAL)


def _mappings() -> str:
    try:
        return Path("/proc/self/maps").read_text()
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m engine.native.build", description="Compiles the CPU kernels."
    )
    parser.add_argument(
        "--install",
        action="store_true",
        help="for every kind of processor of this architecture, into the package: for images",
    )
    try:
        paths = install() if parser.parse_args().install else [build()]
    except ConfigurationError as error:
        sys.exit(error.message)
    for path in paths:
        print(path)


if __name__ == "__main__":
    main()
