"""Why a prompt was cached as far as it was, and no further."""

from collections.abc import Sequence

import numpy as np

from ..tensors import common_prefix
from .agent import Agent
from .info import Cause, Explanation
from .match import Match

_SHOWN = 24  # tokens on each side of where two sequences part

WORDS: dict[Cause, str] = {
    "first": "The agent had nothing of its own cached; at most what others of the namespace have "
    "in common with it.",
    "extended": "The prompt goes on from the end of what was cached: all of it was used.",
    "repeated": "All of the prompt was cached, from an earlier request that began the same.",
    "parted": "The prompt differs from everything that was cached, from this token on.",
    "lost": "The prompt has more in common with what was asked before than is still there: it was "
    "evicted from a full store, was never written, was damaged, or is of a model that keeps its "
    "state at some positions only.",
    "scored": "Log probabilities of the prompt were asked for, which takes a prefill of all of it.",
}


def explain(
    agent: Agent | None, tokens: Sequence[int], match: Match, *, scored: bool = False
) -> Explanation:
    """Say how far a prompt is cached, and why no further. Engine thread only.

    `tokens`: the prompt; `match`: what of it is used; `scored`: its log probabilities are wanted.
    """
    wanted = np.array(tokens[:-1], np.uint32)
    branches = [branch.tokens() for branch in agent.branches.values()] if agent else []
    nearest = np.empty(0, np.uint32)
    n = 0
    for branch in branches:
        common = common_prefix(branch, wanted)
        if common > n or not len(nearest):
            nearest = branch
            n = common
    return Explanation(
        cause="scored" if scored else _cause(match.length, n, len(nearest), len(wanted)),
        prompt_tokens=len(tokens),
        cached_tokens=match.length,
        common_tokens=n,
        branch_tokens=len(nearest),
        before=wanted[max(0, n - _SHOWN) : n].tolist(),
        branch=nearest[n : n + _SHOWN].tolist(),
        prompt=list(tokens[n : n + _SHOWN]),
    )


def _cause(cached: int, common: int, branch: int, wanted: int) -> Cause:
    """Return the cause, by tokens that are cached, that a branch has too, and that are wanted."""
    if not branch:
        return "first"
    if cached < common:
        return "lost"
    if common == wanted:
        return "repeated"
    return "extended" if common == branch else "parted"
