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


UNFIT = ["x" * 257, "a\nb", "\x7f", "\ud800"]
OURS = [rank for rank in RANKS if rank[0] == "agent_id"]
THEIRS = [rank for rank in RANKS if rank[0] != "agent_id"]


def names(ranks):
    return [name for name, _, _ in ranks]


@pytest.mark.parametrize("value", ["", *UNFIT[:3]])
@pytest.mark.parametrize(("name", "where", "what"), OURS)
def test_what_is_meant_for_this_server_is_refused_where_it_can_be_no_agent_id(
    name, where, what, value
):
    (key,) = what
    with pytest.raises(InvalidRequest) as e:
        agent_of([(name, where, {key: value}), RANKS[-1]])
    assert e.value.param == name


@pytest.mark.parametrize("value", UNFIT)
@pytest.mark.parametrize(("name", "where", "what"), THEIRS, ids=names(THEIRS))
def test_what_other_clients_say_is_hashed_where_it_can_be_no_agent_id(name, where, what, value):
    (key,) = what
    if where == "header":
        value = value.encode(errors="surrogatepass")
    found = agent_of([(name, where, {key: value})])
    assert found.startswith("sha256-") and len(found) == 39
    assert found == agent_of([(name, where, {key: value})])
    other = value + value[:1]
    assert found != agent_of([(name, where, {key: other})])


@pytest.mark.parametrize("name", ["prompt_cache_key", "user", "safety_identifier"])
@pytest.mark.parametrize(
    ("value", "expected"), [(7, "7"), (True, "true"), ({"a": [1]}, '{"a": [1]}')]
)
def test_what_is_no_text_is_its_json(name, value, expected):
    assert agent_of([(name, "body", {name: value})]) == expected


@pytest.mark.parametrize(("name", "where", "what"), THEIRS, ids=names(THEIRS))
def test_an_empty_text_says_nothing(name, where, what):
    (key,) = what
    if key != "safety_identifier":
        assert agent_of([(name, where, {key: ""}), RANKS[-1]]) == "safety"
    assert agent_of([(name, where, {key: ""})]) == "anonymous"


def test_x_agent_id_that_is_not_utf8_is_refused_by_name():
    assert agent_of([("agent_id", "header", {"x-agent-id": "ü🦊".encode()})]) == "ü🦊"
    with pytest.raises(InvalidRequest) as e:
        agent_of([("agent_id", "header", {"x-agent-id": b"\xff"})])
    assert e.value.param == "agent_id"


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
