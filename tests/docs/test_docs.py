"""README.md and docs/ are short where they say so, lead to each other, and name what there is."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import figures
import pytest
from fastapi.routing import APIRoute
from typer.main import get_command

from agentmem.cli.main import app as cli
from agentmem.config import Settings, load_settings
from agentmem.prefix_cache.info import Cause
from agentmem.server.app import create_app
from agentmem.server.auth import read_api_keys
from support.fake_engine import FakeEngine

ROOT = figures.ROOT
DOCS = ROOT / "docs"
PAGES = [
    *figures.PAGES,
    *(ROOT / "benchmarks").rglob("*.md"),
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]*)\)")
AUTOLINK = re.compile(r"<(https?://[^>]*)>")
EXTERNAL = re.compile(r"https://[\w-]+(\.[\w-]+)+(/[\w./%#-]*)?")


def prose(page: Path) -> str:
    """Return the page without its code."""
    return re.sub(r"`[^`]*`", "", FENCED.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    text = prose(page)
    return LINK.findall(text) + AUTOLINK.findall(text)


def anchors(page: Path) -> set[str]:
    """Return the fragments that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    words = (re.sub(r"[^\w -]", "", heading).strip().lower() for heading in headings)
    return {text.replace(" ", "-") for text in words}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(page):
    for link in links(page):
        if link.startswith("http"):
            assert EXTERNAL.fullmatch(link), link
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


def test_the_index_leads_to_every_page_of_docs_and_the_readme_to_the_index():
    linked = {(DOCS / link).resolve() for link in links(DOCS / "index.md")}
    assert set(DOCS.glob("*.md")) - {DOCS / "index.md"} <= linked
    assert "docs/index.md" in links(ROOT / "README.md")


def test_the_readme_has_at_most_1000_words():
    """Count all that is separated by blanks: tables, code and markup too."""
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_the_glossary_has_at_most_25_words_of_ours_and_none_twice():
    ours, field = (DOCS / "glossary.md").read_text().split("## Words of the field")
    words = [re.findall(r"^\| ([^|]*) \|", part, re.MULTILINE)[1:] for part in (ours, field)]
    assert 10 < len(words[0]) <= 25
    assert len({*words[0], *words[1]}) == len(words[0]) + len(words[1])


def test_the_settings_are_all_there_with_their_defaults():
    rows = re.findall(r"^\| `--([\w-]+)` \| ([^|]*) \|", (DOCS / "operations.md").read_text(), re.M)
    shown = {name.replace("-", "_"): default for name, default in rows}
    assert len(rows) == len(shown)
    assert shown.keys() == Settings.model_fields.keys()
    for name, field in Settings.model_fields.items():
        if shown[name].startswith("`"):
            told = load_settings({name: shown[name].strip("`")})
            assert getattr(told, name) == field.default, name
        else:  # "none", or what it is then
            assert not field.default, name


def test_the_routes_are_all_there_and_no_others(tmp_path):
    app = create_app(FakeEngine(), Settings(home=tmp_path), None)
    routes = {route.path for route in app.routes if isinstance(route, APIRoute)}
    served = {re.sub(r"\{\w+(:path)?\}", "{id}", path) for path in routes}
    told = set()
    table = re.compile(r"^\| (`(?:GET|POST|DELETE).*?) \|", re.MULTILINE)
    for cell in table.findall((DOCS / "api.md").read_text()):
        for code in re.findall(r"`([^`]*)`", cell):
            path = code.split()[-1]
            if path.startswith("/"):
                last = path
                told.add(path)
            elif path.islower():  # `pin`, `unpin`: a sibling
                told.add(f"{last.rpartition('/')[0]}/{path}")
    assert told == served


def test_the_causes_are_all_there():
    causes = re.findall(r"^\| `(\w+)` \|", section("docs/api.md", "| cause |"), re.MULTILINE)
    assert causes == list(get_args(Cause))


def test_the_floor_plan_has_a_row_for_every_package_and_no_other():
    top = ROOT / "src" / "agentmem"
    packages = {str(init.parent.relative_to(top)) for init in top.glob("*/**/__init__.py")}
    rows = re.findall(r"^\| `([\w/]+)/` \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(packages | {"scripts", "benchmarks"})


def test_the_floors_of_the_page_are_those_that_are_checked():
    _, _, text = (DOCS / "architecture.md").read_text().partition("From the top:\n\n")
    told = [line.strip() for line in text.partition("\n\n")[0].splitlines()]
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = config["tool"]["importlinter"]["contracts"]
    (floors,) = (one["layers"] for one in contracts if one["containers"] == ["agentmem"])
    assert told[:-1] == [floor.replace(" :", ",") for floor in floors[:-1]]
    assert told[-1] == "the top folder"
    top = ROOT / "src" / "agentmem"
    assert all((top / f"{name}.py").is_file() for name in floors[-1].split(" : "))


def test_every_module_that_the_architecture_names_is_there():
    folders = ("src", "scripts", "benchmarks", "tests")
    files = [
        "/" + str(path.relative_to(ROOT)) for top in folders for path in (ROOT / top).rglob("*.py")
    ]
    named = set(re.findall(r"`([\w/]+\.py)`", (DOCS / "architecture.md").read_text()))
    assert len(named) > 20
    gone = [name for name in named if not any(file.endswith(f"/{name}") for file in files)]
    assert gone == ["bench/NAME.py"]


def section(page: str, head: str) -> str:
    """Return a table from its first words on."""
    return (ROOT / page).read_text().partition(head)[2].partition("\n\n")[0]


def commands(page: Path) -> list[str]:
    """Return the command lines of the page's shell blocks."""
    blocks = [code for kind, code in FENCED.findall(page.read_text()) if kind == "sh"]
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_is_one_that_there_is(page):
    for line in commands(page):
        words = line.split()
        if words[0].startswith("./scripts/"):
            assert (ROOT / words[0]).is_file(), line
            words[0] = "serve" if words[0] == "./scripts/serve" else "version"
        elif words[0] == ".venv/bin/agentmem":
            words.pop(0)
        else:
            continue
        check_command(words, line)


def check_command(words: list[str], line: str) -> None:
    """Assert that there is such a command, and that it has these options."""
    command = get_command(cli)
    context = command.make_context("agentmem", [], resilient_parsing=True)
    while hasattr(command, "get_command"):
        command = command.get_command(context, words.pop(0))
        assert command is not None, line
    if command.name == "version":  # a script's own arguments
        return
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if re.fullmatch(r"--?[a-z][\w-]*", word)} <= known, line


def test_the_example_of_keys_is_a_file_of_keys(tmp_path):
    blocks = FENCED.findall((DOCS / "operations.md").read_text())
    (example,) = (code for kind, code in blocks if kind == "toml")
    file = tmp_path / "keys.toml"
    file.write_text(example)
    file.chmod(0o600)
    assert set(read_api_keys(file).values()) == tomllib.loads(example).keys()


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](README.md)", False),
        ("[a](#no-such-heading)", True),
        ("[a](no-such-file.md)", True),
        ("[a](http://example.com)", True),
    ],
)
def test_a_broken_link_is_seen(tmp_path, monkeypatch, text, broken):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(text)
    if broken:
        with pytest.raises(AssertionError):
            test_every_link_leads_somewhere(page)
    else:
        test_every_link_leads_somewhere(page)
