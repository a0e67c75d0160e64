"""What is told of agents: rows for whoever asks, plain values that no thread changes any more."""

from dataclasses import dataclass
from typing import Literal

Tier = Literal["warm", "hot"]  # some of what its end needs must be read from disk; all is in RAM
# why no more of a prompt was cached; explain.WORDS says each in a sentence
Cause = Literal["first", "extended", "repeated", "parted", "lost", "scored"]


@dataclass(frozen=True)
class AgentInfo:
    """One row of GET /v1/agents. Bytes count a shared block once for each agent that holds it."""

    agent_id: str
    tier: Tier
    tokens: int  # of the longest branch
    branches: int
    ram_bytes: int
    disk_bytes: int
    created: float  # Unix seconds
    last_used: float
    pinned: bool  # stays in RAM, and on disk
    ttl: float | None  # seconds that it is kept after its last use
    ephemeral: bool  # never written to disk
    requests: int
    hit_tokens: int  # of its prompts, that were cached


@dataclass(frozen=True)
class BranchInfo:
    """One path of an agent's cache."""

    tokens: int
    tier: Tier
    last_used: float  # Unix seconds
    unsaved_tokens: int  # that a crash would cost


@dataclass(frozen=True)
class AgentDetail:
    """An agent, and each of its branches."""

    agent: AgentInfo
    branches: list[BranchInfo]  # newest first


@dataclass(frozen=True)
class Explanation:
    """Why a prompt was cached as far as it was; see explain.py for the causes.

    Token ids are of the agent's branch that has most in common with the prompt, and of the prompt.
    """

    cause: Cause
    prompt_tokens: int
    cached_tokens: int
    common_tokens: int  # that the nearest branch has, cached or not
    branch_tokens: int  # all of that branch
    before: list[int]  # the last ids that both have
    branch: list[int]  # what the branch has next
    prompt: list[int]  # what the prompt has next
