"""/v1/agents over HTTP, against real server processes on a tiny model."""

import asyncio
import io
import json
import socket
import struct
import tarfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import xxhash

from agentmem.config import Settings
from agentmem.server.app import create_app
from support.chat_http import (
    FLAGS,
    KEYS,
    answered,
    path,
    refused,
    text,
    transcript,
    user,
    words,
    write_keys,
)
from support.fake_engine import CHATML, FakeEngine, tiny_tokenizer
from support.server_process import ServerProcess
from support.tiny import BLOCK, VOCAB, random_tokens
from support.tiny_model_dir import write_tiny_model


@pytest.fixture
def home(server) -> Path:
    return server.home


def cached(chat: dict) -> tuple[str, int]:
    return chat["agentmem"]["cache"], chat["agentmem"]["cached_tokens"]


def post(server: ServerProcess, agent: str, operation: str, **request) -> dict:
    response = server.client.post(path(agent, operation), **request)
    assert response.status_code == 200, response.text
    return response.json()


def names(server: ServerProcess) -> set[str]:
    return {agent["agent_id"] for agent in server.client.get("/agents").json()["data"]}


def held_of(server: ServerProcess, agent: str) -> dict:
    """What nobody but a request changes."""
    shown = server.client.get(path(agent)).json()
    changing = {"branches", "disk_bytes"}  # its tail is saved when it has rested
    return {k: v for k, v in shown.items() if k not in changing} | {
        "tokens": [b["tokens"] for b in shown["branches"]]
    }


def store_files(home: Path) -> list[Path]:
    return [p for p in (home / "store").rglob("*") if p.is_file()]


# -- each route, for good


def test_an_agent_can_be_listed_shown_pinned_given_a_ttl_evicted_and_prefetched(server):
    chat = server.chat([user(100, 1)], agent="life", max_tokens=8)
    held = chat["usage"]["prompt_tokens"] + 7  # the last token of an answer is never in a cache
    shown = server.client.get(path("life")).json()
    assert (shown["object"], shown["agent_id"], shown["tier"], shown["tokens"]) == (
        "agent",
        "life",
        "hot",
        held,
    )
    assert [(b["tokens"], b["tier"]) for b in shown["branches"]] == [(held, "hot")]
    (row,) = [a for a in server.client.get("/agents").json()["data"] if a["agent_id"] == "life"]
    assert row == {k: shown[k] for k in row} | {"branches": 1, "disk_bytes": row["disk_bytes"]}

    assert post(server, "life", "pin") == {"agent_id": "life", "pinned": True}
    assert server.client.get(path("life")).json()["pinned"] is True
    pinned = refused(server.client.post(path("life", "evict")))
    assert pinned[:3] == (409, "conflict", "agent_id") and "unpin" in pinned[3]
    assert post(server, "life", "unpin") == {"agent_id": "life", "pinned": False}
    assert post(server, "life", "ttl", json={"seconds": 3600}) == {"agent_id": "life", "ttl": 3600}
    assert server.client.get(path("life")).json()["ttl"] == 3600
    assert post(server, "life", "ttl", json={"seconds": None})["ttl"] is None

    freed = post(server, "life", "evict")["freed_bytes"]
    shown = server.client.get(path("life")).json()
    assert freed > 0 and (shown["tier"], shown["ram_bytes"]) == ("warm", 0)
    assert 0 < post(server, "life", "prefetch")["restored_bytes"] <= shown["disk_bytes"]
    assert server.client.get(path("life")).json()["tier"] == "hot"
    assert server.client.post("/store/gc").json()["freed_bytes"] >= 0


def test_after_prewarm_a_chat_prefills_nothing(server):
    messages = [{"role": "system", "content": words(40, 2)}, user(30, 3)]
    first = post(server, "prewarmed", "prewarm", json={"messages": messages})
    assert (first["agent_id"], first["cache"], first["cached_tokens"]) == ("prewarmed", "cold", 0)
    chat = server.chat(messages, agent="prewarmed")
    # the last prompt token is always computed: it gives the first token of the answer
    assert cached(chat) == ("hot", chat["usage"]["prompt_tokens"] - 1)
    assert first["prompt_tokens"] == chat["usage"]["prompt_tokens"]
    assert text(chat) == text(server.chat(messages, agent="cold-instead-of-prewarmed"))


