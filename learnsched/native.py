"""The compiled kernels of ``staircase.c``: built once a machine with its C compiler, or absent.

Nothing is built at import; the first quantization builds (a few seconds, once) or finds the library.
The environment variable ``LEARNSCHED_KERNELS`` decides: ``auto``, the default, compiles where a
compiler is found; ``compiled`` insists, so that a run that was interrupted goes on with the same
rounding; ``eager`` composes everything from torch's own operations. The library is kept in
``$LEARNSCHED_CACHE/learnsched``, or where the user's caches are (``$XDG_CACHE_HOME``, ``~/.cache``).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from learnsched.choices import check_choice

SOURCE = Path(__file__).with_name("staircase.c")
CHOICES = ("auto", "compiled", "eager")
NAMES = ("value", "slope", "std_slope", "slope_adjoint", "std_slope_adjoint")

# Not -ffast-math: linking with it flushes small numbers to 0 in the whole process.
_FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only",
    "-fno-signed-zeros", "-fPIC", "-shared",
)  # fmt: skip
_TIMEOUT = 120


@dataclass(frozen=True)
class Build:
    """What became of the attempt to load the kernels.

    Attributes:
        library: the loaded library, or None if operations are composed.
        reason: where it was found, or why there is none.
    """

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def build() -> Build:
    """The kernels of this process; the first call decides for good.

    Raises:
        RuntimeError: ``LEARNSCHED_KERNELS`` is ``compiled`` and there is no compiler or it fails.
        ValueError: ``LEARNSCHED_KERNELS`` is none of the choices.
    """
    choice = os.environ.get("LEARNSCHED_KERNELS", "auto")
    check_choice("LEARNSCHED_KERNELS", choice, CHOICES)
    if choice == "eager":
        return Build(None, "LEARNSCHED_KERNELS=eager")
    try:
        path = _compiled()
        return Build(_typed(ctypes.CDLL(str(path))), str(path))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        if choice == "compiled":
            raise RuntimeError(
                f"LEARNSCHED_KERNELS=compiled, but the kernels cannot be compiled: {detail}"
            ) from error
        lines = detail.strip().splitlines() or [type(error).__name__]
        return Build(None, f"not compiled: {lines[0]}")


def _compiled() -> Path:
    """The shared library of this source, compiler and processor, made if need be."""
    compiler = _compiler()
    key = hashlib.sha256()
    for part in (SOURCE.read_bytes(), repr((compiler, _FLAGS, _version(compiler))).encode()):
        key.update(part)
    key.update(_processor().encode())
    folder = _cache_folder()
    path = folder / f"staircase-{key.hexdigest()[:20]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            _run_compiler(compiler, made)
            os.replace(made, path)  # another process may have been faster: both are the same
    return path


def _run_compiler(compiler: str, target: Path) -> None:
    command = [compiler, *_FLAGS, "-x", "c", str(SOURCE), "-o", str(target)]
    options = {"check": True, "capture_output": True, "text": True, "timeout": _TIMEOUT}
    try:
        subprocess.run([*command, "-fopenmp"], **options)  # type: ignore[call-overload]
    except subprocess.CalledProcessError:
        subprocess.run(command, **options)  # type: ignore[call-overload]


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang", "g++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise FileNotFoundError("no C compiler: neither $CC nor cc, gcc, clang or g++ is installed")


def _version(compiler: str) -> str:
    result = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=_TIMEOUT
    )
    return result.stdout


def _processor() -> str:
    """What ``-march=native`` depends on: folders may be shared between different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = ("model name", "flags", "Features", "CPU part")
    known = {line for line in lines if line.startswith(kept)}
    return repr((platform.machine(), platform.processor(), sorted(known)))


def _cache_folder() -> Path:
    """A folder that only this user can write to, as what lies there is executed."""
    base = os.environ.get("LEARNSCHED_CACHE") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
    except RuntimeError as error:  # a user without an entry, as in some containers
        raise FileNotFoundError(
            "no home folder to keep kernels in; set LEARNSCHED_CACHE"
        ) from error
    folder = folder / "learnsched"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if hasattr(os, "getuid") and (
        found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise PermissionError(
            f"{folder} can be written by others, so kernels are not kept there; run chmod go-w on it, "
            "or set LEARNSCHED_CACHE"
        )
    return folder


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Arguments: level set, table, and pointers to the tensors."""
    for name, tensors in zip(NAMES, (2, 3, 3, 6, 6), strict=True):
        function = getattr(library, f"learnsched_{name}")
        function.argtypes = [ctypes.c_void_p] * (2 + tensors)
        function.restype = None
    return library
