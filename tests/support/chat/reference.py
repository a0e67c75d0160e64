"""A splice in its plainest form: shows that the ideal can be reached, and what a fast one must
agree with.

A branch is its tokens and, for each, the place in the branch's text where it ends; None where it
ends inside a character. Of the branch with most in common the tokens up to the last such place
within the common text are kept; the rest is tokenized alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from support.chat.families import decode, encode_with_ends
from support.chat.ideal import common_text
from support.chat.play import Step, pieces


@dataclass(frozen=True)
class Spliced:
    ids: list[int]  # of the prompt
    prefilled: (
        int  # tokens that must run; the last one of a branch was sampled, and so is in no cache
    )
    text: str  # of the ids


Ends = list[tuple[int, int | None]]


def spliced(steps: tuple[Step, ...]) -> Iterator[Spliced]:
    """Every family but mistral-v1, whose tokens do not have the text's places."""
    branches: list[Ends] = []
    for i, step in enumerate(steps):
        kept: Ends = []
        whole = 0
        for branch, earlier in zip(branches, steps[:i], strict=True):
            common = common_text(step, [earlier])
            upto = max(
                (n for n, (_, end) in enumerate(branch, 1) if end is not None and end <= common),
                default=0,
            )
            if _end(branch[:upto]) > _end(kept):
                kept, whole = branch[:upto], len(branch)
        rest = _shift(encode_with_ends(step.family, step.rendered[_end(kept) :]), _end(kept))
        prompt = kept + rest
        ids = [token for token, _ in prompt]
        yield Spliced(ids, max(1, len(rest) + (0 < len(kept) == whole)), decode(step.family, ids))
        branches.append(prompt + _shift(_generated(step), len(step.rendered)))


def _generated(step: Step) -> Ends:
    found: Ends = []
    for piece in pieces(step.family, step.generated, step.answer.piece):
        found += _shift(encode_with_ends(step.family, piece), _end(found))
    assert tuple(token for token, _ in found) == step.generated_ids
    return found


def _end(tokens: Ends) -> int:
    return (tokens[-1][1] or 0) if tokens else 0


def _shift(tokens: Ends, by: int) -> Ends:
    return [(token, None if end is None else end + by) for token, end in tokens]