def test_a_fork_and_its_source_go_on_each_on_its_own(server):
    chat = server.chat([user(80, 4)], agent="source")
    forked = post(server, "source", "fork", json={"to": "fork/1"})
    assert (forked["agent_id"], forked["tokens"]) == ("fork/1", chat["usage"]["total_tokens"] - 1)
    history = [user(80, 4), answered(chat)]
    one = server.chat([*history, user(9, 5)], agent="source")
    other = server.chat([*history, user(9, 6)], agent="fork/1")
    assert cached(one)[1] == cached(other)[1] == forked["tokens"]
    assert text(server.chat([*history, user(9, 6)], agent="nobody before")) == text(other)
    early = post(server, "source", "fork", json={"to": "early", "tokens": 40})
    assert early["tokens"] == 40


# -- truncate


def test_a_truncated_agent_reports_exactly_the_tokens_that_were_kept(server):
    server.chat([user(100, 7)], agent="cut")
    assert post(server, "cut", "truncate", json={"tokens": 70})["tokens"] == 70
    chat = server.chat([user(100, 7)], agent="cut")
    assert cached(chat)[1] == 70


def test_messages_are_counted_as_the_template_renders_them_and_their_ends_found(server):
    history = [{"role": "system", "content": words(20, 8)}]
    for turn in range(3):
        history.append(user(20 + turn, 9 + turn))
        chat = server.chat(history, agent="turns")
        history.append(answered(chat))
    too_many = refused(server.client.post(path("turns", "truncate"), json={"messages": 8}))
    assert too_many[:3] == (400, "invalid_value", "messages") and "1 to 7" in too_many[3]
    for keep in (6, 4, 3, 2, 1):  # each time fewer of the same conversation
        kept = post(server, "turns", "truncate", json={"messages": keep})["tokens"]
        assert kept == sum(2 + len(m["content"].split()) for m in history[:keep]) + keep - 1
        ended = refused(server.client.post(path("turns", "truncate"), json={"messages": keep + 1}))
        assert f"1 to {keep}:" in ended[3]
    post(server, "turns", "prewarm", json={"messages": history[:6]})
    kept = post(server, "turns", "truncate", json={"messages": 4})["tokens"]
    chat = server.chat([*history[:4], user(5, 20)], agent="turns")
    assert cached(chat)[1] == kept


def test_a_message_that_the_template_put_in_is_not_counted_unless_it_was_sent(tmp_path):
    model = write_tiny_model(tmp_path / "tiny")
    put_in = {"role": "system", "content": "w9 w10"}
    own = "{% if messages[0].role != 'system' %}<s> system w9 w10 </s> {% endif %}"
    tiny_tokenizer(own + CHATML, size=VOCAB)._tokenizer.save_pretrained(model)
    with ServerProcess(tmp_path / "home", *FLAGS, model=model) as server:
        for agent, before in (("put in", []), ("sent", [put_in])):
            said = [*before, user(20, 1)]
            said.append(answered(server.chat(said, agent=agent)))
            too_many = refused(server.client.post(path(agent, "truncate"), json={"messages": 9}))
            assert f"1 to {len(said)}:" in too_many[3]
            question = {"messages": len(before) + 1}
            assert post(server, agent, "truncate", json=question)["tokens"] == (3 + 2) + (2 + 20)
        assert server.stop() == 0


def test_a_conversation_that_was_cut_to_nothing_can_be_cut_again(server):
    """Its newest turn marks the place, and says nothing."""
    for seed in (60, 61):
        server.chat([user(30, seed)], agent="cut to nothing")
    for keep in ({"messages": 1}, {"tokens": 10}, {"tokens": 3}):
        post(server, "cut to nothing", "truncate", json=keep)
    assert transcript(server, "cut to nothing")["messages"] == []


