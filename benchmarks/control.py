"""What a model that never lost anything would have answered.

Every token of an answer is held against its logits. An answer is right if each of its tokens is the
likeliest one after the prompt and the tokens before it, computed from nothing. Where two tokens are
as good as equal, a batch's rounding may choose the other: a tie, counted, not wrong.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from agentmem.engine.model_runner import ModelRunner
from agentmem.kvcache.calibrate import calibration_tokens
from agentmem.models.loading import LoadedModel

TIE = 0.05  # of logits, whose standard deviation is about 1
NUM_SPECIAL = 8  # tokens of chat, and words of no number, which an answer must not hold
PENALTY = 1.0  # a greedy tiny model soon repeats itself
# what a request must say for `Control` to know better
SAMPLING: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": PENALTY, "ignore_eos": True}
LOGIT_BIAS = tuple((token, -100.0) for token in range(NUM_SPECIAL))


@dataclass
class Tally:
    """Answers and their tokens, by what the control says of them."""

    answers: int = 0
    tokens: int = 0
    ties: int = 0
    largest_tie: float = 0.0  # of logits
    wrong: int = 0  # tokens


class Control:
    def __init__(self, loaded: LoadedModel, block_size: int):
        self._runner = ModelRunner(loaded.model, kv_bits="4", block_size=block_size)
        tokens = calibration_tokens(
            lambda text: loaded.tokenizer.encode(text, add_special_tokens=False)
        )
        self._runner.use_centres(self._runner.calibrate(tokens))
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = {}
        self.tally = Tally()

    def check(self, prompt: list[int], answer: list[int]) -> str | None:
        """Say what is wrong with the answer. It is counted either way."""
        gaps = self.gaps(prompt, answer)
        wrong = [i for i, gap in enumerate(gaps) if gap >= TIE]
        self.tally.answers += 1
        self.tally.tokens += len(answer)
        self.tally.ties += sum(0 < gap < TIE for gap in gaps)
        ties = [gap for gap in gaps if gap < TIE]
        self.tally.largest_tie = max([self.tally.largest_tie, *ties])
        self.tally.wrong += len(wrong)
        if not wrong:
            return None
        first = wrong[0]
        return (
            f"token {first} of {len(answer)} is {gaps[first]:.3g} from the likeliest, "
            f"{len(wrong)} are wrong"
        )

    def gaps(self, prompt: list[int], answer: list[int]) -> list[float]:
        """Return how far each answer token's logit is below the highest, 0 if it is that."""
        key = (tuple(prompt), tuple(answer))
        if key not in self._known:
            self._known[key] = self._gaps(prompt, answer)
        return self._known[key]

    def _gaps(self, prompt: list[int], answer: list[int]) -> list[float]:
        tokens = prompt + answer
        cache = self._runner.new_cache(capacity=len(tokens))
        logits, _ = self._runner.forward(mx.array([tokens[:-1]]), [cache])
        rows = np.array(logits[0, len(prompt) - 1 :])
        rows[:, :NUM_SPECIAL] = -np.inf
        said: Counter[int] = Counter()
        gaps = []
        for row, token in zip(rows, answer, strict=True):
            for before, times in said.items():
                row[before] -= PENALTY * times
            gaps.append(float(row.max() - row[token]))
            said[token] += 1
        return gaps
