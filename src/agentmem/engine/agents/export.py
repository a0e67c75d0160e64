"""Archives: agents as files, out of the store and into it."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from ...agent_key import AgentKey, check_agent_id
from ...errors import AgentNotFound, Conflict, StoreFailed
from ...prefix_cache.agent import Agent
from ...prefix_cache.block_pool import CachedBlock, CachedTail, Entry
from ...prefix_cache.cache import PrefixCache
from ...prefix_cache.info import AgentDetail
from ...prefix_cache.load import enter
from ...prefix_cache.write_back import WriteBack
from ...store.agent_store import AgentStore
from ...store.files import segment
from ...store.files.archive import Archive, block_name, tail_name, write_archive
from ...store.records import Linked
from ..scheduler import Scheduler
from ..tasks import Tasks, on_engine_thread
from .imports import ArchivedModel, Imported, check_model, import_agent
from .lifecycle import check_new, stored


@dataclass(frozen=True)
class Export:
    """An agent as a file. `close` it, read to its end or not."""

    chunks: Iterator[bytes]  # to be read on a thread that may wait for the disk
    close: Callable[[], None]  # waits for the disk


@dataclass(frozen=True)
class _Path:
    """A branch as it was when its agent was exported."""

    id: str
    blocks: list[CachedBlock]
    tail: CachedTail
    last_used: float  # Unix seconds


@dataclass(frozen=True)
class _Exported:
    """An agent's caches on disk, in files under second names that nothing deletes meanwhile."""

    agent: Agent
    paths: list[_Path]
    files: Linked