def test_an_answer_does_not_wait_until_the_client_acknowledges_its_first_bytes(server):
    took = []
    for _ in range(15):
        began = time.perf_counter()
        server.client.get("/models")
        took.append(time.perf_counter() - began)
    assert min(took[3:]) < 0.03  # Nagle's algorithm and a delayed ACK make it 0.04 every time


# -- what is refused


OPERATIONS = ("pin", "unpin", "evict", "prefetch", "export", "ttl", "fork", "truncate")
BODIES = {"ttl": {"seconds": 1}, "fork": {"to": "x"}, "truncate": {"messages": 1}}


@pytest.mark.parametrize("agent", ["nobody", "no/body", "%2F", "a pin/pin"])
def test_every_route_says_that_there_is_no_such_agent(server, agent):
    answers = [server.client.post(path(agent, op), json=BODIES.get(op)) for op in OPERATIONS]
    answers += [server.client.get(path(agent)), server.client.delete(path(agent))]
    for answer in answers:
        assert refused(answer) == (
            404,
            "agent_not_found",
            "agent_id",
            f"There is no agent {agent!r}.",
        )


@pytest.mark.parametrize(
    ("operation", "body", "code", "param", "says"),
    [
        ("ttl", {}, "missing_required_parameter", "seconds", "required"),
        ("ttl", {"seconds": 0}, "invalid_value", "seconds", "greater than 0"),
        ("ttl", {"seconds": "60"}, "invalid_type", "seconds", "number"),
        ("ttl", {"seconds": True}, "invalid_type", "seconds", "number"),
        ("ttl", {"seconds": 60, "pinned": True}, "unknown_parameter", "pinned", "unknown"),
        ("fork", {}, "missing_required_parameter", "to", "required"),
        ("fork", {"to": 5}, "invalid_type", "to", "string"),
        ("fork", {"to": ""}, "invalid_value", "to", "1 to 256"),
        ("fork", {"to": "x" * 257}, "invalid_value", "to", "1 to 256"),
        ("fork", {"to": "a\nb"}, "invalid_value", "to", "control"),
        ("fork", {"to": "x", "tokens": 0}, "invalid_value", "tokens", "1 to "),
        ("fork", {"to": "x", "tokens": 10**30}, "invalid_value", "tokens", "1 to "),
        ("fork", {"to": "x", "tokens": 4.0}, "invalid_type", "tokens", "integer"),
        ("fork", {"to": "x", "turns": 4}, "unknown_parameter", "turns", "unknown"),
        ("truncate", {}, "invalid_value", None, "either tokens or messages"),
        (
            "truncate",
            {"tokens": 1, "messages": 1},
            "invalid_value",
            None,
            "either tokens or messages",
        ),
        ("truncate", {"tokens": 0}, "invalid_value", "tokens", "greater than or equal to 1"),
        ("truncate", {"tokens": 10**6}, "invalid_value", "tokens", "1 to "),
        ("truncate", {"messages": 0}, "invalid_value", "messages", "greater than or equal to 1"),
        ("truncate", {"messages": 99}, "invalid_value", "messages", "1 to 2"),
        ("truncate", {"messages": "1"}, "invalid_type", "messages", "integer"),
        ("truncate", {"tokens": 5, "force": True}, "unknown_parameter", "force", "unknown"),
        ("prewarm", {}, "missing_required_parameter", "messages", "required"),
        ("prewarm", {"messages": []}, "invalid_value", "messages", "at least 1"),
        (
            "prewarm",
            {"messages": [{"role": "nobody", "content": "x"}]},
            "invalid_value",
            "messages.0.role",
            "user, assistant",
        ),
        (
            "prewarm",
            {"messages": [user(1, 1)], "max_tokens": 5},
            "unknown_parameter",
            "max_tokens",
            "unknown",
        ),
        ("prewarm", {"messages": [user(1100, 1)]}, "context_length_exceeded", "messages", "1024"),
        ("prewarm", [user(1, 1)], "invalid_type", None, "JSON object"),
    ],
)
def test_a_wrong_body_is_refused_with_the_field_and_what_would_be_right(
    server, operation, body, code, param, says
):
    if "refuses" not in names(server):
        server.chat([user(40, 21)], agent="refuses")
    before = held_of(server, "refuses")
    status, *error, message = refused(server.client.post(path("refuses", operation), json=body))
    assert (status, *error) == (400, code, param) and says in message
    assert held_of(server, "refuses") == before
    assert "x" not in names(server)


