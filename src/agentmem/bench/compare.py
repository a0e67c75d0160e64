"""The same conversations over HTTP on several servers, in turn: A B, then B A.

A conversation is cold on a server that was just started, goes on, is asked once more after a
restart, and goes on after another one. Then several agents, whose prompts are cached, answer alone
and at once.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from .contenders import AGENTMEM, MLX_LM, About, Contender
from .prompts import Prompts
from .result import Part, Result, Spread, Ttft
from .server import Answer, BenchError, Messages, shares, tokens_per_s

State = Literal["cold", "second_turn", "after_restart", "resumed"]
STATES: tuple[State, ...] = ("cold", "second_turn", "after_restart", "resumed")
ANSWER = 16  # tokens, of a turn
QUESTION = 24
ROUNDS = 4  # of decoding, a pass: even, so that each server is first as often as the other
_SHARED = 4  # tokens that any two prompts may have in common, such as <s>
_TIERS = {
    "cold": "cold",
    "second_turn": "hot",
    "after_restart": "warm",
    "resumed": "warm",
}  # agentmem's


class CompareRow(Part):
    server: str
    context: int  # tokens asked for
    cold: Ttft
    second_turn: Ttft  # its answer and a new question on top
    after_restart: (
        Ttft | None
    )  # the second turn once more; null for a server that was not started here
    resumed: Ttft | None  # restarted again, and a third turn on top
    prompt_tokens: dict[State, list[int]]  # by state, as the server counts
    cached_tokens: dict[State, list[int]]  # of these, as the server says
    agentmem_over: (
        dict[State, Spread] | None
    )  # by state: agentmem's ttft_ms over this server's, of each pass


class DecodeRow(Part):
    server: str
    batch: int
    context: int  # tokens asked for
    tokens_per_s: Spread  # of all together, by round
    agentmem_over: (
        Spread | None
    )  # by round: agentmem's tokens/s over this server's, right before or after


class CacheRow(Part):
    """Bytes a token of a conversation in memory; null where a server does not tell."""

    server: str
    context: int
    bytes_per_token: float | None
    sealed_bytes_per_token: (
        float | None
    )  # agentmem: of its whole blocks, less the unfinished one in full precision
    over_fp16: float | None  # of sealed ones where there are any
    source: str


class CompareResult(Result):
    benchmark: Literal["compare"] = "compare"
    servers: list[About]
    rows: list[CompareRow]
    decode: list[DecodeRow]
    fp16_bytes_per_token: (
        int | None
    )  # of the model's keys and values; null where their layout is not known
    cache: list[CacheRow]


@dataclass(frozen=True)
class Workload:
    contexts: list[int]  # tokens of a conversation's first prompt
    batches: list[int]
    decode_contexts: list[int]  # of the agents that answer at once
    answer_tokens: int  # of decoding
    passes: int

    @property
    def most_tokens(self) -> int:
        """Of one conversation, with room for what templates add to a turn."""
        talk = self.contexts[-1] + 3 * ANSWER + 2 * (QUESTION + 32)
        return max(talk, self.decode_contexts[-1] + self.answer_tokens)

    @property
    def agents(self) -> int:
        """Held at once: those that decode, and the last conversation's."""
        return len(self.decode_contexts) * self.batches[-1] + 1

    @property
    def steps(self) -> int:
        """What `converse` and `decode` tell of, for each contender."""
        rounds = ROUNDS * len(self.decode_contexts) * len(self.batches)
        return self.passes * (rounds + len(STATES) * len(self.contexts))


@dataclass
class Samples:
    """Of one server and context."""

    answers: dict[State, list[Answer]] = field(
        default_factory=lambda: {state: [] for state in STATES}
    )


@dataclass
class Talk:
    """A conversation as one server holds it: answers may differ."""

    agent: str
    messages: Messages


def in_turn(contenders: Sequence[Contender], number: int) -> list[Contender]:
    return list(contenders) if number % 2 == 0 else list(reversed(contenders))


