"""`agentmem agents` and `agentmem store`, as processes, beside a real server on a tiny model and
without one.
"""

import fcntl
import json
import os
import pty
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agentmem.cli.agents import _prompt_body
from agentmem.locks import release
from agentmem.store.agent_store import AgentStore
from agentmem.store.files.layout import Layout
from agentmem.store.upkeep.locks import acquire, holder
from support.chat_http import FLAGS, text, user, words
from support.commands import KEY, chat
from support.server_process import ServerProcess

COMMAND = (sys.executable, "-m", "agentmem")
# exit codes
REFUSED = 1  # by the server
FAULT = 2  # of the user, or no server


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A server with a key, which the command line gets by its environment."""
    directory = tmp_path_factory.mktemp("server")
    keys = directory / "keys.toml"
    keys.write_text(f'default = "{KEY}"\n')
    keys.chmod(0o600)
    with ServerProcess(directory / "home", *FLAGS, "--api-keys", str(keys), model=model) as server:
        server.client.headers["x-api-key"] = KEY
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def environment(server) -> dict[str, str]:
    plain = {
        k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_") and k != "COLUMNS"
    }
    return plain | {
        "AGENTMEM_URL": server.url,
        "AGENTMEM_API_KEY": KEY,
        "AGENTMEM_HOME": str(server.home),
    }


@pytest.fixture
def cli(environment):
    def run(*arguments: object, **options) -> subprocess.CompletedProcess:
        """Text that is given to it, and what it says: the tests' own output is never a terminal."""
        command = [*COMMAND, *(a if isinstance(a, bytes) else str(a) for a in arguments)]
        options = {"env": environment, "input": ""} | options
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)

    return run


@pytest.fixture
def agents(cli):
    def run(*arguments: object, **options) -> object:
        """Return the JSON that an `agentmem agents` command prints; it succeeds."""
        done = cli("agents", *arguments, **options)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    return run


def failed(done: subprocess.CompletedProcess, code: int) -> str:
    """The one line that it says, on stderr alone."""
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch("agentmem: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


# -- agents


def test_an_agent_is_pinned_given_a_ttl_evicted_prefetched_and_deleted(server, agents, cli):
    chat(server, "life", 1)
    assert agents("pin", "life") == {"agent_id": "life", "pinned": True}
    assert "unpin" in failed(cli("agents", "evict", "life"), REFUSED)
    assert agents("unpin", "life")["pinned"] is False
    server.client.post("/agents/life/ttl", json={"seconds": 3600})
    assert agents("ttl", "life", 0)["ttl"] is None
    assert agents("evict", "life")["freed_bytes"] > 0
    assert agents("prefetch", "life")["restored_bytes"] > 0
    shown = agents("show", "life")
    assert (shown["agent_id"], shown["tier"], shown["ttl"], shown["pinned"]) == (
        "life",
        "hot",
        None,
        False,
    )
    assert agents("rm", "life") == {"agent_id": "life", "deleted": True}
    assert server.client.get("/agents/life").status_code == 404


def test_prewarm_fork_and_truncate_say_what_the_agent_holds(agents, tmp_path):
    messages = [{"role": "system", "content": words(30, 2)}, user(20, 3)]
    warmed = agents("prewarm", "young", "-", input=json.dumps(messages))
    assert (warmed["cache"], warmed["cached_tokens"]) == ("cold", 0)
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(messages))
    assert agents("prewarm", "young", file)["cached_tokens"] == warmed["prompt_tokens"] - 1
    assert agents("fork", "young", "twin/1", "--tokens", 40)["tokens"] == 40
    assert agents("truncate", "twin/1", "--tokens", 35)["tokens"] == 35
    assert agents("truncate", "young", "--messages", 1)["tokens"] == 2 + 30


def test_an_agent_goes_into_a_private_file_and_back_and_no_file_is_overwritten(
    server, agents, cli, tmp_path
):
    chat(server, "traveller", 4)
    file = tmp_path / "traveller.agentmem"
    done = agents("export", "traveller", file)
    assert done == {"agent_id": "traveller", "file": str(file), "bytes": file.stat().st_size}
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_bytes()
    assert "exists" in failed(cli("agents", "export", "traveller", file), FAULT)
    assert "nobody" in failed(cli("agents", "export", "nobody", tmp_path / "nobody"), REFUSED)
    assert (file.read_bytes(), list(tmp_path.iterdir())) == (before, [file])
    assert agents("import", file, "--agent-id", "settler")["agent_id"] == "settler"
    assert text(chat(server, "settler", 4)) == text(chat(server, "traveller", 4))