@pytest.mark.parametrize("body", [b"", b"{", b'{"seconds": 1', b"seconds=1", b'{"seconds": NaN}'])
def test_a_body_that_is_no_json_is_refused(server, body):
    response = server.client.post(
        path("any", "ttl"), content=body, headers={"content-type": "application/json"}
    )
    assert refused(response)[0] == 400


def test_a_name_that_is_taken_is_refused_and_nothing_changes(server):
    for agent in ("taken", "taker"):
        server.chat([user(40, 22)], agent=agent)
    before = held_of(server, "taken")
    response = server.client.post(path("taker", "fork"), json={"to": "taken"})
    assert refused(response)[:3] == (409, "agent_exists", "to")
    archive = server.client.post(path("taker", "export")).content
    assert refused(server.client.post("/agents/import", content=archive))[:3] == (
        409,
        "agent_exists",
        "agent_id",
    )
    assert held_of(server, "taken") == before


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_what_no_route_does_is_refused(server, method):
    assert refused(server.client.request(method, path("x")))[:2] == (405, "method_not_allowed")
    assert refused(server.client.post(path("x", "explode")))[:2] == (405, "method_not_allowed")


# -- ids


IDS = (
    "a/b",
    "/x",
    "x/",
    "a//b",
    "ü/🦊 x",
    "%2F",
    "100%",
    "a?b#c&d=e",
    "..",
    ".",
    "../../x",
    "import",
    "x/pin",
    "+ +",
)


@pytest.mark.parametrize("agent", IDS)
def test_an_id_in_a_path_is_whatever_it_is_in_a_body(server, agent):
    server.chat([user(20, 23)], agent=agent, max_tokens=2)
    assert server.client.get(path(agent)).json()["agent_id"] == agent
    assert post(server, agent, "pin")["agent_id"] == agent
    assert post(server, agent, "unpin")["agent_id"] == agent
    fork = post(server, agent, "fork", json={"to": agent + "~"})
    archive = server.client.post(path(fork["agent_id"], "export")).content
    assert server.client.delete(path(agent)).json() == {"agent_id": agent, "deleted": True}
    imported = server.client.post(
        "/agents/import", params={"agent_id": agent}, content=archive
    ).json()
    assert imported["agent_id"] == agent
    for name in (agent, agent + "~"):
        assert server.client.delete(path(name)).json()["deleted"]
    assert not {agent, agent + "~"} & names(server)


# -- options of a request


def test_a_request_can_make_its_agent_ephemeral_and_give_it_a_ttl(server, home):
    messages = [user(3 * BLOCK, 24)]
    server.chat(messages, agent="eve", agentmem={"ttl": 0.6, "ephemeral": True})
    shown = server.client.get(path("eve")).json()
    assert (shown["ttl"], shown["ephemeral"], shown["disk_bytes"]) == (0.6, True, 0)
    time.sleep(0.2)
    assert not any(token_run(24) in p.read_bytes() for p in store_files(home))
    for operation in ("evict", "export"):
        answer = refused(server.client.post(path("eve", operation)))
        assert answer[:3] == (409, "conflict", "agent_id") and "ephemeral" in answer[3]
    deadline = time.monotonic() + 10
    while "eve" in names(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.chat([user(40, 25)], agent="written")
    body = {"messages": [user(40, 25)], "agent_id": "written", "agentmem": {"ephemeral": True}}
    assert refused(server.client.post("/chat/completions", json=body))[:2] == (409, "conflict")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"ttl": 0}, "agentmem.ttl"),
        ({"ttl": "1"}, "agentmem.ttl"),
        ({"ephemeral": 1}, "agentmem.ephemeral"),
        ({"pin": True}, "agentmem.pin"),
        ([], "agentmem"),
    ],
)
def test_wrong_options_of_a_request_are_refused(server, options, param):
    body = {"messages": [user(4, 1)], "agent_id": "options", "agentmem": options}
    status, _, found, _ = refused(server.client.post("/chat/completions", json=body))
    assert (status, found) == (400, param)
    assert "options" not in names(server)


