"""Tasks: coroutines on the engine thread, which futures of other threads carry on.

    @on_engine_thread
    async def evict(self, key):              # begins between two steps of the engine
        agent = self._prefix_cache.known(key)
        await stored(self._write_back.save_agent(agent))      # meanwhile the engine decodes
        ...                                  # goes on between two later steps

What a coroutine knew before it waited may be out of date after: the agent may be gone.
"""

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ..errors import AgentMemError, EngineFailed

T = TypeVar("T")
P = ParamSpec("P")
Post = Callable[[Callable[[], None]], None]  # runs a function on the engine thread
Work = Coroutine[Future[Any], None, T]


def failed_error() -> EngineFailed:
    """Return what everyone is told once the engine has met a bug."""
    return EngineFailed("the engine failed and must be restarted; /health has the error")


@types.coroutine
def ended(future: Future[Any]) -> Generator[Future[Any], None, None]:
    """Wait until `future` has a result or an error, from whatever thread."""
    yield future


async def finished(future: Future[T]) -> T:
    """Wait for `future`; return its result, or raise its error."""
    await ended(future)
    return future.result()


async def _begun(begin: Callable[[], Work[T]]) -> T:
    """Return what comes of `begin()`, which is called within: whoever waits hears of its bugs."""
    return await begin()


class Tasks:
    """Begins coroutines and carries them on, each piece of them on the engine thread."""

    def __init__(self, post: Post, check_open: Callable[[], None]):
        """Take `post`, and `check_open`, which raises where nothing may begin."""
        self._post = post
        self._check_open = check_open
        # who is told of each in the end, if anybody is
        self._waiting: dict[Work[Any], Future[Any] | None] = {}
        self._refusal: AgentMemError | None = None  # of whatever is yet to begin

    async def perform(self, begin: Callable[[], Work[T]]) -> T:
        """Have `begin()` run on the engine thread; wait for its result on the event loop.

        Once begun it runs to its end, even if the caller is cancelled. Raises what it raises, and
        EngineFailed where it meets a bug.
        """
        self._check_open()
        answer: Future[T] = Future()
        answer.set_running_or_notify_cancel()  # so it can't be cancelled
        self._post(lambda: self._begin(begin, answer))
        return await asyncio.wrap_future(answer)

    def start(self, work: Work[Any]) -> None:
        """Run a coroutine that nobody waits for: any error is a bug. On the engine thread."""
        self._step(work, None)

    def end(self, error: AgentMemError) -> None:
        """Tell `error` to everyone who waits, and to whoever asks later. On the engine thread."""
        self._refusal = error
        waiting = self._waiting
        self._waiting = {}
        for work, answer in waiting.items():
            if answer is not None:
                answer.set_exception(error)
            with suppress(Exception):  # it lets go of things that nobody will use
                work.close()

    def _begin(self, begin: Callable[[], Work[T]], answer: Future[T]) -> None:
        if self._refusal is not None:
            answer.set_exception(self._refusal)
        else:
            self._step(_begun(begin), answer)

    def _step(self, work: Work[T], answer: Future[T] | None) -> None:
        """Run up to the next future that `work` waits for. A bug goes on to the engine's loop."""
        try:
            future = work.send(None)
        except StopIteration as end:
            if answer is not None:
                answer.set_result(end.value)
        except BaseException as e:
            if answer is not None and isinstance(e, AgentMemError):
                answer.set_exception(e)
                return
            if answer is not None:
                answer.set_exception(failed_error())
            raise
        else:
            self._waiting[work] = answer
            future.add_done_callback(lambda _: self._post(lambda: self._resume(work)))

    def _resume(self, work: Work[Any]) -> None:
        if work in self._waiting:  # else `end` came before
            self._step(work, self._waiting.pop(work))


class _HasTasks(Protocol):
    _tasks: Tasks


S = TypeVar("S", bound=_HasTasks)


def on_engine_thread(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Make a coroutine method one that the event loop awaits and the engine thread runs.

    Raises EngineFailed and ShuttingDown where nothing may begin any more.
    """

    @wraps(method)
    async def perform(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._tasks.perform(lambda: method(self, *args, **kwargs))

    return perform
