"""A scenario in YAML: who takes part, what is said to whom in which phase, and what an answer must
be like.

    description: one line
    compare: [persistent, restart, cold]        # what bench/scenario.py calls modes; default: the first two
    agents:
      - name: warden
        system: what it is told once, before all else
        document: text | corpus: 4000 | file: case.txt    # one of them, optional: follows in the system message;
                                                          # tokens of --corpus; a file beside this one
    phases:
      - name: interrogation
        restart: true                           # of the server, before this phase; default: false
        faster_than: prime                      # an earlier phase to compare the time to first token with; optional
        turns:
          - {agent: warden, message: text, max_tokens: 32, hear: [marco], since: phase}
    checks:                                     # of answers; each has one or more of these, for all phases or some
      - {phases: [interrogation], min_chars: 20, distinct_4grams: 0.5, differ: true, mentions: document}

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
Place = tuple[int | str, ...]  # ("phases", 0, "name")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Agent(_Model):
    name: Name
    system: str = Field(min_length=1)
    document: str | None = None
    corpus: int | None = Field(None, ge=16)
    file: Path | None = None

    @property
    def has_document(self) -> bool:
        return (self.document, self.corpus, self.file) != (None,) * 3


class Turn(_Model):
    agent: str
    message: str = Field(min_length=1)
    max_tokens: int = Field(48, ge=1)
    hear: list[str] = []
    since: Literal["phase", "start"] = "phase"


class Phase(_Model):
    name: Name
    restart: bool = False
    faster_than: str | None = None
    turns: list[Turn] = Field(min_length=1)


class Check(_Model):
    phases: list[str] | None = None  # all
    min_chars: int | None = Field(None, ge=1)
    distinct_4grams: float | None = Field(
        None, gt=0, le=1
    )  # at least this share of sequences of four words
    differ: bool = False  # no two agents' answers of a phase are the same
    # a word of it that no other agent's has; or one of these
    mentions: Literal["document"] | list[str] | None = None


class Scenario(_Model):
    description: str = ""
    compare: list[Mode] = Field(["persistent", "restart"], min_length=1)
    agents: list[Agent] = Field(min_length=1)
    phases: list[Phase] = Field(min_length=1)
    checks: list[Check] = [Check(min_chars=1, distinct_4grams=0.5)]

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
    """Of a built-in one's name or a path; and the directory that its files are in.

    Raises StartupError, which names the line and the field.
    """
    path = Path(name)
    if name in built_in():
        return parse(
            _directory().joinpath(f"{name}.yaml").read_text(encoding="utf-8"), name
        ), Path()
    try:
        return parse(path.read_text(encoding="utf-8"), name), path.parent
    except OSError as e:
        raise StartupError(
            f"{name}: {e.strerror}; there are {', '.join(built_in())}, or give a YAML file"
        ) from None
    except UnicodeDecodeError as e:
        raise StartupError(f"{name}: not UTF-8 text: {e}") from None


def parse(text: str, name: str) -> Scenario:
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
        raise StartupError(
            "; ".join(f"{name}, line {_line(root, at)}: {_field(at)}: {why}" for at, why in faults)
        )
    return scenario


def _faults(scenario: Scenario) -> Iterator[tuple[Place, str]]:
    """Names that stand for nothing, or for two things."""
    agents = [agent.name for agent in scenario.agents]
    phases = [phase.name for phase in scenario.phases]
    for kind, names in (("agents", agents), ("phases", phases), ("compare", scenario.compare)):
        for i in range(len(names)):
            if names[i] in names[:i]:
                yield (kind, i), f"{names[i]!r} is there twice"
    for i, agent in enumerate(scenario.agents):
        if sum(one is not None for one in (agent.document, agent.corpus, agent.file)) > 1:
            yield ("agents", i), "give one of document, corpus and file"
    for i, phase in enumerate(scenario.phases):
        if phase.faster_than is not None and phase.faster_than not in phases[:i]:
            yield ("phases", i, "faster_than"), f"{phase.faster_than!r} is no earlier phase"
        for j, turn in enumerate(phase.turns):
            for at, who in (("agent", turn.agent), *(("hear", other) for other in turn.hear)):
                if who not in agents:
                    yield ("phases", i, "turns", j, at), f"{who!r} is none of the agents"
    without = {agent.name for agent in scenario.agents if not agent.has_document}
    for i, check in enumerate(scenario.checks):
        for name in check.phases or ():
            if name not in phases:
                yield ("checks", i, "phases"), f"{name!r} is none of the phases"
        asked = {
            t.agent
            for phase in scenario.phases
            if phase.name in (check.phases or phases)
            for t in phase.turns
        }
        if check.mentions == "document" and asked & without:
            yield ("checks", i, "mentions"), f"{', '.join(sorted(asked & without))} has no document"


def _line(node: yaml.Node, place: Place) -> int:
    """Where it is written, or what it would be in; steps that the file doesn't have (names of
    types) are skipped.
    """
    line = node.start_mark.line
    for step in place:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == step:
                    node, line = value, key.start_mark.line
    return int(line) + 1


def _field(place: Place) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(
        "."
    )
