"""The same conversations over HTTP on several servers, in turn: A B, then B A.

A conversation is cold on a server that was just started, goes on, is asked once more after a
restart, and goes on after another one. Then several agents, whose prompts are cached, answer alone
and at once.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from ..cli.show import table
from ..errors import StartupError
from .compare_rows import (
    STATES,
    CompareResult,
    CompareSamples,
    CompareState,
    cache_row,
    decode_rows,
    fp16_bytes,
    rows,
)
from .harness.contenders import AGENTMEM, MLX_LM, Contender, ContenderFactory, check_names
from .harness.corpus import Prompts
from .harness.options import BenchRun, Passes, Shared, Shown, benchmark, numbers
from .harness.server import BenchError, ChatMessages, TimedAnswer, shares, tokens_per_s

ANSWER = 16  # tokens, of a turn
QUESTION = 24
ROUNDS = 4  # of decoding, a pass: even, so that each server is first as often as the other
_SHARED = 4  # tokens that any two prompts may have in common, such as <s>
# agentmem's
_TIERS = {"cold": "cold", "second_turn": "hot", "after_restart": "warm", "resumed": "warm"}

Speeds = dict[tuple[str, int, int], list[float]]  # tokens/s by server, context and batch
Told = Callable[[str], None]  # of each step, with what it was


@dataclass(frozen=True)
class Workload:
    contexts: list[int]  # tokens of a conversation's first prompt
    batches: list[int]
    decode_contexts: list[int]  # of the agents that answer at once
    answer_tokens: int  # of decoding
    passes: int

    @property
    def most_tokens(self) -> int:
        """Tokens of one conversation, with room for what templates add to a turn."""
        talk = self.contexts[-1] + 3 * ANSWER + 2 * (QUESTION + 32)
        return max(talk, self.decode_contexts[-1] + self.answer_tokens)

    @property
    def agents(self) -> int:
        """Agents that are held at once: those that decode, and the last conversation's."""
        return len(self.decode_contexts) * self.batches[-1] + 1

    @property
    def steps(self) -> int:
        """How often `converse` and `decode` tell of each contender."""
        rounds = ROUNDS * len(self.decode_contexts) * len(self.batches)
        return self.passes * (rounds + len(STATES) * len(self.contexts))


@dataclass
class Talk:
    """A conversation as one server holds it: answers may differ."""

    agent: str
    messages: ChatMessages


def in_turn(contenders: Sequence[Contender], number: int) -> list[Contender]:
    return list(contenders) if number % 2 == 0 else list(reversed(contenders))


def converse(
    contenders: Sequence[Contender],
    prompts: Prompts,
    context: int,
    samples: dict[str, CompareSamples],
    *,
    number: int,
    done: Told,
) -> str:
    """Hold one conversation with each server in each state. Returns its agent's name.

    `done` is told of each of contenders x STATES.
    """
    agent = f"agent-{number}-{context}"
    first = prompts.messages(context)
    questions = [prompts.text(QUESTION) for _ in range(2)]
    talks = {c.name: Talk(agent, list(first)) for c in contenders}
    for state in STATES:
        again = state in ("after_restart", "resumed")
        if state != "second_turn":
            restart(contenders, prompts)
        question = questions.pop(0) if state in ("second_turn", "resumed") else None
        for contender in in_turn(contenders, number):
            if contender.start or not again:
                talk = talks[contender.name]
                of = samples[contender.name].answers
                if question:
                    before = of["after_restart" if again else "cold"][-1].text
                    talk.messages.append({"role": "assistant", "content": before})
                    talk.messages.append({"role": "user", "content": question})
                of[state].append(_turn(contender, talk, prompts, state))
            done(f"{context:,} tokens, {state.replace('_', ' ')}")
    return agent


def restart(contenders: Sequence[Contender], prompts: Prompts) -> None:
    text = prompts.text(64)
    for contender in contenders:
        contender.restart()
        contender.warm_up(text)


def _turn(contender: Contender, talk: Talk, prompts: Prompts, state: CompareState) -> TimedAnswer:
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
    contender: Contender, prompts: Prompts, messages: ChatMessages, answer: TimedAnswer
) -> None:
    """Raise BenchError where a server counts other tokens than the tokenizer.

    Counts are exact for a prompt, for the same model; an answer's tokens may be others when they
    are read back.
    """
    if len(messages) == 1 and contender.name in (AGENTMEM, MLX_LM):
        prompts.check(messages, answer.prompt_tokens)
        return
    count = prompts.count(messages)
    if abs(answer.prompt_tokens - count) > ANSWER:
        raise BenchError(
            f"{contender.name} counts {answer.prompt_tokens} prompt tokens, the tokenizer {count}"
        )