# -- delete


def token_run(seed: int) -> bytes:
    """Twelve token ids of `words(..., seed)` as the manifest holds them."""
    return struct.pack("<12I", *random_tokens(3 * BLOCK, seed)[BLOCK + 8 : BLOCK + 20])


def test_of_a_deleted_agent_no_file_holds_tokens_or_blocks(server, home):
    others = [server.chat([user(3 * BLOCK, seed)], agent=f"other {seed}") for seed in (27, 28)]
    for seed in (27, 28):
        post(server, f"other {seed}", "evict")  # all of it is on disk
    held = set(store_files(home))
    server.chat([user(3 * BLOCK, 26)], agent="secret")
    post(server, "secret", "evict")
    written = [p for p in store_files(home) if p not in held and p.suffix == ".safetensors"]
    codes = [p.read_bytes()[-512:] for p in written]
    assert len(codes) == 4  # three blocks and a tail
    assert any(token_run(26) in p.read_bytes() for p in store_files(home))
    assert server.client.delete(path("secret")).json()["deleted"]
    for file in (p for p in home.rglob("*") if p.is_file()):
        content = file.read_bytes()
        assert not any(found in content for found in (token_run(26), *codes)), file
    assert not any(p.exists() for p in written)
    for seed, before in zip((27, 28), others, strict=True):
        again = server.chat([user(3 * BLOCK, seed)], agent=f"other {seed}")
        assert (text(again), cached(again)[1]) == (
            text(before),
            before["usage"]["prompt_tokens"] - 1,
        )


# -- export and import


@pytest.fixture(scope="module")
def other(model, tmp_path_factory):
    """A second server, of the same model, with a store of its own."""
    flags = (*FLAGS, "--store-quota", "2M", "--store-min-free", "0")
    with ServerProcess(tmp_path_factory.mktemp("other") / "home", *flags, model=model) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def archive(server) -> bytes:
    chat = server.chat([user(3 * BLOCK, 30)], agent="traveller")
    server.history = [user(3 * BLOCK, 30), answered(chat), user(10, 31)]
    return server.client.post(path("traveller", "export")).content


def test_an_imported_agent_is_warm_and_answers_like_the_exported_one(server, other, archive):
    imported = other.client.post("/agents/import", content=archive).json()
    assert (imported["agent_id"], imported["tier"]) == ("traveller", "warm")
    assert imported["tokens"] == server.client.get(path("traveller")).json()["tokens"]
    here = server.chat(server.history, agent="traveller")
    there = other.chat(server.history, agent="traveller")
    assert text(there) == text(here)
    assert cached(there) == ("warm", imported["tokens"])
    response = server.client.post(path("traveller", "export"))
    assert response.headers["content-type"] == "application/x-tar"
    assert "attachment" in response.headers["content-disposition"]
    assert not list((other.home / "store").rglob("exports/*"))


