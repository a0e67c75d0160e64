"""Tokens/s over HTTP of agents that answer at once, in the paper's three states: cold, warm (on
disk), hot (in RAM).

Each has a prompt of its own. All ask at the same moment: first nothing is cached, then each is
evicted and asked the same again, then at once again. Two figures of each: tokens/s while all of
them stream, from the last agent's first token to the first agent's last one; and those from the
first request to the last token, prefill and restore included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import Settings
from .decode import DecodeRow
from .prompts import Prompts
from .result import Part, Result, Spread, Ttft, spread, ttft
from .server import WARM_UP, Answer, Server, check_state, tokens_per_s
from .session import Session

STATES = ("cold", "warm", "hot")
Rounds = list[list[Answer]]  # of each pass, the answers of all agents


@dataclass(frozen=True)
class Load:
    batches: list[int]  # agents at once
    context: int  # prompt tokens
    answer: int  # tokens


class StateThroughput(Part):
    tokens_per_s: (
        Spread | None
    )  # over all agents while all stream; null where the first ended before the last began
    end_to_end_tokens_per_s: Spread
    ttft: list[Ttft]  # of the agent that answers first, second, ...


class ThroughputRow(Part):
    agents: int
    cold: StateThroughput
    warm: StateThroughput
    hot: StateThroughput


class ThroughputResult(Result):
    benchmark: Literal["throughput"] = "throughput"
    context: int
    answer_tokens: int
    rows: list[ThroughputRow]
    paper: (
        dict[int, float] | None
    )  # by context: two warm agents of the same model on the paper's machine
    in_process: list[DecodeRow] | None


def measure(
    session: Session,
    settings: Settings,
    model: Path,
    prompts: Prompts,
    load: Load,
    passes: int,
    done: Callable[[], None],
) -> list[ThroughputRow]:
    """`done` is told of each of passes x batches x STATES."""
    rounds: dict[int, dict[str, Rounds]] = {
        n: {state: [] for state in STATES} for n in load.batches
    }
    with Server(session, settings, model, session.directory / "throughput") as server:
        server.warm_up(prompts.messages(WARM_UP))
        for _ in range(passes):
            for agents in load.batches:
                _one_pass(server, prompts, agents, load, rounds[agents], done)
            session.cool_down()
    return [
        ThroughputRow(agents=n, **{state: _state(of) for state, of in states.items()})
        for n, states in rounds.items()
    ]


def _one_pass(
    server: Server,
    prompts: Prompts,
    agents: int,
    load: Load,
    rounds: dict[str, Rounds],
    done: Callable[[], None],
) -> None:
    chats = {f"agent-{i}": prompts.messages(load.context) for i in range(agents)}
    for state in STATES:
        if state == "warm":
            for agent in chats:
                server.post(f"/agents/{agent}/evict")
        with server.threads() as pool:
            answers = list(
                pool.map(lambda agent: server.ask(agent, chats[agent], load.answer), chats)
            )
        for answer, messages in zip(answers, chats.values(), strict=True):
            check_state(answer, state)
            prompts.check(messages, answer.prompt_tokens)
        rounds[state].append(answers)
        done()
    for agent in chats:
        server.delete(f"/agents/{agent}")


def _state(rounds: Rounds) -> StateThroughput:
    together = [rate for answers in rounds if (rate := tokens_per_s(answers)) is not None]
    in_order = zip(
        *(sorted(answer.ttft_ms for answer in answers) for answers in rounds), strict=True
    )
    return StateThroughput(
        tokens_per_s=spread(together) if together else None,
        end_to_end_tokens_per_s=spread([end_to_end_tokens_per_s(answers) for answers in rounds]),
        ttft=[ttft(times) for times in in_order],
    )


def end_to_end_tokens_per_s(answers: Sequence[Answer]) -> float:
    took = max(a.began + a.times[-1] for a in answers) - min(a.began for a in answers)
    return float(sum(a.usage["completion_tokens"] for a in answers) / took)
