#!/usr/bin/env python3
"""Show which files of the package a chat request runs through, by package, in order of entry.

A real engine serves a tiny model with random weights, the app is called through ASGI, and every
call of a function of the package is seen, on all threads, from the request until its answer's
blocks are on disk. 1 if packages are not entered in the order server, chat, engine, prefix_cache,
kvcache, store; others may be entered anywhere. MLX runs on the CPU, so that the files are the same
on every machine.

    scripts/walk_request.py --write docs/architecture.md    # writes the list into the page anew
"""

import argparse
import asyncio
import json
import re
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

import agentmem
from agentmem.config import Settings
from agentmem.linux_cpu.prepare import prepare_mlx

PACKAGE = Path(agentmem.__file__).parent
DIRECTION = ["server", "chat", "engine", "prefix_cache", "kvcache", "store"]
PROMPT = " ".join(f"w{i}" for i in range(8, 108))  # three blocks of 32 tokens fill up
PATIENCE_S = 60.0  # for a tail to be on disk
SETTLE_S = 0.5  # then, in which the engine hears of it
BLOCK = re.compile(r"(<!-- walk: [^>]* -->\n)(.*?)(<!-- /walk -->)", re.DOTALL)


class Walk:
    """The files of the package whose functions are called while `recording`, in order."""

    def __init__(self) -> None:
        self.recording = False
        self._prefix = f"{PACKAGE}/"
        self._files: dict[str, None] = {}

    def on_event(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if not (self.recording and event == "call" and code.co_filename.startswith(self._prefix)):
            return
        if code.co_name != "<module>":  # an import is no step of the request
            self._files.setdefault(code.co_filename.removeprefix(self._prefix))

    def by_package(self) -> dict[str, list[str]]:
        """Return files by the package that they stand in, both in order of first entry."""
        packages: dict[str, list[str]] = {}
        for file in list(self._files):
            package = file.split("/")[0] if "/" in file else PACKAGE.name
            packages.setdefault(package, []).append(file.removeprefix(f"{package}/"))
        return packages

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See calls on this thread and on all that are started meanwhile."""
        threading.setprofile(self.on_event)
        sys.setprofile(self.on_event)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]


async def ask(walk: Walk, home: Path, load: Callable[[], Any]) -> None:
    """Ask an agent twice in one conversation, and record the second request."""
    from agentmem.engine.engine import Engine
    from agentmem.server.app import create_app

    settings = Settings(
        home=home,
        block_size=32,
        prefill_chunk=64,
        tail_delay=0.05,
        write_amplification=100,  # the tail of every answer is written
    )
    store = settings.store_dir
    engine = Engine(settings, load)
    await asyncio.to_thread(engine.start)
    try:
        transport = httpx.ASGITransport(create_app(engine, settings, None))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            messages = [{"role": "user", "content": PROMPT}]
            answer = await post(client, messages, store)
            messages += [answer["choices"][0]["message"], {"role": "user", "content": PROMPT}]
            walk.recording = True
            await post(client, messages, store)
            walk.recording = False
    finally:
        await engine.stop()


async def post(
    client: httpx.AsyncClient, messages: list[dict[str, str]], store: Path
) -> dict[str, Any]:
    """Return the answer, when all that it leaves is on disk."""
    body = {"messages": messages, "agent_id": "alice", "max_tokens": 40, "ignore_eos": True}
    before = newest_tail(store)
    answer = await client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    async with asyncio.timeout(PATIENCE_S):
        while newest_tail(store) == before:
            await asyncio.sleep(0.05)
    await asyncio.sleep(SETTLE_S)
    return answer.json()


def newest_tail(store: Path) -> int:
    """Return the number of the last tail that a manifest names, and call nothing of the package."""
    (manifest,) = store.glob("*/manifest.sqlite")
    with closing(sqlite3.connect(f"{manifest.as_uri()}?mode=ro", uri=True)) as db:
        (number,) = db.execute("SELECT max(tail_generation) FROM branches").fetchone()
    return number or 0


def is_in_direction(packages: dict[str, list[str]]) -> bool:
    return [package for package in packages if package in DIRECTION] == DIRECTION


def table(packages: dict[str, list[str]]) -> str:
    """Return the list in Markdown: files by name, as threads do not always take turns alike."""
    rows = [
        f"| `{package}` ({len(files)}) | {', '.join(f'`{file}`' for file in sorted(files))} |"
        for package, files in packages.items()
    ]
    total = f"{sum(map(len, packages.values()))} files in {len(packages)} packages"
    return "\n".join(["| package | files |", "|---|---|", *rows, "", f"{total}."]) + "\n"


def write(page: Path, packages: dict[str, list[str]]) -> None:
    """Put the list into the page's block, `<!-- walk: ... -->` to `<!-- /walk -->`."""
    text = page.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        sys.exit(f"{page} has no block <!-- walk: ... -->")
    anew = BLOCK.sub(lambda found: found[1] + table(packages) + found[3], text)
    page.write_text(anew, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write it into a page's block")
    arguments = parser.parse_args()
    packages = packages_of_a_request()
    total = sum(map(len, packages.values()))
    if arguments.json:
        print(json.dumps({"packages": packages, "files": total}, indent=2))
    else:
        for package, files in packages.items():
            print(f"{package} ({len(files)})", *files, sep="\n  ")
        print(f"{total} files in {len(packages)} packages")
    if not is_in_direction(packages):
        order = ", ".join(DIRECTION)
        print(f"packages are not entered in the order {order}", file=sys.stderr)
        return 1  # and no page tells so
    if arguments.write:
        write(arguments.write, packages)
    return 0


def packages_of_a_request() -> dict[str, list[str]]:
    """Run the walk; return its files as Walk.by_package does."""
    prepare_mlx(Path("~/.agentmem").expanduser())
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.tiny import tiny_loader

    walk = Walk()
    with tempfile.TemporaryDirectory(prefix="agentmem-walk-") as home, walk.watching():
        asyncio.run(ask(walk, Path(home), tiny_loader()))
    return walk.by_package()


if __name__ == "__main__":
    sys.exit(main())
