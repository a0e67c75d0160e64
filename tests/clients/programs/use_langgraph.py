"""LangGraph, with LangChain's OpenAI client."""

from checks import AGENT, KEY, QUESTION, URL, Weather, get_weather, report
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.prebuilt import create_react_agent

model = ChatOpenAI(
    model="default", base_url=f"{URL}/v1", api_key=KEY, default_headers=AGENT, max_retries=0
)
ASK = {"messages": [("user", QUESTION)]}


def chat():
    return model.invoke(QUESTION).content


def stream():
    return [chunk.content for chunk in model.stream(QUESTION) if chunk.content]


def tools():
    agent = create_react_agent(model, [get_weather])
    return agent.invoke(ASK)["messages"][-1].content


def tools_streamed():
    agent = create_react_agent(model, [get_weather])
    parts = agent.stream(ASK, stream_mode="messages")
    said = [part for part, _ in parts if isinstance(part, AIMessageChunk)]
    return "".join(part.content for part in said)


def structured():
    return model.with_structured_output(Weather).invoke(QUESTION)


def cached():
    agent = create_react_agent(model, [], checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "one"}}
    agent.invoke(ASK, thread)
    last = agent.invoke(ASK, thread)["messages"][-1]
    return last.usage_metadata["input_token_details"]["cache_read"]


report(
    chat=chat,
    stream=stream,
    tools=tools,
    tools_streamed=tools_streamed,
    structured=structured,
    cached=cached,
)
