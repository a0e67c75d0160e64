"""AutoGen: two agents, and its own client of OpenAI's API."""

import asyncio

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import ModelClientStreamingChunkEvent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import ModelInfo, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from checks import AGENT, KEY, QUESTION, URL, Weather, get_weather, report

INFO = ModelInfo(
    vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True
)


def _client():
    return OpenAIChatCompletionClient(
        model="default",
        base_url=f"{URL}/v1",
        api_key=KEY,
        default_headers=AGENT,
        model_info=INFO,
        include_name_in_message=True,
    )


async def chat():
    client = _client()
    return (await client.create([UserMessage(content=QUESTION, source="user")])).content


async def stream():
    agent = AssistantAgent("a", _client(), model_client_stream=True)
    events = [event async for event in agent.run_stream(task=QUESTION)]
    return [e.content for e in events if isinstance(e, ModelClientStreamingChunkEvent)]


async def tools():
    agent = AssistantAgent("a", _client(), tools=[get_weather], reflect_on_tool_use=True)
    return (await agent.run(task=QUESTION)).messages[-1].content


async def structured():
    agent = AssistantAgent("a", _client(), output_content_type=Weather)
    return (await agent.run(task=QUESTION)).messages[-1].content


async def group():
    """Three messages of two speakers, by turns."""
    agents = [AssistantAgent(name, _client()) for name in ("ann", "bob")]
    team = RoundRobinGroupChat(agents, termination_condition=MaxMessageTermination(4))
    return [message.content for message in (await team.run(task=QUESTION)).messages[1:]]


report(
    chat=lambda: asyncio.run(chat()),
    stream=lambda: asyncio.run(stream()),
    tools=lambda: asyncio.run(tools()),
    structured=lambda: asyncio.run(structured()),
    group=lambda: asyncio.run(group()),
)
