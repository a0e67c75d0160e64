"""`agentmem bench scenario`, as a process on a tiny model; its file format, and what answers are
judged by.
"""

from pathlib import Path

import pytest

from agentmem.bench.harness.options import show
from agentmem.bench.scenario_checks import Said, distinct_ngrams, judge, own_words
from agentmem.bench.scenario_file import Scenario, built_in, parse, read_scenario
from agentmem.cli.show import table
from agentmem.errors import StartupError
from support.bench_process import result_of
from support.tiny import BLOCK, random_tokens
from support.tiny_model_dir import write_tiny_model

MODES = ["persistent", "restart", "cold"]


def words(n: int, seed: int) -> str:
    return " ".join(f"w{token}" for token in random_tokens(n, seed))


SCENARIO = f"""
description: two who talk
compare: [{", ".join(MODES)}]
agents:
  - {{name: a, system: {words(20, 1)}, corpus: 100}}
  - {{name: b, system: {words(20, 2)}, file: case.txt}}
phases:
  - name: first
    turns:
      - {{agent: a, message: {words(8, 3)}, max_tokens: 6}}
      - {{agent: b, message: {words(8, 4)}, max_tokens: 6, hear: [a]}}
      - {{agent: a, message: {words(8, 5)}, max_tokens: 6, hear: [b]}}
  - name: second
    restart: true
    faster_than: first
    turns:
      - {{agent: a, message: {words(8, 6)}, max_tokens: 6, hear: [b]}}
      - {{agent: b, message: {words(8, 7)}, max_tokens: 6, hear: [a], since: start}}
checks:
  - {{min_chars: 1}}
  - {{phases: [first], min_chars: 9999}}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A directory with a model, a scenario, and its document beside it."""
    directory = tmp_path_factory.mktemp("files")
    write_tiny_model(directory / "tiny")
    (directory / "case.txt").write_text(words(70, 9))
    (directory / "two.yaml").write_text(SCENARIO)
    (directory / "small.toml").write_text(f"block_size = {BLOCK}\n")
    return directory


def play(directory: Path, files: Path, name: object, *arguments: object) -> dict:
    return result_of(
        directory, "scenario", files / "tiny", name, "--config", files / "small.toml", *arguments
    )


@pytest.fixture(scope="module")
def result(files, tmp_path_factory) -> dict:
    return play(tmp_path_factory.mktemp("run"), files, files / "two.yaml")


def turns(result: dict, mode: str, run: int = 0) -> list[dict]:
    return [turn for turn in result["turns"] if (turn["mode"], turn["run"]) == (mode, run)]


def assert_rows_add_up(result: dict, passes: int) -> None:
    for row in result["rows"]:
        of = [t for t in turns(result, row["mode"]) if t["phase"] == row["phase"]]
        assert row["prefilled_tokens"] == sum(t["prefilled_tokens"] for t in of)
        assert row["turns"] == len(of) == sum(row["cache"].values())
        assert (
            len(row["ttft"]["values_ms"]) == passes * len(of)
            and len(row["wall_s"]["values"]) == passes
        )
        assert (row["restart_s"] is None) == (row["phase"] == "first")
    for total in result["totals"]:
        walls = [row["wall_s"]["values"] for row in result["rows"] if row["mode"] == total["mode"]]
        assert total["wall_s"]["values"] == pytest.approx(
            [sum(of) for of in zip(*walls, strict=True)], abs=0.02
        )


def test_each_pass_plays_all_turns_in_all_modes_with_the_same_text(result):
    assert result["modes"] == MODES and len(result["turns"]) == 3 * 5
    prompts = [[t["prompt_tokens"] for t in turns(result, mode)] for mode in MODES]
    assert all(of == prompts[0] for of in prompts)
    assert [t["agent"] for t in turns(result, "cold")] == ["a", "b", "a", "a", "b"]


def test_greedy_answers_are_the_same_whatever_is_cached(result):
    assert result["answers_equal"] and all(turn["same_answer"] for turn in result["turns"])
    assert "All answers equal." in result["shown"]


def test_persistent_returns_from_disk_and_prefills_only_what_is_new(result):
    of = turns(result, "persistent")
    assert [t["cache"] for t in of] == ["cold", "cold", "hot", "warm", "warm"]
    before = of[2]["prompt_tokens"] + of[2]["completion_tokens"]
    assert of[3]["cached_tokens"] >= before - 2
    assert of[3]["prefilled_tokens"] == of[3]["prompt_tokens"] - of[3]["cached_tokens"] < 40