class Archives:
    """Exports and imports agents. The event loop awaits its methods, as those of Lifecycle."""

    def __init__(
        self,
        *,
        tasks: Tasks,
        prefix_cache: PrefixCache,
        write_back: WriteBack,
        store: AgentStore,
        scheduler: Scheduler,
        model: ArchivedModel,
    ):
        self._tasks = tasks
        self._prefix_cache = prefix_cache
        self._write_back = write_back
        self._store = store
        self._scheduler = scheduler
        self._model = model
        self._importing: set[AgentKey] = set()

    # -- out

    async def export(self, key: AgentKey) -> Export:
        """Return all that is committed of an agent, once it is on disk.

        Raises Conflict where it is ephemeral, or where a request runs that has unsaved blocks.
        """
        exported = await self._link(key)
        try:
            # not on the engine thread: a long agent's tokens take a while to decode
            chunks = await asyncio.to_thread(self._chunks, exported)
        except BaseException:
            self._store.unlink(exported.files)
            raise

        def close() -> None:
            # what is left of them at shutdown goes at the next start
            self._store.unlink(exported.files).exception()

        return Export(chunks, close)

    @on_engine_thread
    async def _link(self, key: AgentKey) -> _Exported:
        """Save an agent, and give its files second names."""
        agent = self._prefix_cache.known(key)
        if agent.ephemeral:
            message = f"Agent {key.agent_id[:200]!r} is ephemeral, never written to disk."
            raise Conflict(message, param="agent_id")
        await stored(self._write_back.save_agent(agent))
        paths = [
            _Path(branch.id, list(branch.blocks), branch.tail, branch.last_used)
            for branch in agent.branches.values()
            if len(branch)
        ]
        if not paths:  # deleted meanwhile
            raise AgentNotFound(key.agent_id)
        blocks = {block.key: block for path in paths for block in path.blocks}
        with_tail = [path for path in paths if len(path.tail.tokens)]
        entries: list[Entry] = [*blocks.values(), *(path.tail for path in with_tail)]
        if not all(entry.disk_bytes for entry in entries):
            if any(branch.in_use for branch in agent.branches.values()):
                message = f"Agent {key.agent_id[:200]!r} has a request running; wait for it."
                raise Conflict(message, param="agent_id")
            raise StoreFailed("The agent could not be saved: see /health.")
        links = self._store.link_files(list(blocks), [path.id for path in with_tail])
        return _Exported(agent, paths, await stored(links))

    def _chunks(self, exported: _Exported) -> Iterator[bytes]:
        """Yield the archive's bytes. CorruptSegment in the middle, if a file is damaged."""
        blocks = {block.key: block for path in exported.paths for block in path.blocks}
        index = {key: i for i, key in enumerate(blocks)}

        def content() -> Iterator[tuple[str, bytes]]:
            for key, i in index.items():
                yield block_name(i), self._content(exported, key)
            for i, path in enumerate(exported.paths):
                if len(path.tail.tokens):
                    yield tail_name(i), self._content(exported, path.id)

        about = {
            "agent_id": exported.agent.key.agent_id,
            "created": exported.agent.created,
            "model": self._model.name,
            "fingerprint": self._model.fingerprint,
            "spec": self._model.spec.identity(),
            "blocks": [
                {
                    "file": block_name(i),
                    "parent": index.get(blocks[key].parent),
                    "tokens": blocks[key].tokens.tolist(),
                }
                for key, i in index.items()
            ],
            "branches": [self._row(path, i, index) for i, path in enumerate(exported.paths)],
        }
        return write_archive(about, content())

    def _content(self, exported: _Exported, name: bytes | str) -> bytes:
        """Return a stored file as it stands in an archive."""
        tensors, metadata = self._store.read_linked(exported.files, name)
        return segment.encode(tensors, metadata)

    def _row(self, path: _Path, i: int, index: dict[bytes, int]) -> dict[str, Any]:
        """Return what agent.json says of the `i`th branch; `index`: of blocks, by their keys."""
        tokens = np.concatenate([*(block.tokens for block in path.blocks), path.tail.tokens])
        tail = None
        if len(path.tail.tokens):
            tail = {"file": tail_name(i), "tokens": path.tail.tokens.tolist()}
        return {
            "head": index[path.blocks[-1].key] if path.blocks else None,
            "tail": tail,
            "last_used": path.last_used,
            "text": self._model.tokenizer.decode(tokens.tolist()),
        }

    # -- in

    @property
    def room_bytes(self) -> int:
        """Return the bytes that the store has room for."""
        return self._store.capacity

    async def import_(self, namespace: str, agent_id: str | None, file: IO[bytes]) -> AgentDetail:
        """Make an agent of an archive, under this id or, where it is None, its own.

        Raises InvalidRequest for the file, Conflict where the agent exists.
        """
        archive = await asyncio.to_thread(self._read, file)
        name = agent_id or archive.about.get("agent_id")
        key = AgentKey(namespace, check_agent_id(name))
        await self._begin_import(key)
        imported = None
        try:
            imported = await asyncio.to_thread(import_agent, self._store, self._model, key, archive)
        finally:
            detail = await self._end_import(key, imported)
        assert detail is not None
        return detail

    def _read(self, file: IO[bytes]) -> Archive:
        """Return an archive that this model can use. Raises InvalidRequest."""
        archive = Archive.read(file)
        check_model(archive.about, self._model)
        return archive

    @on_engine_thread
    async def _begin_import(self, key: AgentKey) -> None:
        """See to it that nobody else imports an agent of this key until `_end_import`."""
        check_new(key, prefix_cache=self._prefix_cache, scheduler=self._scheduler, param="agent_id")
        if key in self._importing:
            message = f"Agent {key.agent_id[:200]!r} is being imported already."
            raise Conflict(message, param="agent_id", code="agent_exists")
        self._importing.add(key)

    @on_engine_thread
    async def _end_import(self, key: AgentKey, imported: Imported | None) -> AgentDetail | None:
        """Enter what the import stored among the agents, if it did."""
        self._importing.discard(key)
        if imported is None:
            return None
        enter(self._prefix_cache, imported.branches, imported.blocks)
        agent = self._prefix_cache.known(key)
        agent.last_used = max(branch.last_used for branch in imported.branches)
        return self._write_back.detail(key)
