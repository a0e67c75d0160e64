"""A fast BLAS for MLX's CPU backend on Linux, loaded before MLX is.

The mlx-cpu wheel is linked to the reference BLAS (a few GFLOP/s). MLX imports three matrix products
from it: cblas_sgemm, cblas_dgemm and cblas_cgemm. A library loaded with RTLD_GLOBAL before
libmlx.so comes first in the dynamic linker's search, so its symbols take the place of the slow
ones. On macOS MLX uses Accelerate and Metal, and nothing is to be done.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import StartupError

INSTALL_HINT = (
    "install OpenBLAS (Debian, Ubuntu: apt-get install libopenblas0-pthread; "
    "Fedora: dnf install openblas) or a C compiler (gcc), and start again"
)
_SYSTEM_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")
_MKL_LIBRARIES = ("libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so")

# The wheel scipy-openblas32 prefixes its symbols with `scipy_`; this gives the three that MLX needs
# their usual names.
_SHIM = """\
#define GEMM(p, T, S) \\
void scipy_cblas_##p##gemm(int, int, int, int, int, int, S, const T *, int, const T *, int, S, \\
                           T *, int); \\
void cblas_##p##gemm(int order, int ta, int tb, int m, int n, int k, S alpha, const T *a, \\
                     int lda, const T *b, int ldb, S beta, T *c, int ldc) \\
{ scipy_cblas_##p##gemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc); }
GEMM(s, float, float)
GEMM(d, double, double)
GEMM(c, void, const void *)
"""


@dataclass(frozen=True)
class BlasInfo:
    """The BLAS that MLX's CPU backend uses.

    `warning` is one line for the user, with what would be right.
    """

    name: str
    path: str | None
    warning: str | None


_loaded: BlasInfo | None = None


def load_fast_blas(home: Path | None = None) -> BlasInfo:
    """Find and load a fast BLAS; call it before anything imports mlx.core.

    Later calls return the first answer.

    home: where the compiled shim is cached (default: AGENTMEM_HOME, or ~/.agentmem). AGENTMEM_BLAS
    names a library to use, or `reference` for none. Raises StartupError if it can't be loaded.
    """
    global _loaded
    if _loaded is None:
        _loaded = _load(home)
    return _loaded


def _load(home: Path | None) -> BlasInfo:
    if sys.platform != "linux":
        return BlasInfo("Accelerate", None, None)
    if "mlx.core" in sys.modules:
        return BlasInfo(
            "unknown",
            None,
            "MLX was imported before a fast BLAS could be loaded: call load_fast_blas() first",
        )
    if is_cpu_build():
        # On a CPU mx.compile calls g++ at run time, seconds for each kernel, and keeps and loads
        # libraries in /tmp/mlx, which all users share: for a second user, or without g++, a forward
        # pass raises. Fused kernels gained nothing measurable (SmolLM2: decode 62 against 64 ms,
        # prefill of 512 tokens 2.48 against 2.53 s). MLX reads this once.
        os.environ["MLX_DISABLE_COMPILE"] = "1"
    return _find_blas((home or _default_home()) / "cache")


def _find_blas(cache: Path) -> BlasInfo:
    # By default OpenBLAS's threads spin for 70 ms after each product, on the cores that the many
    # small operations of a decode step want: steps took 10-20 % longer. This is in log2 of cycles;
    # below 16 short prefills wait for sleepers.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")  # OpenBLAS reads it when it is loaded
    chosen = os.environ.get("AGENTMEM_BLAS")
    if chosen == "reference":
        return BlasInfo("reference", None, None)
    if chosen:
        if not _try_load(chosen):
            raise StartupError(
                f"AGENTMEM_BLAS={chosen}: not a shared library with cblas_sgemm; "
                "unset it, or name another"
            )
        return BlasInfo(Path(chosen).name, chosen, None)
    for name in _SYSTEM_LIBRARIES:
        if _try_load(name):
            return BlasInfo("OpenBLAS", name, None)
    wheel = _wheel_library()
    if wheel and _load_wheel(wheel, cache):
        return BlasInfo("OpenBLAS (scipy-openblas32)", str(wheel), None)
    for directory in ("", f"{sys.prefix}/lib/"):
        for name in _MKL_LIBRARIES:
            if _try_load(directory + name):
                return BlasInfo("MKL", directory + name, None)
    return BlasInfo(
        "reference",
        None,
        f"no fast BLAS found, so prefill is 40 times slower than need be: {INSTALL_HINT}",
    )


def _default_home() -> Path:
    return Path(os.environ.get("AGENTMEM_HOME") or "~/.agentmem").expanduser()


def _try_load(name: str) -> bool:
    """Load a library into the global scope if it is there and has what MLX imports.

    Nothing is left in that scope otherwise.
    """
    try:
        has_gemm = hasattr(ctypes.CDLL(name), "cblas_sgemm")
        if has_gemm:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return has_gemm


def _wheel_library() -> Path | None:
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or not spec.origin:
        return None
    return next(Path(spec.origin).parent.glob("lib/libscipy_openblas*.so"), None)


def _load_wheel(library: Path, cache: Path) -> bool:
    if _is_private_dir(cache):
        return _load_with_shim(library, cache)
    # The home can't be written, or others can write to it: what lies there is not to be loaded.
    # Compile afresh (0.1 s).
    with tempfile.TemporaryDirectory(prefix="agentmem-") as directory:
        return _load_with_shim(library, Path(directory))


def _load_with_shim(library: Path, directory: Path) -> bool:
    """Load the wheel's library and the shim; return False without a C compiler.

    The shim is compiled into `directory` once.
    """
    key = hashlib.sha256(f"{platform.machine()}\n{_SHIM}".encode()).hexdigest()[:16]
    shim = directory / f"blas-shim-{key}.so"
    if not shim.exists() and not _compile(shim):
        return False
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _is_private_dir(path: Path) -> bool:
    """Make `path` with mode 0700; return whether it can be written, and only by us.

    A library is loaded from it.
    """
    try:
        for directory in (path.parent, path):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = path.stat()
    except OSError:
        return False
    return stat.st_uid == os.geteuid() and not stat.st_mode & 0o022 and os.access(path, os.W_OK)


def _compile(target: Path) -> bool:
    """Compile to a temporary name, then rename.

    A process beside this one so never loads half a file.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return False
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    command = [compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", temporary]
    done = subprocess.run(command, input=_SHIM, text=True, capture_output=True)
    if done.returncode != 0:  # a compiler without libc's headers or a linker counts as none
        os.unlink(temporary)
        return False
    os.replace(temporary, target)
    return True


def is_cpu_build() -> bool:
    """Tell whether MLX is its CPU build: on Linux, unless one of its CUDA packages is there."""
    names = (d.metadata["Name"] or "" for d in importlib.metadata.distributions())
    return sys.platform == "linux" and not any(
        n.lower().replace("_", "-").startswith("mlx-cuda") for n in names
    )


def measure_gflops(size: int = 1024, repeats: int = 3) -> float:
    """Return the speed of a float32 matrix product on MLX's default device, in GFLOP/s.

    It is the best of `repeats`.
    """
    import mlx.core as mx

    a, b = mx.random.normal((size, size)), mx.random.normal((size, size))
    mx.eval(a, b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
