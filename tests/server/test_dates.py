"""A date in a chat template costs a prefill only where the agent's session is over."""

import asyncio
import time
from datetime import date, datetime, timedelta

import httpx
import numpy as np
import pytest

from agentmem.chat.dates import MOST, session_days
from agentmem.chat.messages import Message
from agentmem.chat.renderer import ChatRenderer
from agentmem.config import Settings
from agentmem.prefix_cache.info import Explanation
from agentmem.server.app import create_app
from support.chat.families import load, tokenizer_of
from support.fake_engine import FakeEngine

DAY, HOUR = 86400.0, 3600.0
NOW = datetime(2026, 11, 21, 12).timestamp()
TODAY = date(2026, 11, 21)
CHAT = [Message("user", "Hello"), Message("assistant", "Hi there"), Message("user", "And now?")]


def rendered(family: str, messages: list[Message], branches=(), days=(TODAY,)) -> list[int]:
    return ChatRenderer(tokenizer_of(family), 1 << 20)._render(
        messages, branches, tools=[], options={}, days=days
    )


@pytest.mark.parametrize("family", ["llama3", "gpt-oss"])
def test_the_date_of_a_running_session_stays_and_a_new_one_has_todays(family):
    yesterday = TODAY - timedelta(days=1)
    before = rendered(family, CHAT[:1], days=[yesterday])
    branch = np.array(before)
    assert before != rendered(family, CHAT[:1])
    text = tokenizer_of(family).decode
    later = rendered(family, CHAT, [branch], [TODAY, yesterday])
    assert text(later).startswith(text(before[:-4]))
    assert rendered(family, CHAT, [branch], [TODAY]) == rendered(family, CHAT)
    assert rendered(family, CHAT, [], [TODAY, yesterday]) == rendered(family, CHAT)
    for written in (yesterday.strftime("%d %b %Y"), yesterday.isoformat()):
        assert (written in text(later)) == (written in text(before))


def test_a_template_without_a_date_is_rendered_once_as_it_is():
    assert rendered("smollm2", CHAT, days=[TODAY, TODAY - timedelta(days=1)]) == rendered(
        "smollm2", CHAT, days=[]
    )


def test_days_are_those_of_the_agents_life_while_its_session_lasts():
    assert session_days(NOW - 2 * DAY, NOW - HOUR, NOW, 24 * HOUR) == [
        TODAY - timedelta(days=n) for n in range(3)
    ]
    assert session_days(NOW - HOUR, NOW - HOUR, NOW, 24 * HOUR) == [TODAY]
    assert session_days(NOW - 9 * DAY, NOW - 25 * HOUR, NOW, 24 * HOUR) == [TODAY]
    assert session_days(NOW - 9 * DAY, NOW - HOUR, NOW, 0) == [TODAY]
    assert len(session_days(NOW - 99 * DAY, NOW - HOUR, NOW, 24 * HOUR)) == MOST + 1


def test_the_prompt_that_is_explained_is_the_one_that_a_request_would_have(tmp_path):
    engine, explained = FakeEngine(max_context=4096, tokenizer=load("llama3")), []
    now = time.time()
    yesterday = date.fromtimestamp(now) - timedelta(days=1)
    engine.agent_times = lambda *agent: (now - DAY, now)
    engine.branch_tokens = lambda *agent: [np.array(rendered("llama3", CHAT, days=[yesterday]))]

    async def explain(key, tokens):
        explained.append(tokens)
        return Explanation("parted", len(tokens), 0, 0, 0, [], [], [])

    engine.agents.explain = explain
    body = {
        "messages": [{"role": m.role, "content": m.content} for m in CHAT],
        "tools": [{"type": "function", "function": {"name": "get_weather"}}],
    }

    async def both():
        transport = httpx.ASGITransport(create_app(engine, Settings(home=tmp_path), None))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/v1") as client:
            for request in (body, {"messages": body["messages"]}):
                assert (await client.post("/agents/a/explain", json=request)).status_code == 200
                assert (
                    await client.post("/chat/completions", json={**request, "agent_id": "a"})
                ).status_code == 200

    asyncio.run(both())
    assert explained == [request.tokens for request in engine.requests]
    assert yesterday.strftime("%d %b %Y") in engine.tokenizer.decode(explained[1])
