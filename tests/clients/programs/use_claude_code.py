"""Claude Code, the program, as claude-agent-sdk carries it: two turns of one session."""

import asyncio
import os
import tempfile

from checks import KEY, QUESTION, URL, report
from claude_agent_sdk import ClaudeAgentOptions, ResultMessage, query

HOME = tempfile.mkdtemp()
ENVIRONMENT = {
    "ANTHROPIC_BASE_URL": URL,
    "ANTHROPIC_AUTH_TOKEN": KEY,
    "ANTHROPIC_DEFAULT_OPUS_MODEL": "default",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": "default",
    "CLAUDE_CONFIG_DIR": HOME,
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
}


async def turn(*, goes_on):
    options = ClaudeAgentOptions(
        model="default", env=ENVIRONMENT, cwd=HOME, continue_conversation=goes_on
    )
    messages = [message async for message in query(prompt=QUESTION, options=options)]
    (result,) = [message for message in messages if isinstance(message, ResultMessage)]
    return result


def first():
    return asyncio.run(turn(goes_on=False)).result


def second():
    _second.append(asyncio.run(turn(goes_on=True)))
    return _second[0].result


def cached():
    return _second[0].usage["cache_read_input_tokens"]


_second = []
os.chdir(HOME)
report(first=first, second=second, cached=cached)