def test_restart_loses_what_was_before_it_and_cold_loses_everything(result):
    assert [t["cache"] for t in turns(result, "restart")] == ["cold", "cold", "hot", "cold", "cold"]
    cold = turns(result, "cold")
    assert [t["cache"] for t in cold] == ["cold"] * 5
    assert all(t["prefilled_tokens"] == t["prompt_tokens"] for t in cold)


def test_an_agent_is_told_what_the_others_said_and_nothing_twice(result):
    first, heard, after, again, last = (t["prompt_tokens"] for t in turns(result, "cold"))
    template, message = 6, 8  # "<s> user", "</s>", "<s> assistant", "</s>"
    answer = 6
    assert after - first == template + answer + len(("b:",)) + answer + message
    assert again - after == template + answer + message, "b has said nothing since"
    assert last - heard == template + answer + 2 * (len(("a:",)) + answer) + message, (
        "a said two things since"
    )


def test_rows_add_up_to_the_turns(result):
    assert [(row["phase"], row["mode"]) for row in result["rows"]] == [
        (p, m) for p in ("first", "second") for m in MODES
    ]
    assert_rows_add_up(result, passes=1)
    for row in result["rows"]:
        assert (row["over_persistent"] is None) == (row["mode"] == "persistent")
        assert set(row["faster_than"]) == ({"first"} if row["phase"] == "second" else set())


def test_a_second_pass_says_and_hears_the_same_on_an_empty_store(files, tmp_path):
    result = play(tmp_path, files, files / "two.yaml", "--compare", "persistent", "--passes", 2)
    first, second = (turns(result, "persistent", run) for run in (0, 1))
    for key in ("answer", "cache", "prompt_tokens", "cached_tokens"):
        assert [t[key] for t in first] == [t[key] for t in second]
    assert_rows_add_up(result, passes=2)
    assert result["checks"][1]["failed"][-1] == "first, 3: a, pass 2"


def test_answers_are_judged_in_every_mode_and_what_fails_is_named(result):
    good, bad = (
        [c for c in result["checks"] if c["check"].startswith(f"at least {n} ")] for n in (1, 9999)
    )
    assert [c["mode"] for c in good] == [c["mode"] for c in bad] == MODES
    assert all(c["passed"] == c["of"] == 5 for c in good)
    assert all(c["passed"] == 0 and c["of"] == 3 for c in bad)
    assert bad[0]["failed"] == ["first, 1: a", "first, 2: b", "first, 3: a"]


def test_experts_are_primed_cold_asked_from_disk_and_asked_again_from_ram(files, tmp_path):
    result = play(tmp_path, files, "routing", "--tokens", 200)
    assert [row["cache"] for row in result["rows"]] == [{"cold": 10}, {"warm": 10}, {"hot": 10}]
    assert min(turn["prompt_tokens"] for turn in result["turns"]) > 200
    assert "query, persistent: " in result["shown"]


def test_the_papers_scenarios_have_its_numbers():
    assert built_in() == ["prisoner", "routing"]
    prisoner, routing = (read_scenario(name)[0] for name in built_in())
    assert (len(prisoner.agents), len(prisoner.phases), prisoner.num_turns) == (4, 5, 25)
    assert len(routing.agents) == 10 and {agent.corpus for agent in routing.agents} == {4000}
    assert all(
        sorted(t.agent for t in p.turns) == sorted(a.name for a in routing.agents)
        for p in routing.phases
    )


def test_the_readmes_example_is_a_scenario():
    readme = (Path(__file__).parents[2] / "benchmarks" / "scenarios" / "README.md").read_text()
    scenario = parse(readme.partition("```yaml\n")[2].partition("```")[0], "README.md")
    assert scenario.num_turns == 3 and scenario.phases[1].faster_than == "reading"


