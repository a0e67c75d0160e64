"""What an answer must be like, judged by its form alone: no model judges another."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

from .result import Part
from .scenario_file import Check, Scenario


class CheckRow(Part):
    """Of one mode's answers."""

    check: str
    mode: str
    passed: int
    of: int
    failed: list[str]  # turns: "query, 3: expert 4", "query, 3: expert 4, pass 2"


class Said(Part):
    """One answer."""

    run: int  # number of the pass, from 0
    mode: str
    phase: str
    turn: int  # of the phase, from 1
    agent: str
    answer: str

    @property
    def where(self) -> str:
        return f"{self.phase}, {self.turn}: {self.agent}" + (
            f", pass {self.run + 1}" if self.run else ""
        )


def judge(scenario: Scenario, documents: Mapping[str, str], said: Sequence[Said]) -> list[CheckRow]:
    """`said` in the order of runs and modes; `documents` by agent."""
    rows = []
    for check in scenario.checks:
        within = f" ({', '.join(check.phases)})" if check.phases else ""
        for mode in dict.fromkeys(one.mode for one in said):
            these = [
                one
                for one in said
                if one.mode == mode and (not check.phases or one.phase in check.phases)
            ]
            for name, good in _conditions(check, documents, these):
                failed = [one.where for one in these if not good(one)]
                passed = len(these) - len(failed)
                rows.append(
                    CheckRow(
                        check=name + within, mode=mode, passed=passed, of=len(these), failed=failed
                    )
                )
    return rows


def _conditions(
    check: Check, documents: Mapping[str, str], said: Sequence[Said]
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
        yield (
            "differs from the other agents' answers",
            lambda one: (one.run, one.phase, one.answer) not in twice,
        )
    if check.mentions == "document":
        own = own_words(documents)
        yield "a word of its document alone", lambda one: bool(_words(one.answer) & own[one.agent])
    elif check.mentions:
        any_of = {word.lower() for word in check.mentions}
        yield (
            f"mentions {', '.join(check.mentions)}",
            lambda one: any(word in one.answer.lower() for word in any_of),
        )


def distinct_ngrams(text: str, n: int = 4) -> float:
    """Share of the sequences of `n` words that are not a repetition; 1 where there are none."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def own_words(documents: Mapping[str, str]) -> dict[str, set[str]]:
    """By agent: the words that no other one's document has."""
    words = {agent: _words(text) for agent, text in documents.items()}
    return {
        agent: mine.difference(*(theirs for name, theirs in words.items() if name != agent))
        for agent, mine in words.items()
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{3,}", text.lower()))


def _said_twice(said: Sequence[Said]) -> set[tuple[int, str, str]]:
    """Answers that two agents gave in the same phase of a run."""
    key = lambda one: (one.run, one.phase, one.answer)  # noqa: E731
    return {
        of
        for of, group in groupby(sorted(said, key=key), key)
        if len({one.agent for one in group}) > 1
    }