def decode(contenders: Sequence[Contender], prompts: Prompts, work: Workload, done: Told) -> Speeds:
    """Measure the tokens/s of agents whose prompts are cached. `done`: of each, in each round."""
    asked: dict[int, list[tuple[str, ChatMessages]]] = {}
    for n in work.decode_contexts:
        agents = range(work.batches[-1])
        asked[n] = [(f"decode-{n}-{i}", prompts.messages(n)) for i in agents]
    for contender in contenders:
        for agent, messages in itertools.chain(*asked.values()):
            contender.ask(agent, messages, 4)  # of one token alone, a server may hold back the text
    cells = list(itertools.product(work.decode_contexts, work.batches))
    speeds: Speeds = {}
    for n, batch in cells:
        for contender in contenders:
            speeds[contender.name, n, batch] = []
    for number in range(ROUNDS * work.passes):
        for n, batch in cells:
            for contender in in_turn(contenders, number):
                rate = _at_once(contender, asked[n][:batch], work.answer_tokens)
                speeds[contender.name, n, batch].append(rate)
                done(f"decode, {batch} at once over {n:,} tokens each")
    return speeds


def _at_once(contender: Contender, asked: Sequence[tuple[str, ChatMessages]], tokens: int) -> float:
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda of: contender.ask(of[0], of[1], tokens), asked))
    all_hot = all(answer.details.get("cache") == "hot" for answer in answers)
    if contender.name == AGENTMEM and not all_hot:
        raise BenchError("a prompt of agentmem's was not in memory")
    return rate_side_by_side(answers)


def rate_side_by_side(answers: Sequence[TimedAnswer]) -> float:
    """Return the tokens/s of all together.

    Raises BenchError where less than half of an answer streamed beside all others.
    """
    parts, _ = shares(answers)
    least = min(parts)
    if least < 0.5:
        raise BenchError(
            f"only {least:.0%} of an answer streamed beside all others: "
            "ask for longer ones, or fewer at once"
        )
    rate = tokens_per_s(answers)
    assert rate is not None
    return rate


def measure(
    run: BenchRun, factory: ContenderFactory, names: list[str], work: Workload
) -> CompareResult:
    task = run.progress.add_task("preparing", total=len(names) * work.steps)

    def done(what: str) -> None:
        run.progress.update(task, advance=1, description=what)

    prompts = run.prompts
    contenders = factory.contenders(names)
    samples: dict[int, dict[str, CompareSamples]] = {}
    for n in work.contexts:
        samples[n] = {contender.name: CompareSamples() for contender in contenders}
    cache = []
    for number in range(work.passes):
        for n in work.contexts:
            agent = converse(contenders, prompts, n, samples[n], number=number, done=done)
            if number == 0:
                for contender in contenders:
                    row = cache_row(
                        contender,
                        n,
                        agent,
                        model=run.model,
                        block_size=run.settings.block_size,
                    )
                    cache.append(row)
        run.session.cool_down()
    speeds = decode(contenders, prompts, work, done)
    for contender in contenders:
        contender.stop()
    return CompareResult(
        servers=[contender.about for contender in contenders],
        rows=rows(samples),
        decode=decode_rows(speeds),
        fp16_bytes_per_token=fp16_bytes(run.model),
        cache=cache,
        **run.head(work.passes),
    )


Cells = dict[str, float | None]  # by server


@dataclass(frozen=True)
class _TableLine:
    label: str  # the measure's name
    cells: Cells
    over: Cells  # agentmem's over it


def tables(result: CompareResult) -> list[Shown]:
    names = [about.name for about in result.servers]
    others = [name for name in names if name != AGENTMEM] if AGENTMEM in names else []
    shown: list[Shown] = [f"{result.model}, medians of {result.passes} passes"]
    lines = table("", *names, *[f"agentmem/{name}" for name in others])
    for line in _lines(result):
        cells = [_number(line.cells.get(name)) for name in names]
        ratios = [_ratio(line.over.get(name)) for name in others]
        lines.add_row(line.label, *cells, *ratios)
    shown.append(lines)
    for about in result.servers:
        notes = (about.what, about.version, f"weights {about.weights}", about.preparation)
        shown.append(f"{about.name}: {'; '.join(note for note in notes if note)}")
    return shown


def _lines(result: CompareResult) -> Iterator[_TableLine]:
    yield from _ttft_lines(result)
    yield from _decode_lines(result)
    yield from _cache_lines(result)


