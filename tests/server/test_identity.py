"""The agent of a request: the first of the places where clients say it counts."""

import json

import pytest
from starlette.datastructures import Headers

from agentmem.errors import InvalidRequest
from agentmem.server.api.identity import resolve_agent_id

SESSION = json.dumps({"device_id": "d", "account_uuid": "", "session_id": "in-user-id"})
RANKS = [  # (the field that an error names, where it is said, what is said)
    ("agent_id", "body", {"agent_id": "body"}),
    ("agent_id", "header", {"X-Agent-Id": "x-agent-id"}),
    ("x-claude-code-agent-id", "header", {"x-claude-code-agent-id": "subagent"}),
    ("thread-id", "header", {"thread-id": "thread"}),
    ("x-session-id", "header", {"X-Session-Id": "session"}),
    ("x-session-affinity", "header", {"x-session-affinity": "affinity"}),
    ("prompt_cache_key", "body", {"prompt_cache_key": "key"}),
    ("x-claude-code-session-id", "header", {"x-claude-code-session-id": "claude"}),
    ("metadata.agent_id", "metadata", {"agent_id": "in-metadata"}),
    ("metadata.user_id", "metadata", {"user_id": SESSION}),
    ("x-openwebui-chat-id", "header", {"X-OpenWebUI-Chat-Id": "chat"}),
    ("user", "body", {"user": "user"}),
    ("safety_identifier", "body", {"safety_identifier": "safety"}),
]


def agent_of(ranks):
    said = {"body": {}, "header": {}, "metadata": {}}
    for _, where, what in ranks:
        said[where] |= what
    raw = [
        (k.lower().encode(), v if isinstance(v, bytes) else v.encode())
        for k, v in said["header"].items()
    ]
    return resolve_agent_id(Headers(raw=raw), metadata=said["metadata"] or None, **said["body"])


@pytest.mark.parametrize("rank", range(len(RANKS)), ids=[name for name, _, _ in RANKS])
def test_each_place_comes_before_all_that_follow_it(rank):
    (said,) = RANKS[rank][2].values()
    expected = "in-user-id" if said == SESSION else said
    assert agent_of(RANKS[rank:]) == expected
    assert agent_of(RANKS[rank : rank + 1]) == expected


def test_who_says_nothing_is_anonymous():
    assert agent_of([]) == "anonymous"
    assert (
        resolve_agent_id(Headers({"session-id": "x"}), metadata={"other": "x", "user_id": None})
        == "anonymous"
    )


@pytest.mark.parametrize("value", ["", "x" * 257, "a\nb", 7])
@pytest.mark.parametrize(("name", "where", "what"), RANKS, ids=[name for name, _, _ in RANKS])
def test_what_can_be_no_agent_id_is_refused_by_name_and_nothing_else_is_taken(
    name, where, what, value
):
    value = "\x7f" if where == "header" and value == 7 else value  # headers are text
    (key,) = what
    with pytest.raises(InvalidRequest) as e:
        agent_of([(name, where, {key: value}), *RANKS[-1:] * (key != "safety_identifier")])
    assert e.value.param == name


@pytest.mark.parametrize(("name", "where", "what"), [r for r in RANKS if r[1] == "header"])
def test_header_that_is_not_utf8_is_refused_by_name(name, where, what):
    (key,) = what
    assert agent_of([(name, where, {key: "ü🦊".encode()})]) == "ü🦊"
    with pytest.raises(InvalidRequest) as e:
        agent_of([(name, where, {key: b"\xff"})])
    assert e.value.param == name


@pytest.mark.parametrize(
    ("user_id", "agent_id"),
    [
        (json.dumps({"session_id": "s", "agent_id": "a"}), "a"),
        (json.dumps({"session_id": "s"}), "s"),
        (json.dumps({"device_id": "d"}), "anonymous"),
        ("user_1_session_2", "user_1_session_2"),
        ("7", "7"),
        ("{", "{"),
    ],
)
def test_user_id_is_an_object_as_json_or_a_name(user_id, agent_id):
    assert resolve_agent_id(Headers(), metadata={"user_id": user_id}) == agent_id


def test_of_a_header_sent_twice_the_first_counts():
    assert resolve_agent_id(Headers(raw=[(b"x-session-id", b"a"), (b"x-session-id", b"b")])) == "a"