def all_fail(cli, code: int, cases: dict[str, tuple[object, ...]]) -> None:
    """Each with a line that says its key. Two at a time: a process takes half a second to start."""
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda arguments: cli("agents", *arguments), cases.values())
        for says, one in zip(cases, done, strict=True):
            assert says in failed(one, code)


def test_what_the_user_can_put_right_is_one_line_and_exit_code_2(cli, tmp_path):
    (tmp_path / "bad.json").write_text("[{")
    cases = {
        "no server answers": ("--url", "http://127.0.0.1:1", "list"),
        "protocol": ("--url", "nowhere", "list"),
        "not JSON": ("prewarm", "x", tmp_path / "bad.json"),
        "No such file": ("import", tmp_path / "none"),
        "either --tokens or --messages": ("truncate", "x"),
        "seconds must be": ("ttl", "x", "inf"),
        "UTF-8": ("show", b"\xff"),
    }
    all_fail(cli, FAULT, cases)


def test_what_the_server_refuses_is_one_line_and_exit_code_1(server, cli, tmp_path):
    chat(server, "refuses", 5)
    (tmp_path / "object.json").write_text("{}")
    cases = {
        "Incorrect API key": ("--api-key", "sk-wrong", "list"),
        "There is no agent 'nobody'.": ("show", "nobody"),
        "messages: ": ("prewarm", "x", tmp_path / "object.json"),
        "1 to 2:": ("truncate", "refuses", "--messages", 3),
        "already": ("fork", "refuses", "refuses"),
        "tokens must be 1 to": ("fork", "refuses", "x", "--tokens", 0),
    }
    all_fail(cli, REFUSED, cases)


def test_url_and_key_may_stand_before_and_after_the_verb(server, cli, environment):
    plain = {k: v for k, v in environment.items() if not k.startswith("AGENTMEM_")}
    url = ("--url", server.url)
    key = ("--api-key", KEY)
    for arguments in (
        (*url, *key, "list", "--json"),
        ("list", "--json", *url, *key),
        (*key, "list", *url, "--json"),
        ("--url", "http://127.0.0.1:1", "list", *url, *key, "--json"),  # the nearer one counts
    ):
        done = cli("agents", *arguments, env=plain)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert isinstance(json.loads(done.stdout), list)
    done = cli("agents", *url, *key, "list", env=environment | {"AGENTMEM_URL": "http://[::1]:1"})
    assert done.returncode == 0
    assert "--api-key or AGENTMEM_API_KEY" in failed(
        cli("agents", "list", *url, env=plain), REFUSED
    )


class SomethingElse(BaseHTTPRequestHandler):
    """A server that greets whoever asks."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<p>hello</p>")

    def log_message(self, *_):
        pass


def test_another_server_is_told_apart(cli):
    with ThreadingHTTPServer(("127.0.0.1", 0), SomethingElse) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        done = cli("agents", "--url", f"http://127.0.0.1:{other.server_port}", "list")
        other.shutdown()
        thread.join()
    assert "is this an agentmem server?" in failed(done, REFUSED)


def test_the_list_is_a_table_or_json_and_ids_are_shown_as_they_are(server, agents, cli):
    for agent in ("[/x]", "[bold]b", ".."):
        chat(server, agent, 6)
    rows = {row["agent_id"]: row for row in agents("list", "--json")}
    assert {"[/x]", "[bold]b", ".."} <= rows.keys()
    table = cli("agents", "list").stdout.splitlines()
    assert table[0].split() == ["agent", "tier", "tokens", "branches", "RAM", "disk", "last", "use"]
    assert {"[/x]", "[bold]b", ".."} <= {line.split()[0] for line in table[1:]}
    done = cli("agents", "rm", "..", "[/x]", "[bold]b")
    assert (done.returncode, done.stdout.count('"deleted": true')) == (0, 3)


def in_terminal(columns: int, environment: dict[str, str], *arguments: str) -> list[str]:
    """The lines that a terminal of so many columns would show."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = environment | {"TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    output = b""
    try:
        while part := os.read(main, 65536):
            output += part
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(main)
    assert process.wait(10) == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode()).splitlines()


