"""What an answer must be like, judged by its form alone: no model judges another."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from .harness.result import ResultPart
from .scenario_file import Scenario, ScenarioCheck


class CheckRow(ResultPart):
    """One check of one mode's answers."""

    check: str
    mode: str
    passed: int
    of: int
    failed: list[str]  # turns: "query, 3: expert 4", "query, 3: expert 4, pass 2"


class Said(ResultPart):
    """One answer."""

    run: int  # number of the pass, from 0
    mode: str
    phase: str
    turn: int  # of the phase, from 1
    agent: str
    answer: str

    @property
    def where(self) -> str:
        where = f"{self.phase}, {self.turn}: {self.agent}"
        return f"{where}, pass {self.run + 1}" if self.run else where


def judge(scenario: Scenario, documents: Mapping[str, str], said: Sequence[Said]) -> list[CheckRow]:
    """Judge the answers of each mode. `said` is in the order of runs and modes.

    `documents` are by agent.
    """
    rows = []
    for check in scenario.checks:
        within = f" ({', '.join(check.phases)})" if check.phases else ""
        for mode in dict.fromkeys(one.mode for one in said):
            these = [one for one in said if one.mode == mode]
            if check.phases:
                these = [one for one in these if one.phase in check.phases]
            for name, good in _conditions(check, documents, these):
                failed = [one.where for one in these if not good(one)]
                row = CheckRow(
                    check=name + within,
                    mode=mode,
                    passed=len(these) - len(failed),
                    of=len(these),
                    failed=failed,
                )
                rows.append(row)
    return rows


def _conditions(
    check: ScenarioCheck, documents: Mapping[str, str], said: Sequence[Said]
) -> Iterator[tuple[str, Callable[[Said], bool]]]:
    if check.min_chars is not None:
        least = check.min_chars
        yield f"at least {least} characters", lambda one: len(one.answer.strip()) >= least
    if check.distinct_4grams is not None:
        share = check.distinct_4grams
        yield (
            f"distinct 4-grams at least {share:g}",
            lambda one: distinct_ngrams(one.answer) >= share,
        )
    if check.differ:
        twice = _said_twice(said)
        yield "differs from the other agents' answers", lambda one: _heard(one) not in twice
    if check.mentions == "document":
        own = own_words(documents)
        yield "a word of its document alone", lambda one: bool(_words(one.answer) & own[one.agent])
    elif check.mentions:
        any_of = {word.lower() for word in check.mentions}
        mentions = f"mentions {', '.join(check.mentions)}"
        yield mentions, lambda one: any(word in one.answer.lower() for word in any_of)


def distinct_ngrams(text: str, n: int = 4) -> float:
    """Return the share of sequences of `n` words that are no repetition; 1 where there are none."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def own_words(documents: Mapping[str, str]) -> dict[str, set[str]]:
    """Return, by agent, the words that no other one's document has."""
    words = {agent: _words(text) for agent, text in documents.items()}
    own = {}
    for agent, mine in words.items():
        others = [theirs for name, theirs in words.items() if name != agent]
        own[agent] = mine.difference(*others)
    return own


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{3,}", text.lower()))


def _said_twice(said: Sequence[Said]) -> set[tuple[int, str, str]]:
    """Return answers that two agents gave in the same phase of a run."""
    agents: dict[tuple[int, str, str], set[str]] = defaultdict(set)
    for one in said:
        agents[_heard(one)].add(one.agent)
    return {heard for heard, by in agents.items() if len(by) > 1}


def _heard(one: Said) -> tuple[int, str, str]:
    return one.run, one.phase, one.answer
