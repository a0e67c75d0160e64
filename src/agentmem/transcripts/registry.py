"""All agents' turns: in RAM while they are in use, written behind, read again when an agent is
asked for.
"""

import asyncio
import math
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from weakref import WeakValueDictionary

from ..agent_key import AgentKey
from ..errors import AgentMemError, StoreFailed
from ..store.writer.turns import TurnTable
from .turns import Turn, TurnTree, copies, new_turn

MAX_RAM = 64 << 20  # bytes, about, of turns that nobody works with
MAX_TREES = 256  # of agents that nobody works with
MAX_DISK = 256 << 20  # bytes of all turns in the store; the least recently used agents' go
_Key = tuple[str, str]  # namespace, agent


class TranscriptRegistry:
    """On the event loop, but for `delete_agent`. A turn is seen at once by whoever asks after it
    was added.
    """

    def __init__(
        self,
        table: TurnTable | None = None,
        is_ephemeral: Callable[[AgentKey], bool] = lambda key: False,
        max_disk: int = MAX_DISK,
    ):
        """`table` None: nothing is written."""
        self._table, self._is_ephemeral, self._max_disk = table, is_ephemeral, max_disk
        self._disk_bytes = table.nbytes if table else 0
        self._lock = threading.Lock()  # orders what is written of an agent, and its deletion
        self._trees: WeakValueDictionary[_Key, TurnTree] = WeakValueDictionary()
        self._recent: OrderedDict[_Key, TurnTree] = OrderedDict()  # keeps them alive
        self._trimming = False

    def open(self, namespace: str, agent: str) -> TurnTree:
        """The agent's tree, which `loaded` waits for. Whoever holds it sees whether the agent was
        deleted since.
        """
        key = AgentKey(namespace, agent)
        with self._lock:
            tree = self._trees.get(key)
            if tree is None:
                tree = self._trees[key] = TurnTree()
                if self._table is not None:
                    tree.reading = self._table.read(key)
            self._keep(key, tree)
        return tree

    async def loaded(self, namespace: str, agent: str, tree: TurnTree) -> TurnTree:
        """`tree`, once it holds what the store has of it. Raises StoreFailed."""
        reading = tree.reading
        if reading is None:
            return tree
        try:
            records = await asyncio.shield(asyncio.wrap_future(reading))
        except (OSError, sqlite3.Error, AgentMemError) as e:
            with self._lock:
                if self._trees.get((namespace, agent)) is tree:
                    self._drop((namespace, agent))  # the next one who asks reads again
            raise StoreFailed(f"The agent's transcript can't be read: {e}") from e
        if tree.reading is not None:
            tree.reading = None
            tree.load(map(Turn.of, records))
        return tree

    async def tree(self, namespace: str, agent: str) -> TurnTree:
        return await self.loaded(namespace, agent, self.open(namespace, agent))

    async def find(self, namespace: str, turn_id: str) -> tuple[str, TurnTree, Turn] | None:
        """Of this namespace: the agent whose turn it is, its tree, and the turn."""
        held = [
            key
            for key, tree in list(self._trees.items())
            if turn_id in tree.turns and not tree.deleted
        ]
        found = held[0] if held else None
        if found is None and self._table is not None:
            try:
                found = await asyncio.wrap_future(self._table.find(turn_id))
            except (OSError, sqlite3.Error, AgentMemError) as e:
                raise StoreFailed(f"The response can't be looked up: {e}") from e
        if found is None or found[0] != namespace:
            return None
        tree = await self.tree(*found)
        turn = tree.turns.get(turn_id)
        return (found[1], tree, turn) if turn and not turn.hidden else None

    def add(
        self,
        namespace: str,
        agent: str,
        tree: TurnTree,
        turns: list[Turn],
        *,
        ephemeral: bool = False,
    ) -> bool:
        """Add turns to a tree that is loaded, each after its parent. False: the agent or the parent
        was deleted.
        """
        with self._lock:
            parent = turns[0].parent
            if tree.deleted or (parent is not None and parent not in tree.turns):
                return False
            for turn in turns:
                tree.add(turn)
            tree.in_ram_only = (
                tree.in_ram_only or ephemeral or self._is_ephemeral(AgentKey(namespace, agent))
            )
            gone = tree.surplus(self._max_disk // 4)
            if self._table is not None and not tree.in_ram_only:
                records = [turn.record(AgentKey(namespace, agent)) for turn in turns]
                self._table.put(records)
                if gone:
                    self._table.delete(gone)
                self._disk_bytes += sum(len(record.content) for record in records)
            self._keep((namespace, agent), tree)
        self._trim()
        return True

    def drop(
        self, namespace: str, agent: str, tree: TurnTree, turns: list[Turn], *, wipe: bool = False
    ) -> Future[None] | None:
        """Forget turns, each before its parent; what follows them on other paths keeps their
        messages until that goes.

        Gives what ends when the disk knows it (`wipe`: and their text is off the disk), None where
        nothing is there.
        """
        with self._lock:
            gone, hidden = list[str](), list[Turn]()
            for turn in [] if tree.deleted else turns:
                if turn.id in tree.turns:
                    removed = tree.remove(turn.id)
                    gone += removed
                    hidden += [] if removed else [tree.hide(turn.id)]
            if self._table is None or tree.in_ram_only or not (gone or hidden):
                return None
            done = (
                self._table.put([turn.record(AgentKey(namespace, agent)) for turn in hidden])
                if hidden
                else None
            )
            return self._table.delete(gone, wipe=wipe) if gone else done

    async def remove(self, namespace: str, agent: str, tree: TurnTree, turns: list[Turn]) -> None:
        """Forget turns, off the disk too. Raises StoreFailed."""
        done = self.drop(namespace, agent, tree, turns, wipe=True)
        try:
            if done is not None:
                await asyncio.wrap_future(done)
        except (OSError, sqlite3.Error, AgentMemError) as e:
            raise StoreFailed(f"What was said may still be on disk: {e}; delete it again") from e

    async def copy(self, agent: AgentKey, to: str) -> None:
        """Make the newest path the transcript of agent `to`, whose turns have ids of their own."""
        tree = await self.tree(*agent)
        path = copies(tree.path(tree.newest), None)
        if path:
            target = await self.tree(agent.namespace, to)
            self.add(agent.namespace, to, target, path, ephemeral=tree.in_ram_only)

    async def cut(self, namespace: str, agent: str, tree: TurnTree, turns: list[Turn]) -> None:
        """Forget the last turns of the newest path, which goes on from where they began. Raises
        StoreFailed.
        """
        if not turns or tree.deleted:
            return
        gone, parent = {turn.id for turn in turns}, turns[0].parent
        newest = next(
            (t for t in reversed(tree.turns.values()) if t.id not in gone and not t.hidden), None
        )
        if (
            tree.newest is turns[-1] and (newest and newest.id) != parent
        ):  # it would be that of another path
            self.add(
                namespace,
                agent,
                tree,
                [new_turn("cut", tree.turns[parent] if parent else None, [])],
            )
        await self.remove(namespace, agent, tree, turns[::-1])

    def forget(
        self, namespace: str, agent: str, delete: Callable[[], Future[bool]]
    ) -> Future[bool]:
        """Delete an agent by `delete`. From any thread: nothing that was begun before is added
        after.
        """
        with self._lock:
            self._drop((namespace, agent))
            return delete()

    def _drop(self, key: _Key) -> None:
        tree = self._trees.pop(key, None)
        if tree is not None:
            tree.deleted = True
        self._recent.pop(key, None)

    def _keep(self, key: _Key, tree: TurnTree) -> None:
        """Keep it in RAM, and let go of what was used before: what is on disk too, and of the rest
        what is too much.
        """
        self._recent[key] = tree
        self._recent.move_to_end(key)
        if self._table is None:
            return
        for only_here, most in ((False, MAX_TREES), (True, math.inf)):
            idle = [
                k for k, tree in self._recent.items() if k != key and tree.in_ram_only is only_here
            ]
            held = sum(self._recent[k].nbytes for k in idle)
            while idle and (held > MAX_RAM or len(idle) > most):
                held -= self._recent.pop(idle.pop(0)).nbytes

    def _trim(self) -> None:
        if self._table is None or self._trimming or self._disk_bytes <= self._max_disk:
            return
        self._trimming, loop = True, asyncio.get_running_loop()

        def trimmed(done: Future[tuple[list[AgentKey], int]]) -> None:
            with self._lock:
                self._trimming = False
                if done.exception() is None:
                    gone, self._disk_bytes = done.result()
                    for key in gone:
                        self._drop(key)

        trim = self._table.trim(self._max_disk * 9 // 10)
        trim.add_done_callback(lambda done: loop.call_soon_threadsafe(trimmed, done))
