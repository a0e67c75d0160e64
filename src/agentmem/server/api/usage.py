"""What answers cost, in the words of OpenAI's completions and chat completions."""

from collections.abc import Sequence
from typing import Any

from ..answer import RunningAnswer
from .wire import StreamOptions


def usage(answers: Sequence[RunningAnswer]) -> dict[str, Any]:
    """Return the `usage` of answers that have ended; one prompt of several answers counts once.

    What of a prompt was not cached is now.
    """
    prompt_tokens = 0
    cached_tokens = 0
    for answer in answers:
        assert answer.finished is not None
        if not answer.shares_prompt:
            prompt_tokens += answer.finished.stats.prompt_tokens
            cached_tokens += answer.finished.stats.cached_tokens
    details = {
        "cached_tokens": cached_tokens,
        "cache_write_tokens": prompt_tokens - cached_tokens,
    }
    ended = [answer.finished.stats.completion_tokens for answer in answers if answer.finished]
    reasoning = sum(answer.num_reasoning_tokens for answer in answers)
    return {
        **_counts(prompt_tokens, sum(ended)),
        "prompt_tokens_details": details,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def usage_so_far(answers: Sequence[RunningAnswer]) -> dict[str, Any]:
    """Return the `usage` of answers that still come."""
    prompts = [len(one.request.tokens) for one in answers if not one.shares_prompt]
    return _counts(sum(prompts), sum(answer.num_tokens for answer in answers))


def _counts(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class StreamUsage:
    """The field `usage` of a stream's chunks, as its options have it."""

    def __init__(self, options: StreamOptions | None, answers: Sequence[RunningAnswer]):
        self._answers = answers
        options = options or StreamOptions()
        self._continuous = bool(options.continuous_usage_stats)
        self.has_last = bool(options.include_usage)  # a chunk of its own, with the whole

    def field(self) -> dict[str, Any]:
        """Return the field of a chunk, if it has one: null where the last chunk will tell."""
        if self._continuous:
            return {"usage": usage_so_far(self._answers)}
        return {"usage": None} if self.has_last else {}

    def last(self) -> dict[str, Any]:
        """Return the fields of the last chunk."""
        return {"choices": [], "usage": usage(self._answers)}
