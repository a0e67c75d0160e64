"""What crosses the engine's border: a request goes in, deltas and one Finished come out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llguidance import LLMatcher

from ..agent_key import AgentKey
from ..prefix_cache.info import Cause

CacheState = Literal["cold", "warm", "hot"]  # nothing cached; read from disk; in RAM
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are chosen, and what ends it."""

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
    """One prompt of an agent, and what is wanted of it."""

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
    grammar: LLMatcher | None = None  # that the answer is held to, at its beginning
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
    num_tokens: int = 0  # of the answer so far


@dataclass(frozen=True)
class RequestStats:
    """What one request cost.

    Times are in ms; `ttft_ms` runs from submission to the first sampled token.
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
    """The end of an answer."""

    reason: FinishReason
    stats: RequestStats
    stop_string: str | None = None  # which ended the answer, if one did

    @property
    def cut(self) -> bool:
        """Tell whether the model had not ended the answer.

        What it was about to say, a tool call perhaps, is not whole then.
        """
        return self.reason == "length" or self.stop_string is not None
