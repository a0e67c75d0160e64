"""Pydantic AI, whose structured output is a forced tool call unless told otherwise."""

import asyncio

import openai
from checks import AGENT, KEY, QUESTION, URL, Weather, get_weather, report
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, default_headers=AGENT)
PROVIDER = OpenAIProvider(openai_client=client)
CHAT = OpenAIChatModel("default", provider=PROVIDER)
RESPONSES = OpenAIResponsesModel("default", provider=PROVIDER)


def run(model, tools=(), **options):
    return Agent(model, tools=list(tools), **options).run_sync(QUESTION).output


async def _streamed():
    async with Agent(CHAT).run_stream(QUESTION) as result:
        return [part async for part in result.stream_text(delta=True, debounce_by=None)]


def cached():
    agent = Agent(CHAT)
    first = agent.run_sync(QUESTION)
    return agent.run_sync(QUESTION, message_history=first.all_messages()).usage.cache_read_tokens


report(
    chat=lambda: run(CHAT),
    response=lambda: run(RESPONSES),
    stream=lambda: asyncio.run(_streamed()),
    tools=lambda: run(CHAT, [get_weather]),
    response_tools=lambda: run(RESPONSES, [get_weather]),
    structured=lambda: run(CHAT, output_type=Weather),
    structured_native=lambda: run(CHAT, output_type=NativeOutput(Weather)),
    response_structured=lambda: run(RESPONSES, output_type=Weather),
    cached=cached,
)
