"""OutputStream: text of tokens as they come, up to a stop token or a stop string.

What may be the start of a stop string is held back.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine


class OutputStream:
    """The text of one answer. A stop string is never part of it, a stop token neither."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop: Sequence[str] = (),
        stop_token_ids: Iterable[int] = (),
        ignore_eos: bool = False,
        continues_text: bool = False,
    ):
        """Begin an answer; `continues_text`: a blank that it begins with is part of it."""
        self._detokenizer = tokenizer.detokenizer
        if continues_text:  # mlx-lm drops the blank at the beginning of all text only
            for token in tokenizer.encode("a", add_special_tokens=False):
                self._detokenizer.add_token(token)
            _ = self._detokenizer.last_segment
        self._stop_ids = set(stop_token_ids)
        if not ignore_eos:
            self._stop_ids.update(tokenizer.eos_token_ids)
        self._stops = {f"stop {i}": text for i, text in enumerate(stop)}
        edges = {"normal": [(text, state) for state, text in self._stops.items()]}
        self._state = TextStateMachine(edges | {state: [] for state in self._stops}).make_state()
        self.stop_string: str | None = None  # at which the answer ended

    def feed(self, token: int) -> tuple[str, bool]:
        """Take a token; return text that is safe to send, and whether the answer ends here."""
        if token in self._stop_ids:
            return self.finish(), True
        self._detokenizer.add_token(token)
        return self._advance(self._detokenizer.last_segment)

    def finish(self) -> str:
        """End the answer without a stop string; return what was held back, which belongs to it."""
        self._detokenizer.finalize()
        text, stopped = self._advance(self._detokenizer.last_segment)
        if stopped:
            return text
        self._state, held, _ = TextStateMachine.flush(self._state)
        return f"{text}{held}"

    def _advance(self, text: str) -> tuple[str, bool]:
        """Return the text up to a stop string, and whether there was one."""
        self._state, segments = TextStateMachine.split(self._state, text)
        self.stop_string = self._stops.get(self._state[0])
        return segments[0][1], self.stop_string is not None
