"""One bit flipped, or the end cut off, in one file of a store: what its agents get.

Nobody may get a wrong token, everybody must get an answer. A few agents talk to an engine, whose
store is then copied once for each of 500 cases (--cases). In each, one random file of one kind, in
turn, is damaged; an engine starts on the copy, and every agent asks its next turn. The engine must
start, or refuse the store in one line; every token must be the likeliest one to a control that
computes from nothing (control.py). A damaged block or tail must be noticed: put aside, and made
again. A damaged export is refused, or its damage is where nothing is (the tar's padding). The model
is a tiny llama of random weights.

    python benchmarks/corruption.py --json benchmarks/results/corruption-tiny.json
"""

import argparse
import dataclasses
import io
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentmem.agent_key import AgentKey
from agentmem.linux_cpu.blas import load_fast_blas

load_fast_blas(Path("~/.agentmem").expanduser())
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from control import LOGIT_BIAS, SAMPLING, Control, Tally  # noqa: E402  (after the BLAS)
from machine import describe_machine, write_result  # noqa: E402

from agentmem.errors import InvalidRequest, StartupError  # noqa: E402
from support.tiny import (  # noqa: E402
    BLOCK,
    EngineThread,
    random_tokens,
    tiny_engine,
    tiny_loader,
    word_ids,
)

AGENTS = ("alice", "bob", "carol")
SHARED = 70  # first tokens, the same for all agents
TURN = 40  # new tokens
ANSWER = 10


@dataclass(frozen=True)
class Kind:
    """A kind of file. `killed`: from a store whose server was killed, else from a stopped one's."""

    name: str
    pattern: str  # of paths in the home
    killed: bool = False
    must_be_noticed: bool = False  # put aside or prefilled again, by whoever has it


EXPORT = "alice.agentmem"
KINDS = (
    Kind("block", "store/*/blocks/*/*.safetensors", must_be_noticed=True),
    Kind("tail", "store/*/tails/*.safetensors", must_be_noticed=True),
    Kind("manifest", "store/*/manifest.sqlite"),
    Kind("manifest-wal", "store/*/manifest.sqlite-wal", killed=True),
    Kind("calibration", "store/*/calibration.safetensors"),
    Kind("export", EXPORT),
)


@dataclass(frozen=True)
class Original:
    """A home to be copied and damaged, and what its agents said."""

    stopped: Path
    killed: Path
    histories: dict[str, list[int]]
    cached: dict[str, int]  # tokens that each agent's next turn finds, undamaged

    def home(self, kind: Kind) -> Path:
        return self.killed if kind.killed else self.stopped


def make_original(directory: Path) -> Original:
    """Ask each agent two turns, each after a restart; the agents share a prefix.

    On an idle disk it takes a second.
    """
    stopped = directory / "stopped"
    killed = directory / "killed"
    histories = {agent: random_tokens(SHARED) for agent in AGENTS}
    for turn in range(2):
        with tiny_engine(stopped) as engine:
            for i, agent in enumerate(AGENTS):
                prompt = histories[agent] + random_tokens(TURN, seed=10 * i + turn)
                histories[agent] = prompt + ask(engine, agent, prompt)[0]
            engine.wait_until_saved()
            if turn == 1:
                (stopped / EXPORT).write_bytes(export(engine, "alice"))
                shutil.copytree(stopped, killed)
    shutil.copytree(stopped, directory / "undamaged")
    with tiny_engine(directory / "undamaged") as engine:
        cached = {agent: ask(engine, agent, next_prompt(histories, agent))[1] for agent in AGENTS}
    return Original(stopped, killed, histories, cached)


def export(engine: EngineThread, agent: str) -> bytes:
    exported = engine.call(engine.engine.archives.export(AgentKey("default", agent)))
    try:
        return b"".join(exported.chunks)
    finally:
        exported.close()


def next_prompt(histories: dict[str, list[int]], agent: str) -> list[int]:
    return histories[agent] + random_tokens(12, seed=100 + AGENTS.index(agent))


def ask(engine: EngineThread, agent: str, prompt: list[int]) -> tuple[list[int], int]:
    """Return the answer's tokens, and how many of the prompt's were cached."""
    text, stats = engine.ask(agent, prompt, ANSWER, seed=None, logit_bias=LOGIT_BIAS, **SAMPLING)
    return word_ids(text), stats.cached_tokens


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file, and say how."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if rng.random() < 0.5:
        bit = rng.randrange(8)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        return f"{path.name}: bit {bit} of byte {at} of {len(data)}"
    path.write_bytes(data[:at])
    return f"{path.name}: {at} of {len(data)} bytes"


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    refused: str | None = None  # what the engine said instead of starting
    quarantined: int = 0
    damaged_rows: int = 0  # of the manifest, dropped
    missed: int = 0  # tokens that would have been cached
    wrong: list[str] = field(default_factory=list)


