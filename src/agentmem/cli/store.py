"""`agentmem store`: the caches on disk, of every model, beside a running server or without one.

The store is imported inside the commands: with numpy and cryptography it takes longer than all of
`agentmem --help`.
"""

import json
import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn

from ..client import Client
from ..config import Settings, load_settings, resolve
from ..errors import StartupError, StoreError
from .agents import Json, Key, ago, console, progress_bar, size, table

if TYPE_CHECKING:
    from ..store.files.layout import Layout
    from ..store.upkeep.fsck import StoreStats

app = typer.Typer(
    no_args_is_help=True, help="Look at the caches on disk, check every byte of them, make room."
)

Home = Annotated[
    Path | None, typer.Option(help="directory that holds models and stores (default: ~/.agentmem)")
]
Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file with settings, see configs/")
]


@app.command()
def stats(home: Home = None, config: Config = None, as_json: Json = False) -> None:
    """What each model's store holds, and how much was written."""
    from ..store.upkeep.fsck import store_stats

    settings = _settings(home, config)
    rows = [_guarded(store_stats, layout) for layout in _stores(settings)]
    if as_json:
        print(json.dumps([asdict(row) | {"writes": _writes(row)} for row in rows], indent=2))
        return
    _print_table(rows)
    disk = _disk(settings)
    total = sum(row.disk_bytes for row in rows)
    quota = resolve(settings.store_quota, disk.total)
    print(f"{size(total)} of at most {size(quota)} (store_quota); {size(disk.free)} of disk free")


def _print_table(rows: "list[StoreStats]") -> None:
    lines = table(
        "store", "agents", "pinned", "blocks", "on disk", "written/h", "written/24 h", "last use"
    )
    for row in rows:
        writes, used = _writes(row), ago(row.last_used) if row.last_used else "-"
        counts = (str(row.agents), str(row.pinned), str(row.blocks), size(row.disk_bytes))
        lines.add_row(
            _short(row), *counts, size(writes["last_hour"]), size(writes["last_day"]), used
        )
    console().print(lines)
    for row in rows:
        where = (
            [f"open in process {row.holder.pid} {row.holder.url or ''}".rstrip()]
            if row.holder
            else []
        )
        if notes := where + ["encrypted"] * row.encrypted:
            print(f"{_short(row)}: {', '.join(notes)}")


def _short(row: "StoreStats") -> str:
    return row.fingerprint[:12]


@app.command()
def verify(
    home: Home = None,
    config: Config = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="put aside what is damaged (with no server running)")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every file and compare its checksum. Exit code 1 if anything is damaged."""
    from ..store.upkeep import fsck

    layouts = _stores(_settings(home, config))
    with progress_bar(BarColumn(), DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task("reading", total=sum(_bytes(layout) for layout in layouts))
        reports = [
            _guarded(fsck.verify, layout, lambda n: progress.advance(task, n), repair=repair)
            for layout in layouts
        ]
    if as_json:
        print(json.dumps([asdict(report) | {"ok": report.ok} for report in reports], indent=2))
    for report in reports if not as_json else ():
        print(
            f"{report.fingerprint}: {report.files} files, {size(report.nbytes)}: {'ok' if report.ok else 'DAMAGED'}"
        )
        rows = [f"{report.damaged_rows} rows of the manifest"] if report.damaged_rows else []
        for line in rows + report.bad:
            print(f"  {line}")
        if report.quarantined:
            print(f"  put aside: {report.quarantined}")
        if not report.ok and not repair:
            print(
                "  agents through these are prefilled again when they are asked; --repair puts them aside now"
            )
    raise typer.Exit(0 if all(report.ok for report in reports) or repair else 1)


@app.command()
def gc(
    home: Home = None, config: Config = None, api_key: Key = None, as_json: Json = False
) -> None:
    """Delete what has expired, what is in quarantine and what nobody holds, and shrink stores to
    store_quota.
    """
    from ..store.upkeep import fsck
    from ..store.upkeep.locks import InUse

    settings = _settings(home, config)
    freed: dict[str, int] = {}
    refused: list[StoreError] = []
    for layout in _stores(settings):
        before = fsck.disk_usage(layout.root)
        try:
            freed[layout.root.name] = max(0, before - _guarded(fsck.shrink, layout, 0))
        except StoreError as e:
            if not isinstance(e, InUse) or e.holder.url is None:
                refused.append(
                    e
                )  # of a newer format, or about to be served: the others are collected all the same
                continue
            answer = Client(e.holder.url, api_key).call("POST", "/v1/store/gc")
            freed[layout.root.name] = max(0, answer["freed_bytes"])  # it may have written meanwhile
    quota = resolve(settings.store_quota, _disk(settings).total)
    before = sum(fsck.disk_usage(layout.root) for layout in _stores(settings))
    left = fsck.collect_garbage(settings.store_dir, quota)
    if as_json:
        print(
            json.dumps(
                {
                    "freed_bytes": freed,
                    "freed_for_quota": before - left,
                    "bytes": left,
                    "quota": quota,
                }
            )
        )
    else:
        for name, nbytes in freed.items():
            print(f"{name}: {size(nbytes)} freed")
        trimmed = f", {size(before - left)} freed for it" if before > left else ""
        print(f"{size(left)} of at most {size(quota)} (store_quota){trimmed}")
    if refused:
        raise refused[0]


def _settings(home: Path | None, config: Path | None) -> Settings:
    return load_settings({"home": home}, config)


def _stores(settings: Settings) -> "list[Layout]":
    from ..store.upkeep.fsck import stores

    return stores(settings.store_dir) if settings.store_dir.is_dir() else []


def _disk(settings: Settings) -> Any:
    """What shutil says of the disk that the stores are on, or would be."""
    at = settings.store_dir
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at)


def _writes(row: "StoreStats") -> dict[str, int]:
    from ..store.records import written_in_last_hour

    now, by_hour = time.time(), row.bytes_written_by_hour
    return {
        "last_hour": written_in_last_hour(by_hour, now),
        "last_day": sum(n for h, n in by_hour.items() if h > now // 3600 - 24),
    }


def _bytes(layout: "Layout") -> int:
    from ..store.upkeep.fsck import store_stats

    row = _guarded(store_stats, layout)
    return row.block_bytes + row.tail_bytes


def _guarded(function: Callable[..., Any], layout: "Layout", *args: Any, **options: Any) -> Any:
    from ..store.manifest.schema import Damaged

    try:
        return function(layout, *args, **options)
    except (sqlite3.Error, Damaged) as e:
        raise StartupError(
            f"the manifest of {layout.root} can't be read ({e}); the next start of a server puts a damaged one aside"
        ) from None
    except OSError as e:
        raise StartupError(f"{e.filename or layout.root}: {e.strerror}") from None