@pytest.mark.parametrize(
    "was, becomes, line, message",
    [
        ("agent: b", "agent: c", 11, "phases[0].turns[1].agent: 'c' is none of the agents"),
        ("hear: [a]", "hear: [a, x]", 11, "phases[0].turns[1].hear: 'x' is none of the agents"),
        ("name: b", "name: a", 6, "agents[1]: 'a' is there twice"),
        (
            "max_tokens: 6",
            "max_tokens: many",
            10,
            "phases[0].turns[0].max_tokens: Input should be a valid integer",
        ),
        (
            "max_tokens: 6",
            "max_token: 6",
            10,
            "phases[0].turns[0].max_token: Extra inputs are not permitted",
        ),
        (
            "restart: true",
            "restart: perhaps",
            14,
            "phases[1].restart: Input should be a valid boolean",
        ),
        (
            "faster_than: first",
            "faster_than: second",
            15,
            "phases[1].faster_than: 'second' is no earlier phase",
        ),
        (
            "corpus: 100",
            "corpus: 100, document: w9",
            5,
            "agents[0]: give one of document, corpus and file",
        ),
        (
            "compare: [persistent",
            "compare: [lasting",
            3,
            "compare[0]: Input should be 'persistent', 'restart' or",
        ),
        ("restart, cold]", "cold, cold]", 3, "compare[2]: 'cold' is there twice"),
        (
            "phases: [first]",
            "phases: [third]",
            21,
            "checks[1].phases: 'third' is none of the phases",
        ),
        ("min_chars: 1}", "mentions: 5}", 20, "checks[0].mentions"),
        ("name: second", "name: [", 15, "not YAML"),
    ],
)
def test_a_fault_in_a_file_is_told_with_line_and_field(was, becomes, line, message):
    with pytest.raises(StartupError) as raised:
        parse(SCENARIO.replace(was, becomes, 1), "two.yaml")
    assert f"two.yaml, line {line}: " in str(raised.value) and message in str(raised.value)


def test_a_check_of_documents_needs_documents():
    text = SCENARIO.replace("file: case.txt", "document: w9").replace(
        "min_chars: 1}", "mentions: document}"
    )
    parse(text, "two.yaml")
    with pytest.raises(StartupError, match=r"checks\[0\].mentions: b has no document"):
        parse(text.replace(", document: w9", ""), "two.yaml")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nowhere.yaml",), "nowhere.yaml: No such file or directory; there are prisoner, routing"),
        (("prisoner", "--compare", "persistent,lost"), "choose from persistent, restart, cold"),
        (("prisoner", "--compare", "cold,cold"), "each once"),
        (("prisoner", "--tokens", "100"), "no agent of prisoner has a document from the corpus"),
        (("prisoner", "--json", "/nowhere/x.json"), "/nowhere/x.json: can't be written"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, files, refused):
    assert message in refused("scenario", *arguments, "--model", files / "tiny")


def test_a_repetition_loop_is_seen():
    assert distinct_ngrams("the cat sat on the mat and slept") == 1
    assert distinct_ngrams("one two three") == distinct_ngrams("") == 1
    assert distinct_ngrams("no no no no no no no") == 1 / 4


def test_answers_that_are_the_same_or_of_another_ones_document_fail():
    agents = [{"name": n, "system": "s", "document": n} for n in "ab"]
    phases = [{"name": "p", "turns": [{"agent": n, "message": "m"} for n in "ab"]}]
    checks = [{"differ": True}, {"mentions": "document"}, {"mentions": ["Both"]}]
    scenario = Scenario.model_validate({"agents": agents, "phases": phases, "checks": checks})
    documents = {"a": "both know lions", "b": "both know tigers"}
    assert own_words(documents) == {"a": {"lions"}, "b": {"tigers"}}

    def passed(*answers: str) -> list[int]:
        said = [
            Said(run=0, mode="cold", phase="p", turn=1, agent=n, answer=a)
            for n, a in zip("ab", answers, strict=True)
        ]
        return [row.passed for row in judge(scenario, documents, said)]

    assert passed("Lions.", "Tigers, both.") == [2, 2, 1]
    assert passed("lions", "lions") == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "phases: [{name: 2023-02-30}]",
            "day is out of range for month: text that looks like a date",
        ),
        ("a: !!int abc", "needs quotes"),
        ("a: !!timestamp x", "needs quotes"),
        ("a: \x07", "not YAML: unacceptable character"),
        ("[" * 5000, "not YAML: maximum recursion depth"),
    ],
)
def test_what_yaml_makes_nothing_of_is_one_line(text, message):
    with pytest.raises(StartupError, match=message) as caught:
        parse(text, "bad.yaml")
    assert str(caught.value).startswith("bad.yaml: ") and "\n" not in str(caught.value)


def test_a_name_with_brackets_is_shown_as_it_is(capsys):
    lines = table("phase")
    lines.add_row("[/x] [bold]")
    show(lines)
    assert "[/x] [bold]" in capsys.readouterr().out