def after_damage(home: Path, original: Original, control: Control) -> Outcome:
    """Start an engine on a damaged home and ask every agent's next turn.

    Raises what the engine raises.
    """
    try:
        engine = EngineThread(home, tiny_loader())
    except StartupError as e:
        return Outcome(refused=e.message)
    try:
        prompts = {agent: next_prompt(original.histories, agent) for agent in AGENTS}
        answers = {agent: ask(engine, agent, prompt) for agent, prompt in prompts.items()}
        # comes after every quarantine before it
        engine.call(engine.engine.agents.delete(AgentKey("default", "nobody")))
        health = engine.engine.health()
    finally:
        engine.stop()
    wrong = []
    if health["status"] != "ok":
        wrong.append(f"/health: {health['errors']}")
    missed = 0
    for agent, (answer, cached) in answers.items():
        missed += max(0, original.cached[agent] - cached)
        if len(answer) != ANSWER:
            wrong.append(f"{agent}: {len(answer)} tokens")
        elif said := control.check(prompts[agent], answer):
            wrong.append(f"{agent}: {said}")
    return Outcome(
        quarantined=health["store"]["quarantined"],
        damaged_rows=health["store"]["damaged_rows"],
        missed=missed,
        wrong=wrong,
    )


def after_import(home: Path, original: Original, control: Control) -> Outcome:
    """Import a damaged export into an empty store: refused, or as good as the undamaged one."""
    archive = (home / EXPORT).read_bytes()
    prompt = next_prompt(original.histories, "alice")
    with tiny_engine(home / "empty") as engine:
        try:
            engine.call(engine.engine.archives.import_("default", None, io.BytesIO(archive)))
        except InvalidRequest:
            assert engine.core.store.stats()["blocks"] == 0
        answer, cached = ask(engine, "alice", prompt)
    said = control.check(prompt, answer)
    return Outcome(missed=original.cached["alice"] - cached, wrong=[said] if said else [])


@dataclass
class Row:
    """Cases of one kind of file."""

    cases: int = 0
    noticed: int = 0  # put aside, rows dropped, or tokens missed
    quarantined: int = 0
    missed_tokens: int = 0
    refused: int = 0  # the engine did not start


@dataclass
class Result:
    rows: dict[str, Row]
    tally: Tally
    failures: list[str]
    refusals: list[str]  # some
    seconds: float = 0.0


class Cases:
    """Damages copies, one after the other; `result` has what became of them."""

    def __init__(self, directory: Path, *, seed: int = 0, kinds: tuple[Kind, ...] = KINDS):
        self._directory = directory
        self._rng = random.Random(seed)
        self._kinds = kinds
        self._original = make_original(directory)
        self._control = Control(tiny_loader()(), BLOCK)
        self.result = Result({kind.name: Row() for kind in kinds}, self._control.tally, [], [])

    def run(self, cases: int, progress: Callable[[str], None] = lambda text: None) -> Result:
        began = time.monotonic()
        for number in range(cases):
            kind = self._kinds[number % len(self._kinds)]
            self._case(kind)
            if number % 50 == 49:
                took = f"{time.monotonic() - began:.0f} s"
                progress(f"{number + 1} cases, {took}, {len(self.result.failures)} failures")
        self.result.seconds = round(time.monotonic() - began, 1)
        return self.result

    def _case(self, kind: Kind) -> None:
        home = self._directory / "case"
        shutil.copytree(self._original.home(kind), home)
        paths = sorted(home.glob(kind.pattern))
        assert paths, f"the store has no {kind.name}"
        what = f"{kind.name}: {damage(self._rng.choice(paths), self._rng)}"
        # a thread's future keeps whatever is raised, so that one failure does not hide the next
        with ThreadPoolExecutor(1) as pool:
            look = after_import if kind.pattern == EXPORT else after_damage
            future = pool.submit(look, home, self._original, self._control)
        shutil.rmtree(home)
        self.result.failures += [f"{what}: {said}" for said in self._count(kind, what, future)]

    def _count(self, kind: Kind, what: str, future: "Future[Outcome]") -> list[str]:
        """Count a case, and say what was wrong."""
        row = self.result.rows[kind.name]
        row.cases += 1
        if (error := future.exception()) is not None:
            return [f"{type(error).__name__}: {error}"]
        outcome = future.result()
        row.refused += outcome.refused is not None
        row.noticed += bool(outcome.quarantined or outcome.damaged_rows or outcome.missed)
        row.quarantined += outcome.quarantined
        row.missed_tokens += outcome.missed
        if outcome.refused is not None:
            self.result.refusals = [*self.result.refusals, f"{what}: {outcome.refused}"][:10]
            return ["refused in more than one line"] if "\n" in outcome.refused else []
        unnoticed = kind.must_be_noticed and not (outcome.quarantined and outcome.missed)
        return [*outcome.wrong, "not noticed"] if unnoticed else outcome.wrong


def print_table(result: Result) -> None:
    line = "{:14} {:>6} {:>8} {:>10} {:>14} {:>8}"
    print(line.format("kind", "cases", "noticed", "put aside", "tokens missed", "refused"))
    for name, row in result.rows.items():
        put_aside = row.quarantined
        print(line.format(name, row.cases, row.noticed, put_aside, row.missed_tokens, row.refused))
    print(json.dumps(dataclasses.asdict(result.tally)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    logging.disable(logging.ERROR)  # each case has its warning
    with tempfile.TemporaryDirectory() as directory:
        cases = Cases(Path(directory), seed=args.seed)
        result = cases.run(args.cases, lambda text: print(text, file=sys.stderr))
    print_table(result)
    head: dict[str, Any] = {
        "benchmark": "corruption",
        "machine": describe_machine(),
        "model": "tiny llama",
    }
    write_result({**head, "seed": args.seed, **dataclasses.asdict(result)}, args.json)
    for failure in result.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    sys.exit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
