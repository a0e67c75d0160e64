"""OpenAI's agents SDK, over Responses, which is its default, and over chat completions."""

import openai
from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from agents.memory import SQLiteSession
from checks import AGENT, KEY, QUESTION, URL, Weather, get_weather, report

set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, default_headers=AGENT)
RESPONSES = OpenAIResponsesModel("default", client)
CHAT = OpenAIChatCompletionsModel("default", client)


def run(model, tools=(), **options):
    agent = Agent(name="a", instructions="Be brief.", model=model, tools=list(tools), **options)
    return Runner.run_sync(agent, QUESTION).final_output


async def _streamed(model):
    agent = Agent(name="a", instructions="Be brief.", model=model)
    events = Runner.run_streamed(agent, QUESTION).stream_events()
    raw = [e.data async for e in events if e.type == "raw_response_event"]
    return [e.delta for e in raw if e.type == "response.output_text.delta"]


def stream(model):
    import asyncio

    return asyncio.run(_streamed(model))


def cached():
    agent = Agent(name="a", instructions="Be brief.", model=RESPONSES)
    session = SQLiteSession("one")
    Runner.run_sync(agent, QUESTION, session=session)
    again = Runner.run_sync(agent, QUESTION, session=session)
    return again.context_wrapper.usage.input_tokens_details.cached_tokens


report(
    chat=lambda: run(CHAT),
    response=lambda: run(RESPONSES),
    stream=lambda: stream(CHAT),
    response_stream=lambda: stream(RESPONSES),
    tools=lambda: run(CHAT, [function_tool(get_weather)]),
    response_tools=lambda: run(RESPONSES, [function_tool(get_weather)]),
    structured=lambda: run(CHAT, output_type=Weather),
    response_structured=lambda: run(RESPONSES, output_type=Weather),
    cached=cached,
)
