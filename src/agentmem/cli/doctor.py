"""`agentmem doctor`: what this machine gives the server, and what to do about what is missing."""

import importlib.metadata
import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..config import Settings, resolve
from ..errors import ModelError
from ..linux_cpu.blas import INSTALL_HINT, BlasInfo, measure_gflops
from ..store.upkeep.quota import disk_usage

Status = Literal["ok", "warn", "fail"]
Check = dict[str, Any]  # name, status, summary, fix (None where nothing is to be done), and figures

_SLOW_GFLOPS = 20  # reference BLAS gives 2-6; OpenBLAS over 20 on a single small core
_LITTLE_SPACE = 5 << 30  # bytes: a few hundred agents of a small model
_NO_SPACE = 256 << 20


def collect(settings: Settings, blas: BlasInfo) -> dict[str, Any]:
    """Run every check. Writes and downloads nothing, and loads no weights. blas: what
    load_fast_blas() gave.

    Returns {"ok": nothing fails, "status": the worst, "checks": [...]}, ready for JSON.
    """
    checks = [
        _check_platform(),
        *_check_mlx(blas),
        _check_compiler(),
        *_check_model(settings),
        _check_store(settings),
        _check_modes(settings),
    ]
    worst = max((check["status"] for check in checks), key=("ok", "warn", "fail").index)
    return {"ok": worst != "fail", "status": worst, "checks": checks}


def render(report: dict[str, Any]) -> str:
    """One line a check, and one more with the fix where there is one."""
    lines = []
    for check in report["checks"]:
        lines.append(f"{check['status']:<5} {check['name']:<12} {check['summary']}")
        if check["fix"]:
            lines.append(f"{'':<18} -> {check['fix']}")
    return "\n".join(lines)


def _check(
    name: str, status: Status, summary: str, fix: str | None = None, **figures: Any
) -> Check:
    return {"name": name, "status": status, "summary": summary, "fix": fix, **figures}


def _check_platform() -> Check:
    python, system = (
        platform.python_version(),
        f"{platform.system()} {platform.release()} {platform.machine()}",
    )
    known = sys.platform == "linux" or (sys.platform == "darwin" and platform.machine() == "arm64")
    fix = None if known else "run it on Linux or on a Mac with Apple silicon: MLX is made for these"
    return _check(
        "platform",
        "ok" if known else "warn",
        f"Python {python} on {system}",
        fix,
        python=python,
        system=system,
    )


def _check_mlx(blas: BlasInfo) -> Iterator[Check]:
    import mlx.core as mx

    device = mx.default_device()
    kind = "cpu" if device.type == mx.DeviceType.cpu else "gpu"
    mlx = importlib.metadata.version("mlx")
    yield _check("mlx", "ok", f"MLX {mlx} on {device}", version=mlx, device=kind)
    gflops = round(measure_gflops(), 1)
    where = f" ({blas.path})" if blas.path else ""
    summary = f"{blas.name}{where}, {gflops:g} GFLOP/s in float32 on the {kind}"
    fast = gflops >= _SLOW_GFLOPS
    fix = blas.warning or (
        None if fast else f"slow; if nothing else keeps the machine busy, {INSTALL_HINT}"
    )
    status: Status = "ok" if fix is None else "warn"
    yield _check("blas", status, summary, fix, library=blas.name, path=blas.path, gflops=gflops)


def _check_compiler() -> Check:
    """mx.compile is off on a CPU, see load_fast_blas; elsewhere it uses the GPU's own compiler.
    None is a fault.
    """
    compiler = shutil.which("g++")
    off = "MLX_DISABLE_COMPILE" in os.environ
    summary = (
        f"mx.compile is {'off' if off else 'on'}, g++ ({compiler or 'not installed'}) is not needed"
    )
    return _check("compiler", "ok", summary, mx_compile=not off, path=compiler)


