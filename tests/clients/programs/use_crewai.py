"""CrewAI: a crew of one agent."""

from checks import AGENT, KEY, QUESTION, URL, Weather, get_weather, report
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool


def _llm(**options):
    return LLM(
        model="openai/default", base_url=f"{URL}/v1", api_key=KEY, extra_headers=AGENT, **options
    )


def _crew(tools=(), **options):
    agent = Agent(
        role="clerk", goal="To answer.", backstory="A clerk.", llm=_llm(), tools=list(tools)
    )
    task = Task(description=QUESTION, expected_output="A sentence.", agent=agent, **options)
    return Crew(agents=[agent], tasks=[task]).kickoff()


def chat():
    return _llm().call(QUESTION)


def chat_by_chunks():
    return _llm(stream=True).call(QUESTION)


def crew():
    return _crew().raw


def tools():
    return _crew([tool("get_weather")(get_weather)]).raw


def structured():
    return _crew(output_pydantic=Weather).pydantic


report(chat=chat, chat_by_chunks=chat_by_chunks, crew=crew, tools=tools, structured=structured)
