"""Ollama's API, as the ollama package uses it, against a real server on a tiny model."""

import asyncio
import json

import httpx
import ollama
import pytest

from agentmem.server.api.ollama_messages import CallIds, to_messages
from agentmem.server.api.ollama_wire import OllamaOptions
from support.chat_http import FLAGS, KEYS, transcript, write_keys
from support.server_process import ServerProcess
from support.speaking_model import write_speaking_model

CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
PIECES = [
    *("<think>", "\nhm\n", "</think>", "\n\nI ", "look.\n"),
    *("<tool_call>", "\n" + CALL + "\n", "</tool_call>"),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HELLO = [{"role": "user", "content": "Weather in Paris?"}]
METRICS = {
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose model thinks, says that it looks, and asks for the weather in Paris."""
    home = tmp_path_factory.mktemp("speaking")
    model = write_speaking_model(home / "model", PIECES)
    with ServerProcess(home / "home", *FLAGS, model=model) as server:
        yield server
        assert server.stop() == 0


def host(server: ServerProcess) -> str:
    return server.url.removesuffix("/v1")


@pytest.fixture
def client(server):
    """A client of the package whose requests are an agent's."""
    with ollama.Client(host(server), headers={"x-agent-id": "package"}) as client:
        yield client


@pytest.fixture
def post(server):
    """What a request is answered with that is not streamed; errors too."""

    def post(path, expect=200, headers=None, **body):
        given = {"model": "default", "stream": False, **body}
        response = httpx.post(host(server) + path, json=given, headers=headers, timeout=60)
        assert response.status_code == expect, response.text
        return response.json()

    return post


@pytest.fixture
def chat(post):
    def chat(expect=200, headers=None, **body):
        given = {"messages": HELLO, **body}
        return post("/api/chat", expect, headers, **given)

    return chat


def test_the_package_reads_an_answer_of_thought_text_and_a_call(client):
    answer = client.chat("default", HELLO, tools=[TOOL], think=True)
    assert (answer.message.role, answer.message.thinking) == ("assistant", "hm")
    assert answer.message.content.strip() == "I look."
    (call,) = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", {"city": "Paris"})
    assert (answer.done, answer.done_reason, answer.model) == (True, "stop", "default")
    assert answer.eval_count == len(PIECES) + 1 and answer.prompt_eval_count > 0
    assert answer.total_duration > answer.eval_duration > 0
    assert answer.prompt_eval_duration > 0


def test_a_stream_adds_up_to_the_whole_answer(client, server):
    body = {"model": "default", "messages": HELLO, "tools": [TOOL]}
    response = httpx.post(host(server) + "/api/chat", json=body)  # to stream is the default
    assert response.headers["content-type"] == "application/x-ndjson"
    chunks = [json.loads(line) for line in response.text.splitlines()]
    assert [chunk["done"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(chunk["created_at"].endswith("Z") for chunk in chunks)
    assert chunks[-1].keys() >= METRICS and not METRICS & chunks[0].keys()
    whole = client.chat("default", HELLO, tools=[TOOL]).message
    parts = list(client.chat("default", HELLO, tools=[TOOL], stream=True))
    for said in ([chunk["message"] for chunk in chunks], [part.message for part in parts]):
        assert "".join(one.get("content") or "" for one in said) == whole.content
        assert "".join(one.get("thinking") or "" for one in said) == whole.thinking
        calls = [call for one in said for call in one.get("tool_calls") or ()]
        assert [call["function"]["name"] for call in calls] == ["weather"]


def test_a_round_of_tools_goes_on_from_what_is_cached_though_the_package_drops_ids(server):
    result = {"role": "tool", "tool_name": "weather", "content": "rain"}
    with ollama.Client(host(server), headers={"x-agent-id": "round"}) as client:
        first = client.chat("default", HELLO, tools=[TOOL])
        client.chat("default", [*HELLO, first.message, result], tools=[TOOL])
    told = transcript(server, "round")
    assert len(told["turns"]) == 2  # the second follows the first, and does not tell it again
    shown = told["messages"]
    assert [message["role"] for message in shown] == ["user", "assistant", "tool", "assistant"]
    calls = [shown[1]["tool_calls"][0]["id"], shown[3]["tool_calls"][0]["id"]]
    assert shown[2]["tool_call_id"] == calls[0] != calls[1]
    assert shown[1]["reasoning_content"] == "hm" and shown[2]["content"] == "rain"


def test_the_second_turn_is_cached(chat):
    first = chat(agent_id="second", options={"num_predict": 2})
    assert first["agentmem"]["cached_tokens"] == 0 and first["done_reason"] == "length"
    more = [*HELLO, first["message"], {"role": "user", "content": "And in Rome?"}]
    second = chat(agent_id="second", messages=more)
    cached = second["agentmem"]["cached_tokens"]
    assert first["prompt_eval_count"] <= cached < second["prompt_eval_count"]
    assert second["agentmem"]["agent_id"] == "second"


def test_the_async_client_chats_and_streams(server):
    async def work():
        async with ollama.AsyncClient(host(server)) as client:
            whole = await client.chat("default", HELLO)
            parts = [part async for part in await client.chat("default", HELLO, stream=True)]
        return whole.message.content, "".join(part.message.content or "" for part in parts)

    whole, streamed = asyncio.run(work())
    assert whole == streamed != ""


def test_generate_answers_a_prompt_whole_and_streamed(client):
    whole = client.generate("default", "Weather?", system="Be brief.")
    assert whole.thinking == "hm" and CALL in whole.response
    assert (whole.done, whole.done_reason) == (True, "stop")
    parts = list(client.generate("default", "Weather?", system="Be brief.", stream=True))
    assert "".join(part.response for part in parts) == whole.response
    assert "".join(part.thinking or "" for part in parts) == whole.thinking
    assert parts[-1].done and parts[-1].eval_count == whole.eval_count


def test_a_context_holds_what_was_said_before(post):
    first = post("/api/generate", prompt="My name is Ada.", agent_id="context")
    second = post("/api/generate", prompt="Who?", agent_id="context", context=first["context"])
    assert second["prompt_eval_count"] > len(first["context"])
    assert second["context"][: len(first["context"])] == first["context"]
    assert second["agentmem"]["cached_tokens"] >= first["prompt_eval_count"]
    both = [
        {"role": "user", "content": "My name is Ada."},
        None,
        {"role": "user", "content": "Who?"},
    ]
    both[1] = {"role": "assistant", "content": first["response"], "thinking": first["thinking"]}
    whole = post("/api/chat", messages=both)
    assert second["prompt_eval_count"] == whole["prompt_eval_count"]
    wrong = post("/api/generate", 400, prompt="Who?", context=[1 << 40])
    assert wrong["error"].startswith("context:")


def test_a_raw_prompt_goes_to_the_model_as_it_is(post):
    said = post("/api/generate", prompt="<|im_start|>user\nHi<|im_end|>\n", raw=True)
    assert said["response"].startswith("<think>") and "thinking" not in said
    assert "context" not in said and said["prompt_eval_count"] < 20


@pytest.mark.parametrize(
    ("options", "reason", "count"),
    [
        ({"num_predict": 3}, "length", 3),
        ({"num_predict": 3.7}, "length", 3),
        ({"num_predict": -1}, "stop", len(PIECES) + 1),
        ({"num_predict": -2}, "stop", len(PIECES) + 1),
        ({"num_predict": 0}, "length", 0),
        ({"stop": ["look"]}, "stop", 5),
        ({"stop": ""}, "stop", len(PIECES) + 1),
        ({"temperature": 0, "top_p": 0, "top_k": -1, "min_p": 0}, "stop", len(PIECES) + 1),
        ({"temperature": 9.5, "top_p": 7, "seed": -1, "num_ctx": 64}, "stop", len(PIECES) + 1),
        ({"temperature": "0.7", "seed": 42.0, "mirostat": 2, "num_gpu": 1, "what": []}, "stop", 9),
        ({"repeat_penalty": 1.0, "repeat_last_n": -1, "presence_penalty": 0.0}, "stop", 9),
        ({"temperature": None, "stop": None}, "stop", 9),
    ],
)
def test_options_are_taken_as_ollama_takes_them(chat, options, reason, count):
    answer = chat(options=options)
    assert (answer["done_reason"], answer["eval_count"]) == (reason, count)


@pytest.mark.parametrize(
    ("options", "penalty", "window"),
    [
        ({}, 1.0, 64),
        ({"repeat_penalty": 1.1}, 1.1, 64),
        ({"repeat_penalty": 1.1, "repeat_last_n": 7}, 1.1, 7),
        ({"repeat_penalty": 1.1, "repeat_last_n": -1}, 1.1, 1 << 30),
        ({"repeat_penalty": 1.1, "repeat_last_n": 0}, 1.0, 1 << 30),
        ({"repeat_penalty": 0}, 1.0, 64),
        ({"repeat_penalty": -1}, 1.0, 64),
    ],
)
def test_the_repeat_penalty_has_the_window_that_ollama_gives_it(options, penalty, window):
    params = OllamaOptions(**options).sampling_params(default_max_tokens=9, defaults={})
    assert (params.repetition_penalty, params.repetition_context_size) == (penalty, window)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.8, 40, 0.9, 9)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "raw"])
def test_log_probabilities_are_of_the_contents_tokens(post, server, path):
    raw = {"raw": True} if path == "raw" else {}
    path = path.replace("raw", "/api/generate")
    body = {"messages": HELLO, "prompt": "Weather?", "logprobs": True, "top_logprobs": 2, **raw}
    whole = post(path, **body)
    said = whole["response"] if "response" in whole else whole["message"]["content"]
    assert "".join(row["token"] for row in whole["logprobs"]).strip() == said.strip()
    for row in whole["logprobs"]:
        assert row["logprob"] == row["top_logprobs"][0]["logprob"] <= 0
        assert bytes(row["bytes"]).decode() == row["token"] and len(row["top_logprobs"]) == 2
    streamed = httpx.post(host(server) + path, json=body | {"model": "default"})
    chunks = [json.loads(line) for line in streamed.text.splitlines()]
    rows = [row for chunk in chunks for row in chunk.get("logprobs") or ()]
    assert [row["token"] for row in rows] == [row["token"] for row in whole["logprobs"]]
    assert "logprobs" not in post(path, **(body | {"logprobs": False}))


def test_the_package_reads_log_probabilities(client):
    answer = client.chat("default", HELLO, logprobs=True, top_logprobs=3)
    assert answer.logprobs[0].token and len(answer.logprobs[0].top_logprobs) == 3


@pytest.mark.parametrize("think", [True, False, "low", "medium", "high", "max", None])
def test_thinking_goes_to_the_template(chat, think):
    answer = chat(think=think, options={"num_predict": 2})
    plain = chat(options={"num_predict": 2})
    closes = answer["prompt_eval_count"] - plain["prompt_eval_count"]
    assert (closes > 0) == (think is False)  # Qwen's template closes the thought at once


def test_a_name_with_the_tag_latest_is_the_same_model(client, chat):
    assert client.chat("default:latest", HELLO).model == "default:latest"
    listed = client.list().models[0].model
    assert listed == "model:latest"
    assert client.chat(listed, HELLO, options={"num_predict": 1}).done
    with pytest.raises(ollama.ResponseError, match="other") as e:
        client.chat("other", HELLO)
    assert e.value.status_code == 404


def test_without_a_prompt_a_model_is_loaded_or_unloaded(client, post):
    assert client.generate("default").done_reason == "load"
    assert client.generate("default", keep_alive="10m").done_reason == "load"
    for keep in (0, "0", "0s", 0.0, "0m"):
        assert client.generate("default", keep_alive=keep).done_reason == "unload"
    assert client.chat("default", []).done_reason == "load"
    assert post("/api/chat", messages=[], keep_alive=0)["message"]["role"] == "assistant"
    assert client.generate("default", "Hi", keep_alive=0).done_reason == "stop"


def test_the_model_is_listed_shown_and_running(client, server):
    (listed,) = client.list().models
    (running,) = client.ps().models
    shown = client.show(listed.model)
    assert listed.digest == running.digest and len(listed.digest) == 64
    assert listed.size == running.size > 0 and running.context_length == 4096
    assert running.expires_at > listed.modified_at
    assert shown.details == listed.details and shown.details.family == "llama"
    assert shown.details.parameter_size and shown.details.quantization_level
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] == 4096
    assert {"completion", "tools", "thinking"} == set(shown.capabilities)
    assert "<|im_start|>" in shown.template
    version = httpx.get(host(server) + "/api/version").json()["version"]
    assert all(part.isdigit() for part in version.split("."))
    for path in ("/api/version", "/api/tags", "/v1/models", "/health"):
        found = httpx.head(host(server) + path)
        assert (found.status_code, found.content) == (200, b"")
    assert httpx.head(host(server) + "/v1/nothing").status_code == 404