def _check_model(settings: Settings) -> Iterator[Check]:
    from ..models.loading import find_local
    from ..models.model_dir import read_model_dir

    try:
        path = find_local(settings.model, settings.home_dir)
        if path is None:
            fix = (
                "agentmem pull demo"
                if settings.model == "demo"
                else "the first start downloads it from the hub"
            )
            yield _check(
                "model",
                "warn",
                f"{settings.model}: not on this machine yet",
                fix,
                model=settings.model,
            )
            return
        found = read_model_dir(path)
    except ModelError as e:
        fix = "name a directory with an MLX model, or 'demo' (agentmem pull demo)"
        yield _check("model", "fail", e.message, fix, model=settings.model)
        return
    summary = (
        f"{settings.model}: {found.model_type}, {found.parameters / 1e6:,.0f} M parameters, {found.dtype}, "
        f"{found.max_context:,} tokens, {found.path}"
    )
    figures: dict[str, Any] = {
        "path": str(found.path),
        "type": found.model_type,
        "parameters": found.parameters,
        "dtype": found.dtype,
        "max_context": found.max_context,
        "bytes": found.bytes,
    }
    yield _check("model", "ok", summary, model=settings.model, **figures)
    yield _check_cache(settings, found.config)


def _check_cache(settings: Settings, config: dict[str, Any]) -> Check:
    """Which kinds of layers the model has, and what of their caches is kept, and in how many bits."""
    from ..kvcache.spec import describe
    from ..kvcache.spec_of_config import spec_of_config

    try:
        spec = spec_of_config(
            config,
            kv_bits=settings.kv_bits,
            block_size=settings.block_size,
            state_interval=settings.state_interval,
        )
    except ModelError as e:
        return _check("cache", "fail", e.message, "upgrade mlx-lm, or choose another model")
    figures: dict[str, Any] = {
        "sealed_bytes_per_token": spec.sealed_bytes,
        "state_bytes": spec.state_bytes,
    }
    if spec.opaque is not None:
        return _check(
            "cache",
            "warn",
            describe(spec),
            "choose another model: this one prefills every request",
            **figures,
        )
    return _check("cache", "ok", describe(spec), **figures)


def _check_store(settings: Settings) -> Check:
    there = store = settings.store_dir
    while not there.exists():
        there = there.parent
    disk, used = shutil.disk_usage(there), disk_usage(store) if store.exists() else 0
    free, quota = disk.free, resolve(settings.store_quota, disk.total)
    summary = f"{store}, {used / 1e9:.1f} of at most {quota / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
    summary += ", encrypted" if settings.encrypt else ""
    figures: dict[str, Any] = {
        "path": str(store),
        "free_bytes": free,
        "bytes": used,
        "quota_bytes": quota,
    }
    if not os.access(there, os.W_OK):
        return _check(
            "store",
            "fail",
            f"{summary}, not writable",
            f"make {there} writable, or set --home",
            **figures,
        )
    status: Status = "fail" if free < _NO_SPACE else "warn" if free < _LITTLE_SPACE else "ok"
    fix = (
        None if status == "ok" else "free some space, or move the store to another disk with --home"
    )
    return _check("store", status, summary, fix, **figures)


def _check_modes(settings: Settings) -> Check:
    """The store holds what agents said: only its owner may read it. A closed home protects all that
    is under it.
    """
    home, store = settings.home_dir, settings.store_dir
    open_paths = {
        str(path): oct(mode)
        for path in (home, store)
        if (mode := _mode(path)) is not None and mode & 0o077
    }
    if not open_paths:
        there = "0700" if home.exists() else "made with 0700 at the first start"
        return _check("modes", "ok", f"{home}: {there}", too_open={})
    listed = ", ".join(f"{path} ({mode})" for path, mode in open_paths.items())
    fix = f"chmod 700 {' '.join(map(repr, open_paths))}"
    exposed = str(home) in open_paths and str(store) in open_paths
    return _check(
        "modes",
        "fail" if exposed else "warn",
        f"others may enter {listed}",
        fix,
        too_open=open_paths,
    )


def _mode(path: Path) -> int | None:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None
