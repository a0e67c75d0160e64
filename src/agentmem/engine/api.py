"""What crosses the engine's border: a request goes in, deltas and one Finished come out."""

from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO, Any, Literal, Protocol

import numpy as np

from ..agent_key import AgentKey
from ..prefix_cache.info import AgentDetail, AgentInfo, Cause, Explanation
from ..store.writer.turns import TurnTable

CacheState = Literal["cold", "warm", "hot"]  # nothing cached; read from disk; in RAM
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer, last `repetition_context_size` tokens
    repetition_context_size: int = 20
    presence_penalty: float = 0.0  # over the answer
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    # log probabilities of each token of the answer, and of as many of the likeliest; None: of none
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # the same of the prompt, all of which is prefilled then


@dataclass(frozen=True)
class GenerateRequest:
    agent: AgentKey
    tokens: list[int]  # the rendered prompt, at least one
    params: SamplingParams  # max_tokens 0: prefill the prompt, and no more
    priority: int = 0  # lower goes first
    ttl: float | None = None  # seconds that the agent is kept after its last use; None: as it is
    ephemeral: bool | None = None  # a new agent is never written to disk; None: as it is
    # the answer goes on with the prompt's text: a blank that it begins with is kept
    continues_text: bool = False
    # tokens from which later prompts are likely to go on; None: all but the last
    checkpoint: int | None = None
    # told tokens done and in all, on the engine thread, after every prefill chunk
    on_progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """The model's own log probability of a token: before bias, penalties and temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens in its place, the first one first


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer.

    `logprobs` come where they were asked for: first, in pieces without text, those of the prompt's
    tokens but for its first one; then one for each token of the answer, the one that ended it too.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class RequestStats:
    """What one request cost. Times in ms; `ttft_ms` runs from submission to the first sampled
    token.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache: CacheState
    restored_bytes: int
    restore_ms: float
    prefill_ms: float
    ttft_ms: float
    queue_ms: float
    cause: Cause = "first"


@dataclass(frozen=True)
class Finished:
    reason: FinishReason
    stats: RequestStats
    stop_string: str | None = None  # which ended the answer, if one did

    @property
    def cut(self) -> bool:
        """The model had not ended the answer: what it was about to say, a tool call perhaps, is not
        whole.
        """
        return self.reason == "length" or self.stop_string is not None


@dataclass(frozen=True)
class Export:
    """An agent as a file. `close` it, read to its end or not."""

    chunks: Iterator[bytes]  # to be read on a thread that may wait for the disk
    close: Callable[[], None]


# deletes an agent, by what it is given: whoever keeps more of the agent lets go of it just before.
# Called on the engine thread
Forget = Callable[[AgentKey, Callable[[], Future[bool]]], Future[bool]]


class EngineAPI(Protocol):
    """What the server needs of the engine. Every method is called on the event loop."""

    model_name: str
    max_context: int  # prompt and answer, in tokens
    why_max_context: str  # what sets it, if not the model
    vocab_size: int  # every token of a prompt is below
    tokenizer: Any  # mlx_lm TokenizerWrapper
    turn_table: TurnTable | None  # where what was said is written

    @property
    def failed(self) -> bool:
        """For good: it answers no more, and only a new process helps."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[TextDelta | Finished]:
        """Stream one answer; closing the iterator cancels it within one token.

        Raises: ContextLengthExceeded, Busy, ShuttingDown, EngineFailed (before the first item or
        mid-stream).
        """
        ...

    def health(self) -> dict[str, Any]:
        """{"status": "ok" | "degraded" | "failed" | "stopping", "errors": [...], ...figures}"""
        ...

    def metrics(self) -> bytes:
        """Prometheus' text format, see metrics.py."""
        ...

    async def agents(self, namespace: str) -> list[AgentInfo]: ...

    async def agent(self, key: AgentKey) -> AgentDetail:
        """NotFound: there is none. So for all that follow."""
        ...

    def branch_tokens(self, key: AgentKey) -> list[np.ndarray]:
        """Token ids of what the agent has cached, branch by branch; while it changes, perhaps of
        none.
        """
        ...

    def on_forget(self, forget: Forget) -> None:
        """Have agents deleted through `forget` from now on."""
        ...

    def is_ephemeral(self, key: AgentKey) -> bool:
        """Tell whether there is such an agent, and it is never written to disk. On any thread."""
        ...

    def agent_times(self, key: AgentKey) -> tuple[float, float] | None:
        """When the agent was created and last used, Unix seconds; None: there is none."""
        ...

    async def explain_agent(self, key: AgentKey, tokens: list[int] | None) -> Explanation | None:
        """Of a prompt that could be sent now; `tokens` None: of the last one that was, None if
        there was none.
        """
        ...

    async def agent_tokens(self, key: AgentKey) -> list[int]:
        """Of the newest branch."""
        ...

    async def pin_agent(self, key: AgentKey, pinned: bool) -> None:
        """Whether it stays in RAM, and in a full store, and does not expire."""
        ...

    async def set_agent_ttl(self, key: AgentKey, ttl: float | None) -> None:
        """Seconds that it is kept after its last use; None: for good."""
        ...

    async def evict_agent(self, key: AgentKey) -> int:
        """From RAM to disk; the bytes of RAM that came free. Conflict: pinned or ephemeral."""
        ...

    async def fork_agent(self, key: AgentKey, to: str, tokens: int | None) -> AgentDetail:
        """A new agent `to` with the first tokens (None: all) of the newest branch. Conflict: it
        exists.
        """
        ...

    async def truncate_agent(self, key: AgentKey, tokens: int, held: int | None) -> AgentDetail:
        """Keep the first tokens of the newest branch. Conflict: it is in use, or doesn't hold
        `held` tokens.
        """
        ...

    async def export_agent(self, key: AgentKey) -> Export: ...

    async def import_agent(
        self, namespace: str, agent_id: str | None, file: IO[bytes]
    ) -> AgentDetail:
        """Under this name, or its own. InvalidRequest: the file; Conflict: the agent exists."""
        ...

    @property
    def room_bytes(self) -> int:
        """Bytes of disk that the store has room for."""
        ...

    async def collect_garbage(self) -> int:
        """Let go of what has expired, is in quarantine, or belongs to nobody: bytes of disk that
        came free.
        """
        ...

    async def delete_agent(self, key: AgentKey) -> bool:
        """Forget the agent; True once its bytes are off the disk, False if there was none."""
        ...

    async def prefetch_agent(self, key: AgentKey) -> int | None:
        """Read the agent's newest branch into RAM; the bytes read, None if there is no such agent.
        Raises Busy.
        """
        ...

    def announce(self, url: str) -> None:
        """Where the server can be reached: for other processes that find the store in use."""
        ...

    def begin_drain(self) -> None:
        """Refuse new requests; cut running ones (ShuttingDown) after the grace time."""
        ...

    async def stop(self) -> None:
        """Drain, persist every tail, close the store, end the threads."""
        ...
