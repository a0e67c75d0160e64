"""Log probabilities of the tokens that a chat answer's content is made of, as OpenAI tells them.

Worked example: of "<think>\\n", "Well", "</think>", " Hi", "!", "<end>" the content is "Hi!", and
its tokens are " Hi" and "!". Markup, reasoning, calls and what ends the answer have no rows.
"""

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...chat.answer_parser import Content
from ...chat.token_texts import TokenTexts
from ...engine.api import TokenLogprob
from ..answer import RunningAnswer

LEAST = -9999.0  # in place of minus infinity, which JSON can't say


@dataclass(frozen=True)
class _Place:
    """The characters that a token's text is of all that the model wrote, and its row."""

    start: int
    end: int  # greater than `start`, also where it is a part of the character there
    row: dict[str, Any]


class ContentLogprobs:
    """Finds the tokens of one answer's content, piece by piece, in their order."""

    def __init__(self, answer: RunningAnswer, texts: TokenTexts):
        """`texts`: of the answer, from its beginning."""
        self._answer = answer
        self._texts = texts
        self._num_read = 0
        self._places = deque[_Place]()
        self._shift = 0  # characters that tokens have and the answer's text does not

    async def of(self, content: Content) -> list[dict[str, Any]]:
        """Return the rows of the tokens that a piece has and no earlier one had."""
        return await self._texts.work_out(partial(self._of, content))

    def _of(self, content: Content) -> list[dict[str, Any]]:
        self._read()
        end = content.end + self._shift
        start = end - len(content.text)
        rows = []
        while self._places and self._places[0].start < end:
            place = self._places.popleft()
            if place.end > start:
                rows.append(place.row)
        return rows

    def _read(self) -> None:
        """Find the places of the tokens that came since the last time."""
        texts = self._texts
        goes_on = self._answer.request.continues_text
        for told in self._answer.logprobs[self._num_read :]:
            if not self._num_read and texts.text(told.token).startswith(" "):
                self._shift = int(texts.drops_blank and not goes_on)
            self._num_read += 1
            start = texts.offset
            row = self._row(told)
            texts.add(told.token)
            self._places.append(_Place(start, max(texts.offset, start + 1), row))

    def _row(self, told: TokenLogprob) -> dict[str, Any]:
        top = [self._one(token, logprob) for token, logprob in told.top]
        return {**self._one(told.token, told.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._texts.text(token),
            "logprob": max(logprob, LEAST),
            "bytes": self._texts.bytes_of(token),
        }