def converse(
    contenders: Sequence[Contender],
    prompts: Prompts,
    context: int,
    samples: dict[str, Samples],
    done: Callable[[str], None],
    number: int,
) -> str:
    """One conversation, by each server in each state. Returns its agent's name.

    `done` is told of each of contenders x STATES.
    """
    first = prompts.messages(context)
    questions = [prompts.text(QUESTION) for _ in range(2)]
    talks = {c.name: Talk(f"agent-{number}-{context}", list(first)) for c in contenders}
    for state in STATES:
        again = state in ("after_restart", "resumed")
        if state != "second_turn":
            restart(contenders, prompts)
        question = questions.pop(0) if state in ("second_turn", "resumed") else None
        for contender in in_turn(contenders, number):
            if contender.start or not again:
                talk, of = talks[contender.name], samples[contender.name].answers
                if question:
                    before = of["after_restart" if again else "cold"][-1].text
                    talk.messages += [
                        {"role": "assistant", "content": before},
                        {"role": "user", "content": question},
                    ]
                of[state].append(_turn(contender, talk, prompts, state))
            done(f"{context:,} tokens, {state.replace('_', ' ')}")
    return f"agent-{number}-{context}"


def restart(contenders: Sequence[Contender], prompts: Prompts) -> None:
    text = prompts.text(64)
    for contender in contenders:
        contender.restart()
        contender.warm_up(text)


def _turn(contender: Contender, talk: Talk, prompts: Prompts, state: State) -> Answer:
    answer = contender.ask(talk.agent, talk.messages, ANSWER)
    _check_count(contender, prompts, talk.messages, answer)
    if contender.name == AGENTMEM and answer.details["cache"] != _TIERS[state]:
        raise BenchError(
            f"{state}: agentmem's cache was {answer.details['cache']}, not {_TIERS[state]}"
        )
    if contender.start and state == "cold" and answer.cached_tokens > _SHARED:
        raise BenchError(
            f"{contender.name} had {answer.cached_tokens} tokens of a new prompt cached"
        )
    return answer


def _check_count(
    contender: Contender, prompts: Prompts, messages: Messages, answer: Answer
) -> None:
    """Exact for a prompt, for the same model; an answer's tokens may be others when they are read
    back.
    """
    if len(messages) == 1 and contender.name in (AGENTMEM, MLX_LM):
        prompts.check(messages, answer.prompt_tokens)
    elif abs(answer.prompt_tokens - (count := prompts.count(messages))) > ANSWER:
        raise BenchError(
            f"{contender.name} counts {answer.prompt_tokens} prompt tokens, the tokenizer {count}"
        )


def decode(
    contenders: Sequence[Contender], prompts: Prompts, work: Workload, done: Callable[[str], None]
) -> dict[tuple[str, int, int], list[float]]:
    """Tokens/s by server, context and batch, of agents whose prompts are cached. `done`: of each,
    in each round.
    """
    asked = {
        n: [(f"decode-{n}-{i}", prompts.messages(n)) for i in range(work.batches[-1])]
        for n in work.decode_contexts
    }
    for contender, (agent, messages) in itertools.product(
        contenders, itertools.chain(*asked.values())
    ):
        contender.ask(agent, messages, 4)  # of one token alone, a server may hold back the text
    cells = list(itertools.product(work.decode_contexts, work.batches))
    speeds: dict[tuple[str, int, int], list[float]] = {
        (c.name, *cell): [] for cell in cells for c in contenders
    }
    for number, (n, batch) in itertools.product(range(ROUNDS * work.passes), cells):
        for contender in in_turn(contenders, number):
            speeds[contender.name, n, batch].append(
                _at_once(contender, asked[n][:batch], work.answer_tokens)
            )
            done(f"decode, {batch} at once over {n:,} tokens each")
    return speeds


def _at_once(contender: Contender, asked: Sequence[tuple[str, Messages]], tokens: int) -> float:
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda of: contender.ask(of[0], of[1], tokens), asked))
    if contender.name == AGENTMEM and any(answer.details["cache"] != "hot" for answer in answers):
        raise BenchError("a prompt of agentmem's was not in memory")
    return rate_side_by_side(answers)


def rate_side_by_side(answers: Sequence[Answer]) -> float:
    """Tokens/s of all together. Raises BenchError where less than half of an answer streamed beside
    all others.
    """
    if (least := min(shares(answers)[0])) < 0.5:
        raise BenchError(
            f"only {least:.0%} of an answer streamed beside all others: ask for longer ones, or fewer at once"
        )
    rate = tokens_per_s(answers)
    assert rate is not None
    return rate