def _ttft_lines(result: CompareResult) -> Iterator[_TableLine]:
    for context, group in groupby(result.rows, lambda row: row.context):
        of_context = list(group)
        for state in STATES:
            cells: Cells = {}
            over: Cells = {}
            for row in of_context:
                cell = getattr(row, state)
                pairs = (row.agentmem_over or {}).get(state)
                cells[row.server] = cell.ttft_ms if cell else None
                over[row.server] = pairs.median if pairs else None
            label = f"{state.replace('_', ' ')}, {context:,} tokens, ms to the first token"
            yield _TableLine(label, cells, over)


def _decode_lines(result: CompareResult) -> Iterator[_TableLine]:
    for (context, batch), group in groupby(result.decode, lambda row: (row.context, row.batch)):
        cells: Cells = {}
        over: Cells = {}
        for row in group:
            cells[row.server] = row.tokens_per_s.median
            over[row.server] = row.agentmem_over.median if row.agentmem_over else None
        label = f"decode, {batch} at once over {context:,} tokens each, tokens/s"
        yield _TableLine(label, cells, over)


def _cache_lines(result: CompareResult) -> Iterator[_TableLine]:
    for context, group in groupby(result.cache, lambda row: row.context):
        whole: Cells = {}
        sealed: Cells = {}
        for row in group:
            whole[row.server] = row.bytes_per_token
            sealed[row.server] = row.sealed_bytes_per_token or row.bytes_per_token
        label = f"cache, {context:,} tokens and three turns, bytes a token"
        yield _TableLine(label, whole, _over(whole))
        label = f"cache, {context:,} tokens, whole blocks alone, bytes a token"
        yield _TableLine(label, sealed, _over(sealed))
    if result.fp16_bytes_per_token:
        nbytes = float(result.fp16_bytes_per_token)
        yield _TableLine("(in 16 bits)", {row.server: nbytes for row in result.cache}, {})


def _over(cells: Cells) -> Cells:
    ours = cells.get(AGENTMEM)
    return {name: ours / theirs if ours and theirs else None for name, theirs in cells.items()}


def _number(value: float | None) -> str:
    if value is None:
        return "--"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "--" if value is None else f"{value:.3f}x"


Servers = Annotated[
    list[str] | None,
    typer.Argument(
        help="agentmem, mlx-lm, llama.cpp, NAME=http://host:port/v1 (default: agentmem mlx-lm)"
    ),
]
Contexts = Annotated[
    str, typer.Option(help="lengths of a conversation's first prompt in tokens, comma-separated")
]
Batches = Annotated[str, typer.Option(help="agents that answer at once, comma-separated")]
DecodeContexts = Annotated[
    str, typer.Option(help="tokens of each of these agents' prompts, comma-separated")
]
AnswerTokens = Annotated[int, typer.Option(min=8, help="tokens of each of their answers")]
Gguf = Annotated[
    Path | None,
    typer.Option(help="model file for llama-server, which has to be on the PATH"),
]


@benchmark(tables)
def compare(
    shared: Shared,
    servers: Servers = None,
    contexts: Contexts = "256,1000",
    batches: Batches = "1,4",
    decode_contexts: DecodeContexts = "300,1000",
    answer_tokens: AnswerTokens = 48,
    passes: Passes = 3,
    gguf: Gguf = None,
) -> CompareResult:
    """The same conversations on several servers, in turn: time to first token, decode speed, bytes
    of cache.

    agentmem, mlx-lm (mlx_lm.server of this environment) and llama.cpp are started, and restarted in
    between; others run already. On a CPU agentmem and mlx-lm load one float32 copy of the model and
    the same BLAS. States: cold; second_turn (an answer and a question on top); after_restart (the
    same request again, to a server that was stopped and started); resumed (so again, and a third
    turn).

    JSON: {"servers", "rows": [{"server", "context", "cold": {"ttft_ms"}, "second_turn",
    "after_restart", "resumed", "agentmem_over", ...}], "decode": [{"server", "batch", "context",
    "tokens_per_s", "agentmem_over"}], "cache": [{"server", ...}]}.
    """
    names = servers or [AGENTMEM, MLX_LM]
    work = Workload(
        contexts=numbers(contexts, "--contexts"),
        batches=numbers(batches, "--batches"),
        decode_contexts=numbers(decode_contexts, "--decode-contexts", least=32),
        answer_tokens=answer_tokens,
        passes=passes,
    )
    with shared.run() as run:
        check_names(names, gguf)
        if work.most_tokens > run.max_context:
            raise StartupError(
                f"that takes {work.most_tokens} tokens; the model's context holds {run.max_context}"
            )
        factory = ContenderFactory(run, gguf, tokens=work.most_tokens, agents=work.agents)
        return measure(run, factory, names, work)
