"""The registry of all agents' turns, which reads and writes them behind the requests.

They are in RAM while they are in use, and are read again when their agent is asked for.
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


class TranscriptRegistry:
    """Holds every agent's TurnTree. A turn is seen at once by whoever asks after it was added.

    It is used on the event loop, but for `forget`.
    """

    def __init__(
        self,
        table: TurnTable | None = None,
        is_ephemeral: Callable[[AgentKey], bool] = lambda key: False,
        max_disk: int = MAX_DISK,
    ):
        """`table` None: nothing is written."""
        self._table = table
        self._is_ephemeral = is_ephemeral
        self._max_disk = max_disk
        self._disk_bytes = table.nbytes if table else 0
        self._lock = threading.Lock()  # orders what is written of an agent, and its deletion
        self._trees: WeakValueDictionary[AgentKey, TurnTree] = WeakValueDictionary()
        self._recent: OrderedDict[AgentKey, TurnTree] = OrderedDict()  # keeps them alive
        self._trimming = False

    def open(self, agent: AgentKey) -> TurnTree:
        """Return the agent's tree, which `loaded` waits for.

        Whoever holds it sees whether the agent was deleted since.
        """
        with self._lock:
            tree = self._trees.get(agent)
            if tree is None:
                tree = self._trees[agent] = TurnTree(agent)
                if self._table is not None:
                    tree.reading = self._table.read(agent)
            self._keep(tree)
        return tree

    async def loaded(self, tree: TurnTree) -> TurnTree:
        """Return `tree`, once it holds what the store has of it. Raises StoreFailed."""
        reading = tree.reading
        if reading is None:
            return tree
        try:
            records = await asyncio.shield(asyncio.wrap_future(reading))
        except (OSError, sqlite3.Error, AgentMemError) as e:
            with self._lock:
                if self._trees.get(tree.agent) is tree:
                    self._drop(tree.agent)  # the next one who asks reads again
            raise StoreFailed(f"The agent's transcript can't be read: {e}") from e
        if tree.reading is not None:
            tree.reading = None
            tree.load(map(Turn.of, records))
        return tree

    async def tree(self, agent: AgentKey) -> TurnTree:
        """Return the agent's tree, loaded. Raises StoreFailed."""
        return await self.loaded(self.open(agent))

    async def find(self, namespace: str, turn_id: str) -> tuple[TurnTree, Turn] | None:
        """Return a turn of this namespace and its tree, if there is one. Raises StoreFailed."""
        trees = list(self._trees.values())
        held = [tree.agent for tree in trees if turn_id in tree.turns and not tree.deleted]
        found = held[0] if held else None
        if found is None and self._table is not None:
            try:
                found = await asyncio.wrap_future(self._table.find(turn_id))
            except (OSError, sqlite3.Error, AgentMemError) as e:
                raise StoreFailed(f"The response can't be looked up: {e}") from e
        if found is None or found.namespace != namespace:
            return None
        tree = await self.tree(found)
        turn = tree.turns.get(turn_id)
        return (tree, turn) if turn and not turn.hidden else None

    def add(self, tree: TurnTree, turns: list[Turn], *, ephemeral: bool = False) -> bool:
        """Add turns to a tree that is loaded, each after its parent.

        False: the agent or the parent was deleted.
        """
        with self._lock:
            parent = turns[0].parent
            if tree.deleted or (parent is not None and parent not in tree.turns):
                return False
            for turn in turns:
                tree.add(turn)
            if ephemeral or self._is_ephemeral(tree.agent):
                tree.in_ram_only = True
            gone = tree.surplus(self._max_disk // 4)
            if self._table is not None and not tree.in_ram_only:
                records = [turn.record(tree.agent) for turn in turns]
                self._table.put(records)
                if gone:
                    self._table.delete(gone)
                self._disk_bytes += sum(len(record.content) for record in records)
            self._keep(tree)
        self._trim()
        return True

    def drop(self, tree: TurnTree, turns: list[Turn], *, wipe: bool = False) -> Future[None] | None:
        """Forget turns, each before its parent.

        What follows them on other paths keeps their messages until that goes. Returns what ends
        when the disk knows it (`wipe`: and their text is off the disk), None where nothing is
        there.
        """
        with self._lock:
            gone: list[str] = []
            hidden: list[Turn] = []
            for turn in [] if tree.deleted else turns:
                if turn.id in tree.turns:
                    removed = tree.remove(turn.id)
                    gone += removed
                    hidden += [] if removed else [tree.hide(turn.id)]
            if self._table is None or tree.in_ram_only or not (gone or hidden):
                return None
            done = None
            if hidden:
                done = self._table.put([turn.record(tree.agent) for turn in hidden])
            return self._table.delete(gone, wipe=wipe) if gone else done

    async def remove(self, tree: TurnTree, turns: list[Turn]) -> None:
        """Forget turns, off the disk too. Raises StoreFailed."""
        done = self.drop(tree, turns, wipe=True)
        try:
            if done is not None:
                await asyncio.wrap_future(done)
        except (OSError, sqlite3.Error, AgentMemError) as e:
            raise StoreFailed(f"What was said may still be on disk: {e}; delete it again") from e

    async def copy(self, agent: AgentKey, to: str) -> None:
        """Make the newest path the transcript of agent `to`, whose turns have ids of their own."""
        tree = await self.tree(agent)
        path = copies(tree.path(tree.newest), None)
        if path:
            target = await self.tree(AgentKey(agent.namespace, to))
            self.add(target, path, ephemeral=tree.in_ram_only)

    async def cut(self, tree: TurnTree, turns: list[Turn]) -> None:
        """Forget the last turns of the newest path, which goes on from where they began.

        Raises StoreFailed.
        """
        if not turns or tree.deleted:
            return
        gone = {turn.id for turn in turns}
        parent = turns[0].parent
        left = (t for t in reversed(tree.turns.values()) if t.id not in gone and not t.hidden)
        newest = next(left, None)
        if tree.newest is turns[-1] and (newest and newest.id) != parent:
            # else the newest path would be another one
            self.add(tree, [new_turn("cut", tree.turns[parent] if parent else None, [])])
        await self.remove(tree, turns[::-1])

    def forget(self, agent: AgentKey, delete: Callable[[], Future[bool]]) -> Future[bool]:
        """Delete an agent by `delete`; nothing that was begun before is added after.

        It may be called on any thread.
        """
        with self._lock:
            self._drop(agent)
            return delete()

    def _drop(self, agent: AgentKey) -> None:
        tree = self._trees.pop(agent, None)
        if tree is not None:
            tree.deleted = True
        self._recent.pop(agent, None)

    def _keep(self, used: TurnTree) -> None:
        """Keep it in RAM, and let go of what was used before.

        That is: of what is on disk too, and of the rest what is too much.
        """
        self._recent[used.agent] = used
        self._recent.move_to_end(used.agent)
        if self._table is None:
            return
        for only_here, most in ((False, MAX_TREES), (True, math.inf)):
            others = (tree for tree in self._recent.values() if tree is not used)
            idle = [tree for tree in others if tree.in_ram_only is only_here]
            held = sum(tree.nbytes for tree in idle)
            while idle and (held > MAX_RAM or len(idle) > most):
                oldest = idle.pop(0)
                held -= oldest.nbytes
                del self._recent[oldest.agent]

    def _trim(self) -> None:
        if self._table is None or self._trimming or self._disk_bytes <= self._max_disk:
            return
        self._trimming = True
        loop = asyncio.get_running_loop()

        def trimmed(done: Future[tuple[list[AgentKey], int]]) -> None:
            with self._lock:
                self._trimming = False
                if done.exception() is None:
                    gone, self._disk_bytes = done.result()
                    for agent in gone:
                        self._drop(agent)

        trim = self._table.trim(self._max_disk * 9 // 10)
        trim.add_done_callback(lambda done: loop.call_soon_threadsafe(trimmed, done))