def test_an_import_that_is_no_archive_is_refused_and_leaves_nothing(server, other, archive):
    before, files = names(other), files_at_rest(other)
    damaged = bytearray(archive)
    damaged[len(damaged) // 2] ^= 1
    opaque = tampered(archive, fingerprint="0" * 32)
    bad = [
        b"junk" * 1000,
        archive[: len(archive) // 2],
        archive[:100],
        bytes(damaged),
        bytes(10_240),
        opaque,
    ]
    for content in bad:
        response = other.client.post("/agents/import", params={"agent_id": "bad"}, content=content)
        assert refused(response)[::2] == (400, "file"), content[:20]
    empty = refused(other.client.post("/agents/import"))
    assert empty[::2] == (400, "file") and "empty" in empty[3]
    large = refused(other.client.post("/agents/import", content=bytes(5_000_000)))
    assert large[:3] == (400, "request_too_large", "file") and f"{2 << 20:,}" in large[3]
    for name in ("", "x" * 257, "a\nb"):
        answer = refused(
            other.client.post("/agents/import", params={"agent_id": name}, content=archive)
        )
        assert answer[:3] == (400, "invalid_value", "agent_id")
    assert (names(other), files_at_rest(other)) == (before, files)
    assert not [
        p for p in other.home.iterdir() if p.name not in ("store", "cache", "models", "server.log")
    ]


def said(archive: bytes) -> dict:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return json.load(tar.extractfile("agent.json"))


def tampered(archive: bytes, **changes) -> bytes:
    """Return the archive with other things said in agent.json, and a checksum that fits."""
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        tarfile.open(fileobj=out, mode="w") as new,
    ):
        for member in old.getmembers():
            data = old.extractfile(member).read()
            if member.name == "agent.json":
                data = json.dumps(json.loads(data) | changes).encode()
            if member.name == "checksum":
                data = xxhash.xxh3_128_hexdigest(out.getvalue()).encode()
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return out.getvalue()


def test_an_archive_that_says_what_it_should_not_is_refused_and_leaves_nothing(
    server, other, archive
):
    about = said(archive)
    before, files = names(other), files_at_rest(other)
    loop = [{**about["blocks"][0], "parent": 1}, *about["blocks"][1:]]
    for changes in (
        {"branches": []},
        {"branches": None},
        {"branches": [{**about["branches"][0], "head": 99}]},
        {"branches": [{**about["branches"][0], "last_used": "now"}]},
        {"blocks": loop},
        {"blocks": [{**block, "tokens": block["tokens"][:-1]} for block in about["blocks"]]},
        {"blocks": [{**block, "tokens": [-1] * BLOCK} for block in about["blocks"]]},
        {"blocks": [{**block, "file": "../../etc/passwd"} for block in about["blocks"]]},
        {"version": 2},
        {"format": "other"},
    ):
        response = other.client.post(
            "/agents/import", params={"agent_id": "bad"}, content=tampered(archive, **changes)
        )
        assert refused(response)[0] == 400, changes
    assert (names(other), files_at_rest(other)) == (before, files)


def files_at_rest(server: ServerProcess) -> set[Path]:
    """Return its store's files, once its agents' tails are saved and what is to go is gone."""
    for agent in names(server):
        post(server, agent, "evict")
    server.client.post("/store/gc")
    return set(store_files(server.home))


def connect(server: ServerProcess) -> socket.socket:
    url = urlsplit(server.url)
    return socket.create_connection((url.hostname, url.port), timeout=30)


def test_of_an_import_that_ends_half_way_nothing_is_left(server, other, archive):
    before, files = names(other), files_at_rest(other)
    inside = {p.name for p in other.home.iterdir()}
    with connect(other) as sock:
        head = "POST /v1/agents/import?agent_id=half HTTP/1.1\r\nhost: localhost\r\n"
        head += f"content-length: {len(archive)}\r\n"
        sock.sendall(head.encode() + b"\r\n" + archive[: len(archive) // 2])
        time.sleep(0.2)
    time.sleep(0.3)
    assert names(other) == before
    assert {p.name for p in other.home.iterdir()} == inside
    assert files_at_rest(other) == files


def test_an_import_that_finds_no_room_on_disk_can_be_tried_again(tmp_path):
    app = create_app(FakeEngine(room_bytes=100), Settings(home=tmp_path / "unmounted"), None)

    async def post_import() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client:
            return await client.post("/v1/agents/import", content=b"x")

    response = asyncio.run(post_import())
    assert refused(response)[:2] == (503, "store_failed")
    assert response.headers["retry-after"]


def test_an_export_that_the_client_does_not_read_leaves_nothing_in_exports(server, home):
    server.chat([user(900, 32)], agent="large", max_tokens=2)
    with connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        a_reset = struct.pack("ii", 1, 0)  # not a goodbye
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, a_reset)
        sock.sendall(
            b"POST /v1/agents/large/export HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n"
        )
        assert sock.recv(64).startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 10
    while list((home / "store").rglob("exports/*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.client.post(path("large", "export")).status_code == 200
    assert server.client.delete(path("large")).json()["deleted"]


def test_an_export_of_a_damaged_agent_ends_without_its_end(server, home):
    """The status is long said by then: the client sees a transfer that breaks off."""
    server.chat([user(3 * BLOCK, 33)], agent="damaged")
    post(server, "damaged", "evict")
    newest = max((home / "store").rglob("blocks/*/*.safetensors"), key=lambda p: p.stat().st_mtime)
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(httpx.RemoteProtocolError):
        server.client.post(path("damaged", "export"))
    assert not list((home / "store").rglob("exports/*"))
    chat = server.chat([user(3 * BLOCK, 33)], agent="damaged")
    assert text(chat) == text(server.chat([user(3 * BLOCK, 33)], agent="damaged, never"))
    assert server.client.post(path("damaged", "export")).status_code == 200


# -- namespaces


def test_namespaces_can_do_nothing_to_each_others_agents(model, tmp_path):
    keys = write_keys(tmp_path / "keys.toml")
    with ServerProcess(tmp_path / "home", *FLAGS, "--api-keys", str(keys), model=model) as server:
        a, b = (
            httpx.Client(base_url=server.url, headers={"x-api-key": key}, timeout=60)
            for key in KEYS.values()
        )
        with a, b:
            body = {
                "messages": [user(3 * BLOCK, 40)],
                "agent_id": "mine",
                "temperature": 0,
                "max_tokens": 8,
            }
            first = a.post("/chat/completions", json=body).json()
            shown = a.get(path("mine")).json()
            assert b.get("/agents").json()["data"] == []
            answers = [b.post(path("mine", op), json=BODIES.get(op)) for op in OPERATIONS]
            answers += [b.get(path("mine")), b.delete(path("mine"))]
            assert {refused(answer)[:3] for answer in answers} == {
                (404, "agent_not_found", "agent_id")
            }
            assert a.get(path("mine")).json()["last_used"] == shown["last_used"]
            # the same name is another agent, and the same prompt is cold
            second = b.post("/chat/completions", json=body).json()
            assert (text(second), cached(second)) == (text(first), ("cold", 0))
            archive = a.post(path("mine", "export")).content
            assert (
                b.post("/agents/import", params={"agent_id": "theirs"}, content=archive).status_code
                == 200
            )
            assert len(a.get("/agents").json()["data"]) == 1
            assert b.delete(path("mine")).json()["deleted"]
            assert (
                cached(a.post("/chat/completions", json=body).json())[1]
                == first["usage"]["prompt_tokens"] - 1
            )
        assert server.stop() == 0


def test_a_miss_is_explained_with_the_first_text_that_differs(server):
    first = [user(40, 700), {"role": "assistant", "content": "w9"}, user(20, 701)]
    server.chat(first, "why", max_tokens=4)
    explained = server.client.get(path("why", "explain")).json()
    assert (explained["cause"], explained["branch_tokens"]) == ("first", 0)

    edited = [user(40, 700), {"role": "assistant", "content": "w10"}, user(20, 701)]
    would = server.client.post(path("why", "explain"), json={"messages": edited}).json()
    assert would["cause"] == "parted"
    assert (would["cached"]["text"].split()[0], would["prompt"]["text"].split()[0]) == ("w9", "w10")
    assert would["before"]["text"].split()[-1] == "assistant"

    chat = server.chat(edited, "why", max_tokens=4)
    assert (chat["agentmem"]["cause"], chat["agentmem"]["cached_tokens"]) == (
        "parted",
        would["cached_tokens"],
    )
    last = server.client.get(path("why", "explain")).json()
    assert last == would
    assert server.chat(edited, "why", max_tokens=4)["agentmem"]["cause"] == "repeated"
    assert (
        'agentmem_prefix_total{cause="parted"}'
        in server.client.get(server.url.removesuffix("/v1") + "/metrics").text
    )
    assert server.client.get(path("nobody", "explain")).status_code == 404
    for body in ({}, {"messages": edited, "prompt": "w1"}):
        assert server.client.post(path("why", "explain"), json=body).status_code == 400
