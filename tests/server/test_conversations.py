"""What the server keeps of conversations, against real server processes on a tiny model."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from support.chat_http import (
    FLAGS,
    KEYS,
    answered,
    path,
    refused,
    transcript,
    user,
    words,
    write_keys,
)
from support.server_process import ServerProcess


def context(server: ServerProcess, agent: str, **body) -> dict:
    response = server.client.post(path(agent, "context"), json=body)
    assert response.status_code == 200, response.text
    return response.json()


def go_on(server: ServerProcess, messages: list, agent: str, **more) -> dict:
    return server.chat(messages, agent=agent, max_tokens=8, agentmem={"continue": True, **more})


def test_a_request_that_continues_sends_the_new_messages_only_and_is_answered_as_if_it_had_sent_all(
    server,
):
    said = [user(40, 1)]
    said += [answered(server.chat(said, agent="go", max_tokens=8)), user(10, 2)]
    short = go_on(server, [said[2]], "go")
    full = server.chat(said, agent="all at once", max_tokens=8)
    assert answered(short) == answered(full)
    assert short["usage"]["prompt_tokens"] == full["usage"]["prompt_tokens"]
    new = 10 + 7  # words, markers and the last token
    assert short["agentmem"]["cached_tokens"] >= full["usage"]["prompt_tokens"] - new
    shown = transcript(server, "go")
    assert shown["messages"] == [*said, answered(short)]
    assert [turn["id"] for turn in shown["turns"]][-1] == short["agentmem"]["turn"] == shown["turn"]


def test_an_agent_without_a_transcript_cannot_be_continued(server):
    response = server.client.post(
        "/chat/completions",
        json={"messages": [user(3, 1)], "agent_id": "nobody", "agentmem": {"continue": True}},
    )
    assert refused(response)[:3] == (404, "transcript_not_found", "agentmem.continue")
    assert refused(server.client.get(path("nobody", "transcript")))[:3] == (
        404,
        "transcript_not_found",
        "agent_id",
    )


def test_edits_retries_and_title_calls_are_branches_and_any_can_be_continued(server):
    first = server.chat([user(20, 1)], agent="tree", max_tokens=4)
    said = [user(20, 1), answered(first)]
    second = server.chat([*said, user(5, 2)], agent="tree", max_tokens=4)
    edited = server.chat([*said, user(5, 3)], agent="tree", max_tokens=4)
    title = server.chat([user(8, 4)], agent="tree", max_tokens=4)

    def shown(chat: dict) -> list:
        return transcript(server, "tree", turn=chat["agentmem"]["turn"])["messages"]

    assert shown(first) == said
    assert shown(second) == [*said, user(5, 2), answered(second)]
    assert shown(edited) == [*said, user(5, 3), answered(edited)]
    assert shown(title) == transcript(server, "tree")["messages"] == [user(8, 4), answered(title)]
    on_second = go_on(server, [user(4, 5)], "tree", turn=second["agentmem"]["turn"])
    assert shown(on_second)[:4] == shown(second)
    added = [turn["messages"] for turn in transcript(server, "tree")["turns"]]
    assert added == [2, 2, 2]  # each only what it added


def test_a_stream_leaves_the_turn_that_its_answer_would(server):
    body = {
        "messages": [user(9, 1)],
        "agent_id": "streamed",
        "stream": True,
        "max_tokens": 6,
        "temperature": 0,
    }
    events = [e for e in server.client.post("/chat/completions", json=body).text.split("\n\n") if e]
    chunks = [json.loads(e.removeprefix("data: ")) for e in events[:-1]]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert transcript(server, "streamed")["messages"] == [
        user(9, 1),
        {"role": "assistant", "content": text},
    ]
    assert chunks[-1]["agentmem"]["turn"] == transcript(server, "streamed")["turn"]


def test_who_has_no_name_or_says_store_false_leaves_no_turn(server):
    server.chat([user(9, 1)], agent="unstored", max_tokens=2, store=False)
    assert refused(server.client.get(path("unstored", "transcript")))[0] == 404
    first = server.chat([user(9, 1)], agent="stored once", max_tokens=2)["agentmem"]["turn"]
    body = {"agentmem": {"continue": True}, "max_tokens": 2, "store": False}
    assert server.chat([user(9, 2)], agent="stored once", **body)["agentmem"]["turn"] is None
    assert [turn["id"] for turn in transcript(server, "stored once")["turns"]] == [first]
    chat = server.client.post(
        "/chat/completions", json={"messages": [user(9, 1)], "max_tokens": 2}
    ).json()
    assert chat["agentmem"]["turn"] is None


def test_context_that_arrives_in_pieces_is_prefilled_once_and_seen_by_the_question_after_it(server):
    pieces = [words(50, seed) + " " for seed in range(4)]
    done = [context(server, "rag", text=piece) for piece in pieces]
    assert [d["cached_tokens"] for d in done[1:]] == [d["prompt_tokens"] - 1 for d in done[:-1]]
    assert transcript(server, "rag")["messages"] == [{"role": "user", "content": "".join(pieces)}]
    assert len(transcript(server, "rag")["turns"]) == 1
    asked = go_on(server, [user(5, 9)], "rag")
    assert asked["agentmem"]["cached_tokens"] >= done[-1]["prompt_tokens"] - 1
    plain = server.chat(
        [{"role": "user", "content": "".join(pieces)}, user(5, 9)], agent="plain rag", max_tokens=8
    )
    assert answered(asked) == answered(plain)


def test_context_under_a_key_is_replaced_where_it_stands_from_the_first_difference_on(server):
    for key, seed in (("one", 1), ("two", 2), ("three", 3)):
        context(server, "keyed", messages=[user(40, seed)], key=key)
    changed = words(30, 2) + " " + words(10, 99)
    done = context(server, "keyed", messages=[{"role": "user", "content": changed}], key="two")
    assert [m["content"] for m in transcript(server, "keyed")["messages"]] == [
        words(40, 1),
        changed,
        words(40, 3),
    ]
    assert 40 + 30 <= done["cached_tokens"] <= 40 + 30 + 8
    again = context(server, "keyed", messages=[{"role": "user", "content": changed}], key="two")
    assert again["turn"] == done["turn"] and again["cached_tokens"] == again["prompt_tokens"] - 1
    replaced = context(server, "keyed", messages=[user(40, 1), user(5, 7)], mode="replace")
    assert transcript(server, "keyed")["messages"] == [user(40, 1), user(5, 7)]
    assert replaced["cached_tokens"] >= 40


@pytest.mark.parametrize("operation", ["context", "prewarm"])
def test_a_streamed_prefill_tells_how_far_it_is_and_ends_with_what_it_cost(server, operation):
    body = {"messages": [user(400, ord(operation[0]))], "stream": True}
    text = server.client.post(path(f"progress {operation}", operation), json=body).text
    events = [e.split("\n") for e in text.split("\n\n") if e and not e.startswith(":")]
    told = [(e[0].removeprefix("event: "), json.loads(e[1].removeprefix("data: "))) for e in events]
    progress = [data["tokens"] for name, data in told if name == "progress"]
    assert progress == sorted(progress) and len(progress) >= 400 // 64
    assert (
        told[-1][0] == "done"
        and told[-1][1]["prompt_tokens"] == told[0][1]["total"] == progress[-1] + 1
    )


def test_a_prefill_that_cannot_be_is_refused_before_the_stream_begins(server):
    response = server.client.post(
        path("too long", "context"), json={"text": words(1100, 1), "stream": True}
    )
    assert refused(response)[:3] == (400, "context_length_exceeded", "messages")
    assert refused(server.client.get(path("too long", "transcript")))[0] == 404
    for content in (5, [5], [{"type": "text"}], None):
        wrong = {"messages": [{"role": "user", "content": content}], "key": "k"}
        assert server.client.post(path("wrong", "context"), json=wrong).status_code == 400
    nowhere = {"messages": [user(1, 1)], "agentmem": {"turn": "turn_x"}}
    assert server.client.post("/chat/completions", json=nowhere).status_code == 400
    both = server.client.post(
        path("both", "context"), json={"text": "w9", "messages": [user(1, 1)]}
    )
    assert refused(both)[:3] == (400, "invalid_value", None)


def test_a_request_that_a_client_sends_again_adds_nothing_twice(server):
    server.chat([user(9, 1)], agent="again", max_tokens=2)
    body = {
        "messages": [user(3, 2)],
        "agent_id": "again",
        "max_tokens": 2,
        "agentmem": {"continue": True},
    }
    for count in ("0", "1"):
        server.client.post(
            "/chat/completions", json=body, headers={"x-stainless-retry-count": count}
        )
    assert len(transcript(server, "again")["messages"]) == 4
    for count in ("0", "1"):
        told = {"text": "w9 w10"}
        server.client.post(
            path("again", "context"), json=told, headers={"x-stainless-retry-count": count}
        )
    assert [m["content"] for m in transcript(server, "again")["messages"][4:]] == ["w9 w10"]


def test_a_deleted_agent_has_no_transcript_and_its_next_one_is_new(server):
    server.chat([user(9, 1)], agent="gone", max_tokens=2)
    assert server.client.delete("/agents/gone").status_code == 200
    assert refused(server.client.get(path("gone", "transcript")))[0] == 404
    server.chat([user(9, 2)], agent="gone", max_tokens=2)
    assert transcript(server, "gone")["messages"][0] == user(9, 2)
    assert len(transcript(server, "gone")["turns"]) == 1


@pytest.mark.parametrize("encrypted", [False, True])
def test_transcripts_survive_a_kill_and_stand_on_disk_as_the_store_is_encrypted_or_not(
    model, tmp_path, encrypted
):
    home, secret = tmp_path / "home", "w77 w78 w79 w80 w81"
    flags = [*FLAGS, *(["--encrypt", "--key-file", str(tmp_path / "key")] if encrypted else [])]
    with ServerProcess(home, *flags, model=model) as server:
        first = server.chat([{"role": "user", "content": secret}], agent="kept", max_tokens=4)
        server.chat(
            [{"role": "user", "content": secret}],
            agent="mist",
            max_tokens=4,
            agentmem={"ephemeral": True},
        )
        assert transcript(server, "mist")["messages"][0]["content"] == secret
        last = go_on(server, [user(3, 2)], "kept")
        server.client.post("/store/gc")  # what was written before it is on disk then
        server.process.send_signal(signal.SIGKILL)
    on_disk = b"".join(p.read_bytes() for p in (home / "store").rglob("manifest.sqlite*"))
    assert (secret.encode() in on_disk) is not encrypted
    with ServerProcess(home, *flags, model=model) as server:
        assert transcript(server, "kept")["turn"] == last["agentmem"]["turn"]
        assert transcript(server, "kept")["messages"][0]["content"] == secret
        assert transcript(server, "kept", turn=first["agentmem"]["turn"])["messages"][
            1
        ] == answered(first)
        assert refused(server.client.get(path("mist", "transcript")))[0] == 404
        assert len(go_on(server, [user(3, 3)], "kept")["agentmem"]["turn"]) > 5
        server.client.delete("/agents/kept")
        on_disk = b"".join(p.read_bytes() for p in (home / "store").rglob("manifest.sqlite*"))
        assert secret.encode() not in on_disk
        assert server.stop() == 0


def test_a_namespace_sees_nothing_of_another_ones_transcripts(model, tmp_path):
    keys = write_keys(tmp_path / "keys.toml")
    with ServerProcess(tmp_path / "home", *FLAGS, "--api-keys", str(keys), model=model) as server:
        a, b = ({"headers": {"authorization": f"Bearer {KEYS[name]}"}} for name in "ab")
        body = {"messages": [user(9, 1)], "agent_id": "same", "max_tokens": 2}
        turn = server.client.post("/chat/completions", json=body, **a).json()["agentmem"]["turn"]
        assert server.client.get(path("same", "transcript"), **a).json()["turn"] == turn
        assert refused(server.client.get(path("same", "transcript"), **b))[0] == 404
        more = {**body, "agentmem": {"continue": True, "turn": turn}}
        assert refused(server.client.post("/chat/completions", json=more, **b))[0] == 404
        assert server.stop() == 0


def test_a_fork_takes_the_transcript_along_and_goes_its_own_way(server):
    server.chat([user(20, 1)], agent="source", max_tokens=4)
    assert server.client.post(path("source", "fork"), json={"to": "copy"}).status_code == 200
    before = transcript(server, "source")
    assert transcript(server, "copy")["messages"] == before["messages"]
    go_on(server, [user(4, 2)], "copy")
    assert transcript(server, "source") == before


def test_a_truncation_forgets_the_turns_that_it_cuts(server):
    first = server.chat([user(20, 1)], agent="cut", max_tokens=4)
    go_on(server, [user(4, 2)], "cut")
    assert server.client.post(path("cut", "truncate"), json={"messages": 2}).status_code == 200
    assert transcript(server, "cut")["turn"] == first["agentmem"]["turn"]
    assert len(go_on(server, [user(4, 3)], "cut")["choices"]) == 1
    assert transcript(server, "cut")["messages"][2] == user(4, 3)


def test_a_truncation_leaves_other_paths_alone_and_the_conversation_goes_on_where_it_was_cut(
    server,
):
    first = server.chat([user(20, 1)], agent="tree cut", max_tokens=4)
    said = [user(20, 1), answered(first)]
    title = server.chat([user(8, 4)], agent="tree cut", max_tokens=4)
    edits = [
        server.chat([*said, user(30, seed)], agent="tree cut", max_tokens=4) for seed in (2, 3)
    ]
    assert server.client.post(path("tree cut", "truncate"), json={"messages": 2}).status_code == 200
    assert transcript(server, "tree cut")["messages"] == said
    for other, messages in (
        (title, [user(8, 4), answered(title)]),
        (edits[0], [*said, user(30, 2), answered(edits[0])]),
    ):
        assert (
            transcript(server, "tree cut", turn=other["agentmem"]["turn"])["messages"] == messages
        )
    gone = server.client.get(
        path("tree cut", "transcript"), params={"turn": edits[1]["agentmem"]["turn"]}
    )
    assert refused(gone)[0] == 404
    short = go_on(server, [user(5, 5)], "tree cut")
    assert transcript(server, "tree cut")["messages"] == [*said, user(5, 5), answered(short)]


def test_what_was_begun_before_an_agent_was_deleted_leaves_no_turn(server):
    body = {
        "messages": [user(9, 1)],
        "agent_id": "deleted",
        "stream": True,
        "max_tokens": 200,
        "ignore_eos": True,
    }
    with server.client.stream("POST", "/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.client.delete("/agents/deleted")
        rest = list(lines)
    assert any('"finish_reason":"length"' in line and '"turn":null' in line for line in rest)
    assert refused(server.client.get(path("deleted", "transcript")))[0] == 404


def test_an_agent_whose_caches_left_the_store_goes_on_from_what_was_said(model, tmp_path):
    with ServerProcess(tmp_path, *FLAGS, model=model) as server:
        said = [user(40, 1)]
        said += [answered(server.chat(said, agent="text only", max_tokens=8)), user(10, 2)]
        full = server.chat(said, agent="full", max_tokens=8)
        assert server.stop() == 0
    (manifest,) = tmp_path.rglob("manifest.sqlite")
    with closing(sqlite3.connect(manifest)) as db, db:
        for table in ("branches", "blocks"):
            db.execute(f"DELETE FROM {table}")
    with ServerProcess(tmp_path, *FLAGS, model=model) as server:
        shown = {a["agent_id"]: a["tokens"] for a in server.client.get("/agents").json()["data"]}
        assert shown == {"text only": 0, "full": 0}
        again = go_on(server, [said[2]], "text only")
        assert answered(again) == answered(full) and again["agentmem"]["cache"] == "cold"
        for operation in ("evict", "pin", "unpin"):
            assert server.client.post(path("full", operation)).status_code == 200
        assert server.client.delete("/agents/full").status_code == 200
        assert refused(server.client.get(path("full", "transcript")))[0] == 404
        assert server.stop() == 0


def test_the_command_line_shows_a_transcript(server):
    chat = server.chat([user(5, 1)], agent="shown", max_tokens=2)
    command = [
        sys.executable,
        "-m",
        "agentmem",
        "agents",
        "--url",
        server.url,
        "transcript",
        "shown",
    ]
    shown = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    )
    assert shown == transcript(server, "shown") and shown["messages"][1] == answered(chat)
    older = subprocess.run(
        [*command, "--turn", "turn_none"], capture_output=True, text=True, timeout=60
    )
    assert older.returncode != 0 and "turn_none" in older.stderr


def test_pieces_that_arrive_at_once_are_all_kept_and_a_question_waits_for_what_came_before_it(
    server,
):
    first = context(server, "at once", text=words(5, 0))
    with ThreadPoolExecutor(6) as threads:
        done = list(
            threads.map(lambda i: context(server, "at once", text=f" {words(60, i)}"), range(1, 6))
        )
    (message,) = transcript(server, "at once")["messages"]
    pieces = [words(5, 0), *(words(60, i) for i in range(1, 6))]
    assert sorted(message["content"].split()) == sorted(" ".join(pieces).split())
    assert sorted(d["prompt_tokens"] for d in done) == [
        first["prompt_tokens"] + 60 * i for i in range(1, 6)
    ]
    with ThreadPoolExecutor(2) as threads:
        told = threads.submit(context, server, "at once", messages=[user(200, 7)])
        time.sleep(0.05)
        asked = threads.submit(go_on, server, [user(3, 8)], "at once")
        assert asked.result()["usage"]["prompt_tokens"] > told.result()["prompt_tokens"]
    assert transcript(server, "at once")["messages"][:3] == [message, user(200, 7), user(3, 8)]


@pytest.mark.parametrize("operation", ["continue", "context", "prewarm"])
def test_an_error_names_the_field_of_the_messages_that_were_sent(server, operation):
    server.chat([user(9, 1)], agent="named", max_tokens=2)
    for wrong, param in (
        ({"role": "user", "content": 5}, "messages.1.content"),
        ({"role": "assistant", "tool_calls": 5}, "messages.1.tool_calls"),
    ):
        url, body = path("named", operation), {"messages": [user(1, 1), wrong]}
        if operation == "continue":
            url, body = (
                "/chat/completions",
                {**body, "agent_id": "named", "agentmem": {"continue": True}},
            )
        response = server.client.post(url, json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == param


def beside_an_answer(server: ServerProcess, agent: str, tell) -> str:
    """Call `tell` while the agent answers user(4, 5); return the turn of the answer.

    The answer goes on from the agent's newest turn.
    """
    body = {
        "messages": [user(4, 5)],
        "agent_id": agent,
        "max_tokens": 300,
        "ignore_eos": True,
        "stream": True,
    }
    with server.client.stream(
        "POST", "/chat/completions", json={**body, "agentmem": {"continue": True}}
    ) as response:
        lines = response.iter_lines()
        next(lines)
        tell()
        chunks = [
            json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")
        ]
    return chunks[-1]["agentmem"]["turn"]


@pytest.mark.parametrize(
    "told", [{"text": "w100 w101"}, {"messages": [user(4, 6)]}, {"text": "w100", "key": "new"}]
)
def test_what_an_agent_is_told_while_it_answers_comes_after_the_answer(server, told):
    agent = f"told {told}"
    context(server, agent, text="w99 ")
    turn = beside_an_answer(server, agent, lambda: context(server, agent, **told))
    answer = transcript(server, agent, turn=turn)["messages"]
    assert (
        answer[:2] == [{"role": "user", "content": "w99 "}, user(4, 5)]
        and answer[2]["role"] == "assistant"
    )
    said = told.get("messages") or [{"role": "user", "content": told["text"]}]
    assert transcript(server, agent)["messages"] == [*answer, *said]
    assert len(transcript(server, agent)["turns"]) == 3


def test_an_answer_to_context_that_is_replaced_meanwhile_is_kept(server):
    context(server, "replaced", messages=[user(9, 1)], key="k")
    told = {"messages": [user(9, 2)], "key": "k"}
    turn = beside_an_answer(server, "replaced", lambda: context(server, "replaced", **told))
    assert transcript(server, "replaced", turn=turn)["messages"][:2] == [user(9, 1), user(4, 5)]


def test_an_answer_that_ends_while_context_is_prefilled_stays_before_it(server):
    server.chat([user(9, 1)], agent="overtaken", max_tokens=2)
    body = {"messages": [user(800, 2)], "stream": True}
    with ThreadPoolExecutor(1) as threads:
        told = threads.submit(server.client.post, path("overtaken", "context"), json=body)
        said = transcript(server, "overtaken")["messages"]
        answer = server.chat([*said, user(3, 8)], agent="overtaken", max_tokens=2)
        assert "event: done" in told.result().text
    assert transcript(server, "overtaken")["messages"] == [
        *said,
        user(3, 8),
        answered(answer),
        user(800, 2),
    ]


def test_what_waits_for_an_agent_that_is_deleted_is_not_told_to_its_next_one(server):
    body = {"messages": [user(480, 1)], "stream": True}
    with (
        ThreadPoolExecutor(1) as threads,
        server.client.stream("POST", path("waits", "context"), json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        second = threads.submit(
            server.client.post, path("waits", "context"), json={"messages": [user(480, 2)]}
        )
        time.sleep(0.03)
        server.client.delete("/agents/waits")
        list(lines)
        assert refused(second.result())[0] == 409
    assert server.client.get("/agents/waits").status_code == 404


def test_a_retry_is_an_answers_and_not_that_of_a_context_with_the_same_words(server):
    context(server, "same words", messages=[user(3, 2)])
    body = {
        "messages": [user(3, 2)],
        "agent_id": "same words",
        "max_tokens": 2,
        "agentmem": {"continue": True},
    }
    server.client.post("/chat/completions", json=body, headers={"x-stainless-retry-count": "1"})
    assert [m["role"] for m in transcript(server, "same words")["messages"]] == [
        "user",
        "user",
        "assistant",
    ]


def test_a_response_that_context_before_it_was_changed_for_is_told_under_its_own_id_alone(server):
    context(server, "rebased", messages=[user(9, 2)], key="k")
    body = {
        "input": "w9",
        "agent_id": "rebased",
        "max_output_tokens": 4,
        "agentmem": {"continue": True},
    }
    response = server.client.post("/responses", json=body).json()
    context(server, "rebased", messages=[user(9, 3)], key="k")
    shown = transcript(server, "rebased")
    assert shown["messages"][0] == user(9, 3) and shown["messages"][1]["content"] == "w9"
    assert server.client.get(f"/responses/{response['id']}").json()["id"] == response["id"]
    assert server.client.get(f"/responses/{shown['turn']}").status_code == 404
