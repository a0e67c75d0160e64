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

import typer

from ..config import Settings, load_settings, resolve
from ..errors import ModelError, program
from ..linux_cpu.blas import INSTALL_HINT, BlasInfo, measure_gflops
from ..linux_cpu.prepare import prepare_mlx
from ..store.upkeep.quota import disk_usage
from .options import Config, Json, with_settings
from .show import print_json

Verdict = Literal["ok", "warn", "fail"]
Finding = dict[
    str, Any
]  # name, status, summary, fix (None where nothing is to be done), and figures

_SLOW_GFLOPS = 20  # reference BLAS gives 2-6; OpenBLAS over 20 on a single small core
_LITTLE_SPACE = 5 << 30  # bytes: a few hundred agents of a small model
_NO_SPACE = 256 << 20


@with_settings("model", "home")
def doctor(flags: dict[str, Any], config: Config = None, as_json: Json = False) -> None:
    """Check this machine, the model and the store; say what to do.

    The exit code is 1 where something fails.
    """
    settings = load_settings(flags, config)
    report = collect(settings, prepare_mlx(settings.home_dir, warn=False))
    if as_json:
        print_json(report)
    else:
        print(render(report))
    raise typer.Exit(0 if report["ok"] else 1)


def collect(settings: Settings, blas: BlasInfo) -> dict[str, Any]:
    """Run every check. It writes and downloads nothing, and loads no weights.

    `blas` is what load_fast_blas() gave. Return {"ok": nothing fails, "status": the worst,
    "checks": [...]}, ready for JSON.
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
    """Write a line for each check, and one more with the fix where there is one."""
    lines = []
    for check in report["checks"]:
        lines.append(f"{check['status']:<5} {check['name']:<12} {check['summary']}")
        if check["fix"]:
            lines.append(f"{'':<18} -> {check['fix']}")
    return "\n".join(lines)


def _check(
    name: str, status: Verdict, summary: str, fix: str | None = None, **figures: Any
) -> Finding:
    return {"name": name, "status": status, "summary": summary, "fix": fix, **figures}


def _check_platform() -> Finding:
    python = platform.python_version()
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
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


def _check_mlx(blas: BlasInfo) -> Iterator[Finding]:
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
    status: Verdict = "ok" if fix is None else "warn"
    yield _check("blas", status, summary, fix, library=blas.name, path=blas.path, gflops=gflops)


def _check_compiler() -> Finding:
    """Tell whether mx.compile is on; that it is not is no fault.

    It is off on a CPU, see load_fast_blas; elsewhere it uses the GPU's own compiler.
    """
    compiler = shutil.which("g++")
    is_on = "MLX_DISABLE_COMPILE" not in os.environ
    state = "on" if is_on else "off"
    summary = f"mx.compile is {state}, g++ ({compiler or 'not installed'}) is not needed"
    return _check("compiler", "ok", summary, mx_compile=is_on, path=compiler)


def _check_model(settings: Settings) -> Iterator[Finding]:
    from ..models.loading import find_local
    from ..models.model_dir import read_model_dir

    try:
        path = find_local(settings.model, settings.home_dir)
        if path is None:
            pull = f"{program()} pull demo"
            fix = pull if settings.model == "demo" else "the first start downloads it from the hub"
            summary = f"{settings.model}: not on this machine yet"
            yield _check("model", "warn", summary, fix, model=settings.model)
            return
        found = read_model_dir(path)
    except ModelError as e:
        fix = f"name a directory with an MLX model, or 'demo' ({program()} pull demo)"
        yield _check("model", "fail", e.message, fix, model=settings.model)
        return
    summary = (
        f"{settings.model}: {found.model_type}, {found.parameters / 1e6:,.0f} M parameters, "
        f"{found.dtype}, {found.max_context:,} tokens, {found.path}"
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


def _check_cache(settings: Settings, config: dict[str, Any]) -> Finding:
    """Tell which kinds of layers the model has, what of their caches is kept, and in what bits."""
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
    if spec.opaque is None:
        return _check("cache", "ok", describe(spec), **figures)
    fix = "choose another model: this one prefills every request"
    return _check("cache", "warn", describe(spec), fix, **figures)


def _check_store(settings: Settings) -> Finding:
    there = store = settings.store_dir
    while not there.exists():
        there = there.parent
    disk = shutil.disk_usage(there)
    used = disk_usage(store) if store.exists() else 0
    quota = resolve(settings.store_quota, disk.total)
    summary = f"{store}, {used / 1e9:.1f} of at most {quota / 1e9:.1f} GB, "
    summary += f"{disk.free / 1e9:.1f} GB free"
    if settings.encrypt:
        summary += ", encrypted"
    figures: dict[str, Any] = {
        "path": str(store),
        "free_bytes": disk.free,
        "bytes": used,
        "quota_bytes": quota,
    }
    if not os.access(there, os.W_OK):
        fix = f"make {there} writable, or set --home"
        return _check("store", "fail", f"{summary}, not writable", fix, **figures)
    if disk.free >= _LITTLE_SPACE:
        return _check("store", "ok", summary, **figures)
    status: Verdict = "fail" if disk.free < _NO_SPACE else "warn"
    fix = "free some space, or move the store to another disk with --home"
    return _check("store", status, summary, fix, **figures)


def _check_modes(settings: Settings) -> Finding:
    """Tell whether others can read the store, which holds what agents said.

    A closed home protects all that is under it.
    """
    home = settings.home_dir
    store = settings.store_dir
    modes = {str(path): _mode(path) for path in (home, store)}
    open_paths = {path: oct(mode) for path, mode in modes.items() if mode and mode & 0o077}
    if not open_paths:
        there = "0700" if home.exists() else "made with 0700 at the first start"
        return _check("modes", "ok", f"{home}: {there}", too_open={})
    listed = ", ".join(f"{path} ({mode})" for path, mode in open_paths.items())
    fix = f"chmod 700 {' '.join(map(repr, open_paths))}"
    exposed = str(home) in open_paths and str(store) in open_paths
    verdict: Verdict = "fail" if exposed else "warn"
    return _check("modes", verdict, f"others may enter {listed}", fix, too_open=open_paths)


def _mode(path: Path) -> int | None:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None
