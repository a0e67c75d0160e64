"""What Codex 0.163 and Claude Code 2.1.332 send, turn by turn, with their long texts cut short.

Each record holds a session of several turns in which the model calls a tool of the client's, looks
at an image, and, in Claude Code, loads a tool or, in Codex, calls one of a namespace.
"""

import asyncio
import json
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from agentmem.config import Settings
from agentmem.server.app import create_app
from support.chat.families import tool_calling
from support.fake_engine import FakeEngine

RECORDED = Path(__file__).parents[1] / "support/recorded"
SESSIONS = {"codex": "/v1/responses", "claude_code": "/v1/messages?beta=true"}
ENDS = {"codex": "event: response.completed", "claude_code": "event: message_stop"}
NO_IMAGE = "[image left out: only text can be read]"


def replayed(client: str, home: Path) -> list[tuple[str, str]]:
    """Return the agent and the prompt of each request of a client's session."""
    engine = FakeEngine(max_context=100_000)
    engine.tokenizer = tool_calling("qwen3")
    requests = json.loads((RECORDED / f"{client}.json").read_text())

    async def replay() -> None:
        app = create_app(engine, Settings(home=home), None)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            for request in requests:
                answer = await http.post(
                    SESSIONS[client], json=request["body"], headers=request["headers"]
                )
                assert answer.status_code == 200, answer.text
                assert ENDS[client] in answer.text

    asyncio.run(replay())
    asked = [request for request in engine.requests if request.params.max_tokens > 0]
    return [(r.agent.agent_id, engine.tokenizer.decode(r.tokens)) for r in asked]


@pytest.mark.parametrize("client", SESSIONS)
def test_each_request_of_a_session_goes_on_from_the_one_before(client, tmp_path):
    prompts = replayed(client, tmp_path)
    assert len({agent for agent, _ in prompts}) == 1 and len(prompts) == 7
    for (_, before), (_, after) in pairwise(prompts):
        assert after.startswith(before)


def test_the_model_reads_all_that_codex_has_done(tmp_path):
    *_, (_, prompt) = replayed("codex", tmp_path)
    said = ["SHELL please", "shell-says-hi", "CIMAGE please", NO_IMAGE, "invalid agent id nobody"]
    said += [
        '"name": "multi_agent_v1__close_agent"',
        '"arguments": {"target": "nobody"}',
        "and now",
    ]
    assert [text for text in said if text not in prompt] == []


def test_the_model_reads_all_that_claude_code_has_done(tmp_path):
    *_, (_, prompt) = replayed("claude_code", tmp_path)
    said = ["BASH please", "bash-says-hi", "PICTURE please", NO_IMAGE, "# Environment", "and now"]
    assert [text for text in said if text not in prompt] == []
    before, told = prompt.split('"name": "WebFetch"')
    assert "SEARCH please" in before and "SEARCH please" not in told  # where it was loaded
    assert "billing" not in prompt and "DeferredToolPlaceholder" not in prompt