def test_tables_fit_a_terminal_of_80_columns(server, agents, environment):
    name = "project-with-a-long-name/agent-0123456789"
    chat(server, name, 7, agentmem={"ttl": 86400})
    agents("pin", name)
    lines = in_terminal(80, environment, "agents", "list")
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["agent", "tier", "tokens", "branches", "RAM", "disk", "last", "use"]
    row = next(i for i, line in enumerate(lines) if line.startswith("project"))
    assert re.search(r" hot +10\d +1 +[\d.]+ KB +[\d.]+ KB +\d+ s ago pinned", lines[row])
    assert "".join(line.split(" ")[0] for line in lines[row : row + 4]).startswith(name)
    stats = in_terminal(80, environment, "store", "stats")
    assert max(map(len, stats)) <= 80
    assert re.match(
        r"[0-9a-f]{12} +\d+ +1 +\d+ +[\d.]+ [KM]B +[\d.]+ [KM]B +[\d.]+ [KM]B +\d+ s ago", stats[1]
    )
    assert str(server.process.pid) in stats[2] and server.url.removesuffix("/v1") in stats[2]


# -- store


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def blocks(home: Path) -> set[Path]:
    return set(home.rglob("blocks/*/*.safetensors"))


def test_beside_a_server_the_store_is_looked_at_and_collected_through_it(
    server, agents, cli, environment
):
    held = blocks(server.home)
    chat(server, "watched", 8)
    agents("evict", "watched")
    (stats,) = json.loads(cli("store", "stats", "--json").stdout)
    assert stats["holder"] == {
        "pid": str(server.process.pid),
        "url": server.url.removesuffix("/v1"),
    }
    assert stats["blocks"] == len(blocks(server.home)) and stats["writes"]["last_hour"] > 0
    assert "API key" in failed(
        cli("store", "gc", env=environment | {"AGENTMEM_API_KEY": ""}), REFUSED
    )

    bad = (blocks(server.home) - held).pop()
    flip(bad)
    done = cli("store", "verify")
    assert (
        done.returncode == 1
        and bad.name in done.stdout
        and "DAMAGED" in done.stdout
        and done.stderr == ""
    )
    assert f"process {server.process.pid}" in failed(cli("store", "verify", "--repair"), FAULT)
    assert text(chat(server, "watched", 8)) == text(chat(server, "watched again", 8))
    quarantine = next(server.home.rglob("quarantine"))
    assert [p.name for p in quarantine.iterdir()] == [bad.name]
    done = cli("store", "gc", "--json")
    collected = json.loads(done.stdout)
    assert (done.returncode, done.stderr, list(collected["freed_bytes"])) == (
        0,
        "",
        [stats["fingerprint"]],
    )
    assert collected["freed_bytes"][stats["fingerprint"]] > 0 and list(quarantine.iterdir()) == []
    (verified,) = json.loads(cli("store", "verify", "--json").stdout)
    assert verified["ok"] and verified["files"] > 0


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory) -> tuple[Path, str]:
    """The home of a server that has ended, and what alice had answered there."""
    home = tmp_path_factory.mktemp("stopped") / "home"
    with ServerProcess(home, *FLAGS, model=model) as server:
        answer = text(chat(server, "alice", 9))
        chat(server, "gone", 10, agentmem={"ttl": 0.1})
        assert server.stop() == 0
    return home, answer


def test_a_flipped_bit_of_a_stopped_store_is_found_put_aside_and_survived(
    cli, model, environment, stopped, tmp_path
):
    home = shutil.copytree(stopped[0], tmp_path / "home")
    answer = stopped[1]
    environment = environment | {"AGENTMEM_HOME": str(home)}
    bad = max(blocks(home), key=lambda p: p.stat().st_mtime)
    flip(bad)
    done = cli("store", "verify", "--json", env=environment)
    (report,) = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (1, False) and bad.name in report["bad"][0]
    done = cli("store", "verify", "--repair", env=environment)
    assert (done.returncode, done.stderr) == (0, "") and "put aside: 1" in done.stdout
    assert not bad.exists() and list(home.rglob(f"quarantine/{bad.name}"))
    done = cli("store", "verify", env=environment)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith(": ok\n")
    (stats,) = json.loads(cli("store", "stats", "--json", env=environment).stdout)
    assert stats["holder"] is None
    collected = cli("store", "gc", env=environment)
    assert collected.returncode == 0 and "freed" in collected.stdout
    assert not list(home.rglob(f"quarantine/{bad.name}"))
    with ServerProcess(home, *FLAGS, model=model) as second:
        (alice,) = second.client.get("/agents").json()["data"]
        assert alice["agent_id"] == "alice"
        assert text(chat(second, "alice", 9)) == answer
        assert second.stop() == 0


