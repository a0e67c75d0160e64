"""How many tokens must be prefilled at a step: at least, and by servers that compare plain tokens.

A *branch* is what an earlier step of the same agent left behind: the text rendered for it, and the
text generated. All earlier steps of the conversation count as branches, whatever came between.

The *common text* of a step is the longest prefix of its rendered text that is also a prefix of a
branch's text, and does not end inside an added token ("<｜tool▁calls▁begin｜>" and
"<｜tool▁outputs▁begin｜>" have nothing in common). Where a user wrote what looks like a special
token, and the other text has the special token itself there, they differ.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from support.chat.families import added_pattern, encode_rest
from support.chat.play import FORGED, Step


@dataclass(frozen=True)
class Need:
    """Tokens of one step: all of the prompt tokenized as a whole, and how many to prefill.

    `ideal` is the number of tokens of the text after the common text, tokenized alone, and one: the
    last token sampled for a branch is in its text but not in its cache, and of a prompt that is all
    cached the last token must run again. A server that keeps whole tokens only can need a few more
    where the common text ends inside a token; it can need fewer where the rest joins with nothing
    (then the one is not needed), or tokenizes better with what is before it.

    `naive` is what is left of the prompt after its longest common prefix with the tokens of a
    branch, where each prompt was tokenized as a whole and the generated tokens follow; at least
    one. `linear` is the same of a server that keeps the last step's branch only.
    """

    total: int
    ideal: int
    naive: int
    linear: int


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    """The length of the longest common prefix, by halves: slices compare faster than items."""
    same, most = 0, min(len(a), len(b))
    while same < most:
        middle = (same + most + 1) // 2
        same, most = (middle, most) if a[same:middle] == b[same:middle] else (same, middle - 1)
    return same


def common_text(step: Step, earlier: Sequence[Step]) -> int:
    """The length of the common text, in characters of step.rendered."""
    texts = (branch.marked + branch.generated for branch in earlier)
    longest = max((_common(step.marked, text) for text in texts), default=0)
    common = longest - step.marked.count(FORGED, 0, longest)
    inside = (
        m.start()
        for m in added_pattern(step.family).finditer(step.rendered)
        if m.start() < common < m.end()
    )
    return next(inside, common)


def ideal(step: Step, earlier: Sequence[Step]) -> int:
    return len(encode_rest(step.family, step.rendered[common_text(step, earlier) :])) + 1


def naive(step: Step, earlier: Sequence[Step]) -> int:
    branches = ((*branch.prompt_ids, *branch.generated_ids) for branch in earlier)
    longest = max((_common(step.prompt_ids, branch) for branch in branches), default=0)
    return max(1, len(step.prompt_ids) - longest)


def needs(steps: Iterable[Step]) -> list[Need]:
    earlier: list[Step] = []
    found = []
    for step in steps:
        total, linear = len(step.prompt_ids), naive(step, earlier[-1:])
        found.append(Need(total, ideal(step, earlier), naive(step, earlier), linear))
        earlier.append(step)
    return found
