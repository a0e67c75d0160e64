"""`agentmem store`: the caches on disk, of every model, beside a running server or without one."""

import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn

from ..config import Settings, load_settings, resolve
from ..errors import StartupError, StoreError
from ..store.files.layout import Layout
from ..store.manifest.schema import Damaged
from ..store.records import written_in_last_hour
from ..store.upkeep import fsck
from ..store.upkeep.locks import InUse
from ..store.upkeep.quota import disk_usage
from .options import Config, Home, Json, Key, connect
from .show import ago, console, print_json, progress_bar, size, table

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at the caches on disk, check every byte of them, make room.",
)


@app.command()
def stats(home: Home = None, config: Config = None, as_json: Json = False) -> None:
    """Show what each model's store holds, and how much was written."""
    settings = _settings(home, config)
    rows = [_guarded(fsck.store_stats, layout) for layout in _stores(settings)]
    if as_json:
        print_json([asdict(row) | {"writes": _writes(row)} for row in rows])
        return
    _print_table(rows)
    disk = _disk(settings)
    total = sum(row.disk_bytes for row in rows)
    quota = resolve(settings.store_quota, disk.total)
    print(f"{size(total)} of at most {size(quota)} (store_quota); {size(disk.free)} of disk free")


def _print_table(rows: list[fsck.StoreStats]) -> None:
    lines = table(
        "store", "agents", "pinned", "blocks", "on disk", "written/h", "written/24 h", "last use"
    )
    for row in rows:
        writes = _writes(row)
        used = ago(row.last_used) if row.last_used else "-"
        lines.add_row(
            _short(row),
            str(row.agents),
            str(row.pinned),
            str(row.blocks),
            size(row.disk_bytes),
            size(writes["last_hour"]),
            size(writes["last_day"]),
            used,
        )
    console().print(lines)
    for row in rows:
        notes = []
        if row.holder:
            notes.append(f"open in process {row.holder.pid} {row.holder.url or ''}".rstrip())
        if row.encrypted:
            notes.append("encrypted")
        if notes:
            print(f"{_short(row)}: {', '.join(notes)}")


def _short(row: fsck.StoreStats) -> str:
    return row.fingerprint[:12]


@app.command()
def verify(
    home: Home = None,
    config: Config = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put aside what is damaged (with no server running).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every file and compare its checksum. The exit code is 1 if anything is damaged."""
    layouts = _stores(_settings(home, config))
    with progress_bar(BarColumn(), DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task("reading", total=sum(_bytes(layout) for layout in layouts))
        reports = [
            _guarded(fsck.verify, layout, lambda n: progress.advance(task, n), repair=repair)
            for layout in layouts
        ]
    if as_json:
        print_json([asdict(report) | {"ok": report.ok} for report in reports])
    else:
        for report in reports:
            _print_report(report, repair=repair)
    is_well = repair or all(report.ok for report in reports)
    raise typer.Exit(0 if is_well else 1)


def _print_report(report: fsck.Verified, *, repair: bool) -> None:
    verdict = "ok" if report.ok else "DAMAGED"
    print(f"{report.fingerprint}: {report.files} files, {size(report.nbytes)}: {verdict}")
    if report.damaged_rows:
        print(f"  {report.damaged_rows} rows of the manifest")
    for line in report.bad:
        print(f"  {line}")
    if report.quarantined:
        print(f"  put aside: {report.quarantined}")
    if not report.ok and not repair:
        print(
            "  agents through these are prefilled again when they are asked; --repair puts them "
            "aside now"
        )


@app.command()
def gc(
    home: Home = None, config: Config = None, api_key: Key = None, as_json: Json = False
) -> None:
    """Delete what nobody needs, and keep to store_quota.

    Nobody needs what has expired, what is in quarantine and what no agent holds.
    """
    settings = _settings(home, config)
    freed: dict[str, int] = {}
    refused: list[StoreError] = []
    for layout in _stores(settings):
        try:
            freed[layout.root.name] = _collect(layout, api_key)
        except StoreError as e:
            refused.append(e)  # the others are collected all the same
    quota = resolve(settings.store_quota, _disk(settings).total)
    before = sum(disk_usage(layout.root) for layout in _stores(settings))
    left = fsck.collect_garbage(settings.store_dir, quota)
    if as_json:
        sizes = {"freed_for_quota": before - left, "bytes": left, "quota": quota}
        print_json({"freed_bytes": freed, **sizes})
    else:
        for name, nbytes in freed.items():
            print(f"{name}: {size(nbytes)} freed")
        trimmed = f", {size(before - left)} freed for it" if before > left else ""
        print(f"{size(left)} of at most {size(quota)} (store_quota){trimmed}")
    if refused:
        raise refused[0]


def _collect(layout: Layout, api_key: str | None) -> int:
    """Free a store, or let the server that has it open do so; return the bytes.

    Raise StoreError where the store is of a newer format, or about to be served.
    """
    before = disk_usage(layout.root)
    try:
        freed: int = before - _guarded(fsck.shrink, layout, 0)
    except InUse as e:
        if e.holder.url is None:
            raise
        freed = connect(e.holder.url, api_key).call("POST", "/v1/store/gc")["freed_bytes"]
    return max(0, freed)  # it may have written meanwhile


def _settings(home: Path | None, config: Path | None) -> Settings:
    return load_settings({"home": home}, config)


def _stores(settings: Settings) -> list[Layout]:
    return fsck.stores(settings.store_dir) if settings.store_dir.is_dir() else []


def _disk(settings: Settings) -> Any:
    """Return shutil's figures of the disk that the stores are on, or would be."""
    at = settings.store_dir
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at)


def _writes(row: fsck.StoreStats) -> dict[str, int]:
    now = time.time()
    hours = row.bytes_written_by_hour
    day = sum(nbytes for hour, nbytes in hours.items() if hour > now // 3600 - 24)
    return {"last_hour": written_in_last_hour(hours, now), "last_day": day}


def _bytes(layout: Layout) -> int:
    row: fsck.StoreStats = _guarded(fsck.store_stats, layout)
    return row.block_bytes + row.tail_bytes


def _guarded(function: Callable[..., Any], layout: Layout, *args: Any, **options: Any) -> Any:
    """Call a function of fsck's. Raise StartupError where disk or manifest do not let it."""
    try:
        return function(layout, *args, **options)
    except (sqlite3.Error, Damaged) as e:
        raise StartupError(
            f"the manifest of {layout.root} can't be read ({e}); the next start of a server puts a "
            "damaged one aside"
        ) from None
    except OSError as e:
        raise StartupError(f"{e.filename or layout.root}: {e.strerror}") from None