def test_a_tool_may_be_a_python_function(client):
    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: where
        """
        return city

    answer = client.chat("default", HELLO, tools=[weather])
    (call,) = answer.message.tool_calls
    assert weather(**call.function.arguments) == "Paris"


@pytest.mark.parametrize(
    ("kept", "as_json"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_a_call_keeps_its_id_in_whatever_form_it_is_sent_back(chat, server, kept, as_json):
    agent = f"ids-{kept}-{as_json}"
    first = chat(agent_id=agent, tools=[TOOL])["message"]
    (call,) = first["tool_calls"]
    arguments = call["function"]["arguments"]
    function = {"name": "weather", "arguments": json.dumps(arguments) if as_json else arguments}
    sent = ({"id": call["id"]} if kept else {}) | {"function": function}
    result = {"role": "tool", "content": "rain"} | ({"tool_call_id": call["id"]} if kept else {})
    messages = [*HELLO, first | {"tool_calls": [sent]}, result]
    second = chat(agent_id=agent, messages=messages, tools=[TOOL])["message"]
    told = transcript(server, agent)
    assert len(told["turns"]) == 2
    assert told["messages"][2]["tool_call_id"] == call["id"] != second["tool_calls"][0]["id"]


def test_results_without_ids_go_to_their_calls():
    def called(name):
        return {"function": {"name": name, "arguments": {}}}

    def result(name=None, call_id=None):
        return {"role": "tool", "content": "", "tool_name": name, "tool_call_id": call_id}

    calls = [called("f"), called("g"), called("f")]
    asks = {"role": "assistant", "tool_calls": calls}
    (said, *_) = to_messages([asks], CallIds())
    first, second, third = [call["id"] for call in said["tool_calls"]]
    assert len({first, second, third}) == 3
    for results, answers in (
        ([result("g"), result("f"), result("f")], [second, first, third]),
        ([result(), result(), result()], [first, second, third]),
        ([result("f"), result(), result("other")], [first, second, third]),
        ([result(call_id="x"), result("f")], ["x", first]),
        ([result(), result(), result(), result()], [first, second, third, "call_unknown"]),
    ):
        found = to_messages([asks, *results], CallIds())[1:]
        assert [message["tool_call_id"] for message in found] == answers


def test_an_answer_goes_on_with_what_the_assistant_has_begun(chat, server):
    begun = {"role": "assistant", "content": "I "}
    answer = chat(messages=[*HELLO, begun], agent_id="begun", options={"num_predict": 2})
    message = answer["message"]
    assert message["thinking"] + message["content"] != ""
    whole = chat(messages=HELLO, agent_id="begun", options={"num_predict": 2})
    assert answer["prompt_eval_count"] > whole["prompt_eval_count"]
    told = transcript(server, "begun", turn=answer["agentmem"]["turn"])["messages"]
    assert told[-1]["content"] == "I " + message["content"]
    assert [message["role"] for message in told] == ["user", "assistant"]


def test_an_image_is_noted_in_history_and_refused_where_it_is_new(chat, server):
    shown = {"role": "user", "content": "Look.", "images": ["aGk=", "aGk="]}
    refused = chat(400, messages=[*HELLO, shown])
    assert refused["error"].startswith("messages.1.images: ") and "text" in refused["error"]
    yes = {"role": "assistant", "content": "Yes."}
    chat(messages=[shown, yes, *HELLO], agent_id="images", options={"num_predict": 1})
    told = transcript(server, "images")["messages"][0]["content"]
    note = "[image left out: only text can be read]"
    assert told == f"Look.\n{note}\n{note}"
    result = {"role": "tool", "content": {"rain": True}, "images": ["aGk="]}
    call = {"function": {"name": "weather", "arguments": {}}}
    asks = {"role": "assistant", "tool_calls": [call]}
    chat(messages=[shown, asks, result], agent_id="loop", options={"num_predict": 1})
    assert transcript(server, "loop")["messages"][2]["content"] == f'{{"rain": true}}\n{note}'


def test_history_is_taken_in_every_form(chat):
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    for history in (
        [{"role": "assistant", "content": "", "tool_calls": [call, call]}],
        [{"role": "assistant", "content": None, "thinking": "hm", "tool_calls": [call]}],
        [{"role": "assistant", "content": "yes", "thinking": "", "tool_calls": []}],
        [{"role": "ASSISTANT", "content": "yes", "images": None}],
    ):
        results = [
            {"role": "tool", "content": "rain", "tool_name": "weather"},
            {"role": "tool", "content": "rain"},
        ]
        for after in ([], results[:1], results):
            if after and not history[0].get("tool_calls"):
                continue
            chat(messages=[*HELLO, *history, *after, *HELLO], options={"num_predict": 1})


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "no role"}, {"role": "user", "content": "no role"}),
        ({"role": "USER", "content": None}, {"role": "user", "content": ""}),
        ({"role": "user", "content": {"a": 1}}, {"role": "user", "content": '{"a": 1}'}),
        (
            {"role": "assistant", "content": "x", "thinking": "\ud800", "tool_calls": {"a": 1}},
            {"role": "assistant", "content": 'x\n{"a": 1}', "reasoning_content": "\ufffd"},
        ),
        (
            {"role": "assistant", "tool_calls": [None, {"function": {"name": ""}}], "images": "a"},
            {
                "role": "assistant",
                "content": 'null\n{"function": {"name": ""}}\n'
                "[image left out: only text can be read]",
            },
        ),
        (
            {"role": "tool", "name": "f", "tool_call_id": 7, "content": ["a", "b"]},
            {"role": "tool", "content": ["a", "b"], "tool_call_id": "7", "name": "f"},
        ),
    ],
)
def test_a_message_of_any_form_is_read(message, said):
    assert to_messages([message, {"role": "assistant", "content": ""}], CallIds())[0] == said


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/api/chat", {"messages": [{"role": "user"}], "options": {"top_k": "many"}}, "top_k"),
        ("/api/chat", {"messages": ["hello"]}, "messages.0"),
        ("/api/chat", {"messages": "hello"}, "messages"),
        ("/api/chat", {"think": "hard"}, "think"),
        ("/api/chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/api/generate", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/api/generate", {"prompt": "a", "template": "{{ .Prompt }}"}, "template"),
        ("/api/generate", {"prompt": "a", "images": ["aGk="]}, "images"),
        ("/api/generate", {"prompt": "a " * 9000}, "context length"),
        ("/api/chat", {"agent_id": ""}, "agent_id"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_ollamas_shape(post, path, body, says):
    refused = post(path, 400, **({"messages": HELLO} | body))
    assert refused.keys() == {"error"} and says in refused["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/embed"),
        ("POST", "/api/embeddings"),
        ("POST", "/api/pull"),
        ("POST", "/api/push"),
        ("POST", "/api/create"),
        ("POST", "/api/copy"),
        ("DELETE", "/api/delete"),
        ("HEAD", "/api/blobs/sha256:00"),
    ],
)
def test_what_this_server_does_not_do_is_said(server, method, path):
    response = httpx.request(method, host(server) + path, json={"model": "default"})
    assert response.status_code == 501
    assert method == "HEAD" or "this server" in response.json()["error"]
    unknown = httpx.get(host(server) + "/api/unknown")
    assert unknown.status_code == 404 and unknown.json().keys() == {"error"}


def test_a_body_is_json_whatever_its_type_but_not_from_a_web_page(server):
    url = host(server) + "/api/generate"
    body = json.dumps({"model": "default", "prompt": "Hi", "options": {"num_predict": 1}})
    form = {"content-type": "application/x-www-form-urlencoded"}  # curl -d
    for headers in (form, {"content-type": "text/plain"}, {}):
        assert httpx.post(url, content=body, headers=headers).status_code == 200
        page = headers | {"origin": "https://example.com"}
        refused = httpx.post(url, content=body, headers=page)
        assert refused.status_code == 400 and "application/json" in refused.json()["error"]
    assert httpx.post(url).status_code == 400
    assert httpx.post(url, content="{").json()["error"].startswith("The body is not valid JSON")


def test_keys_and_namespaces_hold_here_too(tmp_path, model):
    keys = write_keys(tmp_path / "keys.toml")
    with ServerProcess(tmp_path / "home", *FLAGS, "--api-keys", str(keys), model=model) as server:

        def ask(key):
            body = {"messages": [{"role": "user", "content": "w9 " * 64}], "stream": False}
            headers = {"authorization": f"Bearer {key}"} if key else {}
            body |= {"agent_id": "alice", "options": {"num_predict": 1}}
            return httpx.post(host(server) + "/api/chat", json=body, headers=headers)

        assert ask(None).status_code == 401 and ask(None).json().keys() == {"error"}
        assert ask(KEYS["a"]).json()["agentmem"]["cached_tokens"] == 0
        assert ask(KEYS["a"]).json()["agentmem"]["cached_tokens"] > 0
        assert ask(KEYS["b"]).json()["agentmem"]["cached_tokens"] == 0
        for path in ("/api/tags", "/api/ps", "/api/version"):
            assert httpx.get(host(server) + path).status_code == 401
        rebound = httpx.get(host(server) + "/api/tags", headers={"host": "evil.example"})
        assert rebound.status_code == 400 and rebound.json().keys() == {"error"}