def test_a_store_of_a_newer_format_is_left_alone_and_the_others_are_collected(
    cli, model, environment, stopped, tmp_path
):
    home = shutil.copytree(stopped[0], tmp_path / "home")
    answer = stopped[1]
    environment = environment | {"AGENTMEM_HOME": str(home)}
    (store,) = (home / "store").iterdir()
    newer = store.with_name("0" * 32)
    shutil.copytree(store, newer)
    with closing(sqlite3.connect(newer / "manifest.sqlite", isolation_level=None)) as db:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        db.execute(f"PRAGMA application_id = {application // 256 * 256 + 99}")
        db.execute("PRAGMA user_version = 99")
    before = {p: p.read_bytes() for p in newer.rglob("*") if p.is_file() and p.name != "lock"}
    for command in ("stats", "verify"):
        assert "format 99" in failed(cli("store", command, env=environment), FAULT)
    done = cli("store", "gc", env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (FAULT, 1) and "format 99" in done.stderr
    assert f"{store.name}: " in done.stdout and newer.name not in done.stdout
    # nor does a server need its room: the quota is kept by what it serves itself
    with ServerProcess(
        home, *FLAGS, "--store-quota", "200K", "--store-min-free", "0", model=model
    ) as second:
        assert text(chat(second, "alice", 9)) == answer
        assert second.stop() == 0
    assert {p: p.read_bytes() for p in before} == before


def test_who_looks_whether_a_store_is_open_does_not_keep_a_server_from_it(tmp_path):
    layout = Layout(tmp_path / "store")
    AgentStore.open(tmp_path, "store", {}).close()
    looking = acquire(layout)
    timer = threading.Timer(0.2, release, (looking,))
    timer.start()
    AgentStore.open(tmp_path, "store", {}).close()
    timer.join()
    assert holder(layout) is None


def test_where_there_is_no_store_there_is_nothing_to_say_and_nothing_is_made(
    cli, environment, tmp_path
):
    environment = environment | {"AGENTMEM_HOME": str(tmp_path / "none")}
    done = cli("store", "verify", "--json", env=environment)
    assert (done.returncode, done.stderr, json.loads(done.stdout)) == (0, "", [])
    done = cli("store", "gc", "--json", env=environment)
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)[
        "freed_bytes"
    ] == {}
    assert list(tmp_path.iterdir()) == []


def test_explain_says_where_a_prompt_parts_from_what_is_cached(cli, server, tmp_path):
    messages = [{"role": "user", "content": "w20 w21 w22"}]
    server.chat(messages, "asked", max_tokens=3)
    assert json.loads(cli("agents", "explain", "asked", "--json").stdout)["cause"] == "first"
    for name, content in (
        ("chat.json", json.dumps({"messages": [{"role": "user", "content": "w20 w99"}]})),
        ("text.txt", "<s> user w20 w99 </s>"),
    ):
        (tmp_path / name).write_text(content)
        found = json.loads(
            cli("agents", "explain", "asked", "--json", "--prompt", tmp_path / name).stdout
        )
        assert found["cause"] == "parted"
        assert (found["cached"]["text"].split()[0], found["prompt"]["text"].split()[0]) == (
            "w21",
            "w99",
        )
        shown = cli("agents", "explain", "asked", "--prompt", tmp_path / name).stdout
        assert "differs from everything that was cached" in shown
        line = next(line for line in shown.splitlines() if "w21" in line)
        assert line.index("w20") < line.index("w21") < line.index("w99")
    assert cli("agents", "explain", "nobody").returncode == REFUSED


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ('{"messages": [], "tools": [7], "stream": true}', {"messages": [], "tools": [7]}),
        (
            '{"messages": [], "chat_template_kwargs": {}}',
            {"messages": [], "chat_template_kwargs": {}},
        ),
        ('[{"role": "user"}]', {"messages": [{"role": "user"}]}),
        *((text, {"prompt": text}) for text in ("<s> w9", "7", '"w9"', '{"city": "Paris"}')),
    ],
)
def test_what_is_explained_of_a_file_is_a_request_a_chat_or_a_rendered_text(text, body):
    assert _prompt_body(text) == body
