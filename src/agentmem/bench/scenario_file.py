"""A scenario in YAML: who takes part, what is said to whom, and what an answer must be like.

    description: one line
    compare: [persistent, restart, cold]    # what scenario.py calls modes; default: the first two
    agents:
      - name: warden
        system: what it is told once, before all else
        # one of these, optional, follows in the system message: text; so many tokens of --corpus;
        # a file beside this one
        document: text | corpus: 4000 | file: case.txt
    phases:
      - name: interrogation
        restart: true                       # of the server, before this phase; default: false
        # an earlier phase to compare the time to first token with; optional
        faster_than: prime
        turns:
          - {agent: warden, message: text, max_tokens: 32, hear: [marco], since: phase}
    # of answers; each has one or more of these, for all phases or some
    checks:
      - {phases: [interrogation], min_chars: 20, distinct_4grams: 0.5, differ: true,
         mentions: document}

`hear` puts before the message what those agents answered since the phase began (`since: start`:
since the beginning) and this one wasn't told yet.
"""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import StartupError

Mode = Literal["persistent", "restart", "cold"]
Name = Annotated[str, Field(min_length=1, max_length=64)]
YamlPath = tuple[int | str, ...]  # ("phases", 0, "name")
Fault = tuple[YamlPath, str]  # where, and what is wrong


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScenarioAgent(_Model):
    name: Name
    system: str = Field(min_length=1)
    document: str | None = None
    corpus: int | None = Field(None, ge=16)
    file: Path | None = None

    @property
    def has_document(self) -> bool:
        return self.num_documents > 0

    @property
    def num_documents(self) -> int:
        return sum(one is not None for one in (self.document, self.corpus, self.file))


class ScenarioTurn(_Model):
    agent: str
    message: str = Field(min_length=1)
    max_tokens: int = Field(48, ge=1)
    hear: list[str] = []
    since: Literal["phase", "start"] = "phase"


class ScenarioPhase(_Model):
    name: Name
    restart: bool = False
    faster_than: str | None = None
    turns: list[ScenarioTurn] = Field(min_length=1)


class ScenarioCheck(_Model):
    phases: list[str] | None = None  # all
    min_chars: int | None = Field(None, ge=1)
    # at least this share of sequences of four words
    distinct_4grams: float | None = Field(None, gt=0, le=1)
    differ: bool = False  # no two agents' answers of a phase are the same
    # a word of it that no other agent's has; or one of these
    mentions: Literal["document"] | list[str] | None = None


class Scenario(_Model):
    description: str = ""
    compare: list[Mode] = Field(["persistent", "restart"], min_length=1)
    agents: list[ScenarioAgent] = Field(min_length=1)
    phases: list[ScenarioPhase] = Field(min_length=1)
    checks: list[ScenarioCheck] = [ScenarioCheck(min_chars=1, distinct_4grams=0.5)]

    @property
    def num_turns(self) -> int:
        return sum(len(phase.turns) for phase in self.phases)


def built_in() -> list[str]:
    return sorted(
        f.name.removesuffix(".yaml") for f in _directory().iterdir() if f.name.endswith(".yaml")
    )


def _directory() -> Any:
    return files(__package__) / "scenarios"


def read_scenario(name: str) -> tuple[Scenario, Path]:
    """Read a built-in one by its name, or a file. Returns it and the directory of its files.

    Raises StartupError, which names the line and the field.
    """
    path = Path(name)
    if name in built_in():
        file = _directory().joinpath(f"{name}.yaml")
        return parse(file.read_text(encoding="utf-8"), name), Path()
    try:
        return parse(path.read_text(encoding="utf-8"), name), path.parent
    except OSError as e:
        raise StartupError(
            f"{name}: {e.strerror}; there are {', '.join(built_in())}, or give a YAML file"
        ) from None
    except UnicodeDecodeError as e:
        raise StartupError(f"{name}: not UTF-8 text: {e}") from None


def parse(text: str, name: str) -> Scenario:
    """Make a scenario of YAML text, which errors call `name`. Raises StartupError."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        data = loader.construct_document(root) if root else None
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise StartupError(f"{name}, line {line}: not YAML: {e.problem}") from None
    except (yaml.YAMLError, RecursionError) as e:
        raise StartupError(f"{name}: not YAML: {' '.join(str(e).split())}") from None
    except (ValueError, AttributeError) as e:  # of the constructors of dates and numbers
        raise StartupError(
            f"{name}: {e}: text that looks like a date or a number needs quotes"
        ) from None
    if not isinstance(data, dict):
        raise StartupError(f"{name}, line 1: must begin with a mapping: agents, phases")
    try:
        scenario = Scenario.model_validate(data)
    except ValidationError as e:
        faults = [(error["loc"], error["msg"]) for error in e.errors()]
    else:
        faults = list(_faults(scenario))
    if faults:
        said = [f"{name}, line {_line(root, at)}: {_field(at)}: {why}" for at, why in faults]
        raise StartupError("; ".join(said))
    return scenario


def _faults(scenario: Scenario) -> Iterator[Fault]:
    """Find names that stand for nothing, or for two things."""
    agents = [agent.name for agent in scenario.agents]
    phases = [phase.name for phase in scenario.phases]
    for kind, names in (("agents", agents), ("phases", phases), ("compare", scenario.compare)):
        for i in range(len(names)):
            if names[i] in names[:i]:
                yield (kind, i), f"{names[i]!r} is there twice"
    for i, agent in enumerate(scenario.agents):
        if agent.num_documents > 1:
            yield ("agents", i), "give one of document, corpus and file"
    for i, phase in enumerate(scenario.phases):
        if phase.faster_than is not None and phase.faster_than not in phases[:i]:
            yield ("phases", i, "faster_than"), f"{phase.faster_than!r} is no earlier phase"
        for j, turn in enumerate(phase.turns):
            named = [("agent", turn.agent)]
            named += [("hear", other) for other in turn.hear]
            for at, who in named:
                if who not in agents:
                    yield ("phases", i, "turns", j, at), f"{who!r} is none of the agents"
    yield from _faults_of_checks(scenario)


def _faults_of_checks(scenario: Scenario) -> Iterator[Fault]:
    phases = [phase.name for phase in scenario.phases]
    without = {agent.name for agent in scenario.agents if not agent.has_document}
    for i, check in enumerate(scenario.checks):
        checked = check.phases or phases
        for name in checked:
            if name not in phases:
                yield ("checks", i, "phases"), f"{name!r} is none of the phases"
        asked: set[str] = set()
        for phase in scenario.phases:
            if phase.name in checked:
                asked |= {turn.agent for turn in phase.turns}
        if check.mentions == "document" and asked & without:
            names = ", ".join(sorted(asked & without))
            yield ("checks", i, "mentions"), f"{names} has no document"


def _line(node: yaml.Node, place: YamlPath) -> int:
    """Return the line where it is written, or that of what it would be in.

    Steps that the file doesn't have (names of types) are skipped.
    """
    line = node.start_mark.line
    for step in place:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == step:
                    node = value
                    line = key.start_mark.line
    return int(line) + 1


def _field(place: YamlPath) -> str:
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in place]
    return "".join(steps).lstrip(".")
