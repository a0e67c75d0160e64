"""Two keys of one server, in every API: neither sees, hits or can time what the other one has."""

import statistics
import time

import httpx
import pytest

from support.chat_http import FLAGS, KEYS, user, words, write_keys
from support.server_process import ServerProcess

AGENT = "the-agent-of-both"
APIS = {
    "/v1/chat/completions": {"messages": [user(200, seed=1)], "max_tokens": 4},
    "/v1/completions": {"prompt": words(200, seed=2), "max_tokens": 4},
    "/v1/responses": {"input": words(200, seed=3), "max_output_tokens": 4},
    "/v1/messages": {"model": "default", "messages": [user(200, seed=4)], "max_tokens": 4},
    "/api/chat": {"model": "default", "messages": [user(200, seed=5)], "stream": False},
    "/api/generate": {"model": "default", "prompt": words(200, seed=6), "stream": False},
}


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    home = tmp_path_factory.mktemp("namespaces")
    keys = str(write_keys(home / "keys.toml"))
    with ServerProcess(home / "home", *FLAGS, "--api-keys", keys, model=model) as server:
        yield server.url.removesuffix("/v1")
        assert server.stop() == 0


def client(url, name):
    return httpx.Client(base_url=url, headers={"x-api-key": KEYS[name]}, timeout=120)


def ask(http, path, agent):
    body = APIS[path] | {"agent_id": agent, "temperature": 0}
    if path == "/v1/messages":
        body["metadata"] = {"user_id": body.pop("agent_id")}
    if path.startswith("/api"):
        body["options"] = {"num_predict": 4, "temperature": body.pop("temperature")}
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    cost = told if "agentmem" in told else told["choices"][0]
    return cost["agentmem"]


@pytest.mark.parametrize("path", APIS)
def test_what_one_key_has_cached_is_no_hit_of_the_other_one(path, url):
    agent = f"{AGENT}{path.replace('/', '-')}"
    with client(url, "a") as a, client(url, "b") as b:
        first = ask(a, path, agent)
        other = ask(b, path, agent)
        again = ask(a, path, agent)
    # a template's first tokens are those of earlier prompts of the same key
    assert first["cached_tokens"] == other["cached_tokens"] < 50
    assert again["cached_tokens"] >= 199


def test_nothing_that_one_key_asks_for_by_name_tells_of_the_other_ones(url):
    with client(url, "a") as a, client(url, "b") as b:
        ask(a, "/v1/chat/completions", "only-a")
        said = a.post("/v1/responses", json=APIS["/v1/responses"] | {"agent_id": "only-a"}).json()
        listed = b.get("/v1/agents").json()
        assert "only-a" not in str(listed)
        assert "only-a" in str(a.get("/v1/agents").json())
        for method, path in (
            ("GET", "/v1/agents/{}"),
            ("GET", "/v1/agents/{}/transcript"),
            ("POST", "/v1/agents/{}/evict"),
            ("DELETE", "/v1/agents/{}"),
        ):
            known = b.request(method, path.format("only-a"))
            unknown = b.request(method, path.format("nobody"))
            assert known.status_code == unknown.status_code == 404
            assert known.text.replace("only-a", "nobody") == unknown.text
        gone_on = APIS["/v1/responses"] | {"previous_response_id": said["id"]}
        theirs = b.post("/v1/responses", json=gone_on)
        nobodys = b.post("/v1/responses", json=gone_on | {"previous_response_id": "resp_nobody"})
        assert theirs.status_code == nobodys.status_code
        assert theirs.text.replace(said["id"], "resp_nobody") == nobodys.text
        assert a.post("/v1/responses", json=gone_on).status_code == 200


def test_metrics_and_health_name_nobody(url):
    with client(url, "a") as a:
        ask(a, "/v1/chat/completions", "named-in-no-metric")
    with httpx.Client(base_url=url) as anybody:
        told = anybody.get("/metrics").text + anybody.get("/health").text
    assert "named-in-no-metric" not in told
    assert all(key not in told for key in KEYS.values())
    labels = [line for line in told.splitlines() if "namespace" in line]
    assert labels == []


def test_time_does_not_tell_whether_another_key_has_such_an_agent(url):
    def took(http, path):
        began = time.perf_counter()
        assert http.get(path).status_code == 404
        return time.perf_counter() - began

    with client(url, "a") as a, client(url, "b") as b:
        ask(a, "/v1/chat/completions", "timed")
        times = {"timed": [], "nobody": []}
        for _ in range(150):
            for name, found in times.items():
                found.append(took(b, f"/v1/agents/{name}"))
    known, unknown = (statistics.median(found) for found in times.values())
    assert 0.7 < known / unknown < 1.4
