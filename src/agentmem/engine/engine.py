"""Engine: the thread that makes every MLX call of inference, and the border around it.

The event loop talks to that thread through an inbox only.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ..agent_key import AgentKey
from ..config import Settings
from ..errors import ContextLengthExceeded, EngineFailed, ShuttingDown, StartupError
from ..models.loading import LoadedModel
from ..store.writer.turns import TurnTable
from .answer_events import AnswerEvents
from .api import GenerateRequest
from .loop import EngineLoop, Inbox
from .startup import Core, build_core
from .tasks import Tasks

log = logging.getLogger(__name__)


class Engine:
    """One model, its agents and their store. Start it, then use it from one event loop.

    What can be done to agents is in `agents`, `forks` and `archives`.
    """

    def __init__(self, settings: Settings, load: Callable[[], LoadedModel]):
        """Keep `load`, which makes the model on the engine thread."""
        self._settings = settings
        self._load = load
        self._inbox: Inbox = queue.SimpleQueue()
        self._ready: Future[Core] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._failure: str | None = None
        self._stopping = False
        self._tasks = Tasks(self._post, self._check_open)

    def start(self) -> None:
        """Load the model and the store. Raises StartupError."""
        self._thread.start()
        self._core = self._ready.result()
        self.model_name = self._core.model.name
        self.model_dir = self._core.model.directory
        self.weights_hash = self._core.model.weights_hash
        self.on_gpu = mx.default_device().type != mx.DeviceType.cpu
        self.max_context = self._core.budget.max_context
        self.why_max_context = self._core.budget.why_max_context
        self.vocab_size = self._core.vocab_size
        self.tokenizer = self._core.model.tokenizer
        self.sampling = self._core.model.sampling if self._settings.model_sampling else {}
        self.agents = self._core.agents
        self.forks = self._core.forks
        self.archives = self._core.archives
        self.turn_table: TurnTable | None = self._core.store.turns

    def generate(self, request: GenerateRequest) -> AnswerEvents:
        """Return the stream of one answer, see AnswerEvents."""
        [events] = self.generate_each([request])
        return events

    def generate_each(self, requests: Sequence[GenerateRequest]) -> list[AnswerEvents]:
        """Return the streams of several answers to one prompt, which is prefilled once.

        The requests differ in their `params` alone. All are begun when the first stream is read.
        """
        begun = False

        def begin() -> None:
            nonlocal begun
            if begun:
                return
            self._check_open()
            self._check_length(requests[0])
            begun = True
            for answer in answers:
                answer.loop = asyncio.get_running_loop()
            self._post(lambda: self._loop.submit(first))

        def wake() -> None:
            self._post(lambda: None)

        answers = [AnswerEvents(request, begin, wake) for request in requests]
        first, *forks = [answer.sequence for answer in answers]
        first.forks = forks
        return answers

    def check_queue(self) -> None:
        """Raise Busy where the queue is full as things stand, as `generate` would later."""
        self._core.scheduler.check_room()

    @property
    def failed(self) -> bool:
        """Tell whether it answers no more for good, so that only a new process helps."""
        return self._failure is not None

    def health(self) -> dict[str, Any]:
        """Return what /health tells, see Health.told."""
        return self._core.health.told(
            failure=self._failure,
            stopping=self._stopping,
            memory_error=self._loop.memory_error,
        )

    def metrics(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return self._core.metrics.text()

    def branch_tokens(self, key: AgentKey) -> list[np.ndarray]:
        """Return the token ids of what an agent has cached, branch by branch.

        While the agent changes, they may be of no branch at all.
        """
        return self._core.prefix_cache.branch_tokens(key)

    def is_ephemeral(self, key: AgentKey) -> bool:
        """Tell whether there is such an agent, and it is never written to disk. On any thread."""
        return self._core.prefix_cache.is_ephemeral(key)

    def agent_times(self, key: AgentKey) -> tuple[float, float] | None:
        """Return when an agent was created and last used, Unix seconds; None: there is none."""
        agent = self._core.prefix_cache.agents.get(key)
        return (agent.created, agent.last_used) if agent else None

    def announce(self, url: str) -> None:
        """Note where the server can be reached, for processes that find the store in use."""
        self._core.store.announce(url)

    def begin_drain(self) -> None:
        """Refuse new requests; cut running ones (ShuttingDown) after the grace time."""
        self._stopping = True
        self._post(lambda: self._loop.drain(self._settings.grace))

    async def stop(self) -> None:
        """Drain, persist every tail, close the store, end the threads."""
        self.begin_drain()
        await asyncio.to_thread(self._thread.join)

    def _post(self, function: Callable[[], None]) -> None:
        self._inbox.put(function)

    def _check_length(self, request: GenerateRequest) -> None:
        """Raise ContextLengthExceeded where a prompt leaves no room for a token."""
        if len(request.tokens) >= self.max_context:
            raise ContextLengthExceeded(len(request.tokens), self.max_context, self.why_max_context)

    def _check_open(self) -> None:
        """Raise EngineFailed or ShuttingDown where nothing new may begin."""
        if self._failure:
            raise EngineFailed("the engine has failed and must be restarted; /health has the error")
        if self._stopping:
            raise ShuttingDown("the server is shutting down")

    def _run(self) -> None:
        try:
            with _mlx_thread():
                core = build_core(self._settings, self._load, self._post, self._tasks)
                self._loop = EngineLoop(
                    inbox=self._inbox,
                    tasks=self._tasks,
                    stepper=core.stepper,
                    admission=core.admission,
                    agents=core.agents,
                    scheduler=core.scheduler,
                    budget=core.budget,
                    prefix_cache=core.prefix_cache,
                    write_back=core.write_back,
                    store=core.store,
                    trace=core.trace,
                )
                self._ready.set_result(core)
                self._run_loop(self._loop)
        except StartupError as e:
            self._ready.set_exception(e)
        except BaseException as e:
            if self._ready.done():
                raise
            self._ready.set_exception(e)

    def _run_loop(self, loop: EngineLoop) -> None:
        """Run until drained; latch a bug, tell everyone who waits, and let /health say so."""
        try:
            loop.run()
        except BaseException as e:  # a bug: latch it, tell everyone who waits, let /health say so
            log.exception("the engine failed")
            self._failure = f"{type(e).__name__}: {e}"
            loop.run_failed()


@contextmanager
def _mlx_thread() -> Iterator[None]:
    """Let go of what MLX keeps for a thread that used it.

    MLX's worker threads, left behind, abort the process at its exit.
    """
    try:
        yield
    finally:
        mx.synchronize()
        mx.clear_streams()
