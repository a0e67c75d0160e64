"""A model as it is found, without a chat template: it completes texts, and says what to do where
it is to chat.
"""

import httpx
import pytest

from support.chat_http import FLAGS
from support.server_process import ServerProcess
from support.tiny_model_dir import write_tiny_model

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ANTHROPIC_TOOL = {"name": "f", "input_schema": {"type": "object"}}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    home = tmp_path_factory.mktemp("no-template")
    model = write_tiny_model(home / "a [4bit] model, 100%")
    (model / "._model.safetensors").write_bytes(bytes(4096))  # what macOS leaves
    (model / "chat_template.jinja").unlink()
    with ServerProcess(home / "home", *FLAGS, model=model) as server:
        yield server.url.removesuffix("/v1")
        assert server.stop() == 0


def test_texts_are_completed(url):
    body = {"model": "default", "prompt": "w9 w10 w11", "max_tokens": 4}
    completion = httpx.post(f"{url}/v1/completions", json=body)
    assert completion.json()["choices"][0]["text"]
    raw = {"prompt": "w9 w10 w11", "raw": True, "stream": False, "options": {"num_predict": 4}}
    assert httpx.post(f"{url}/api/generate", json=raw).json()["response"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [TOOL]}),
        ("/v1/chat/completions", {"messages": HELLO, "stream": True}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 4}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 4, "tools": [ANTHROPIC_TOOL]}),
        ("/v1/messages/count_tokens", {"messages": HELLO}),
        ("/v1/responses", {"input": "hello"}),
        ("/api/chat", {"messages": HELLO}),
        ("/api/chat", {"messages": HELLO, "tools": [TOOL]}),
        ("/api/generate", {"prompt": "hello"}),
        ("/v1/agents/alice/prewarm", {"messages": HELLO}),
    ],
)
def test_a_chat_is_refused_with_what_to_do(url, path, body):
    named = {} if "agents" in path else {"model": "default"}
    response = httpx.post(url + path, json=named | body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert "no chat template" in message and "/v1/completions" in message


def test_it_is_not_said_to_take_tools(url):
    shown = httpx.post(f"{url}/api/show", json={"model": "default"}).json()
    assert (shown["capabilities"], shown["template"]) == (["completion"], "")
    assert httpx.get(f"{url}/api/tags").json()["models"][0]["capabilities"] == ["completion"]
