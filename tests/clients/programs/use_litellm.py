"""LiteLLM's SDK, as a server of OpenAI's API and as one of Ollama's."""

import json

import litellm
from checks import AGENT, KEY, QUESTION, URL, Weather, get_weather, report

litellm.telemetry = False
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "The weather in a city.", "parameters": SCHEMA}
ASK = [{"role": "user", "content": QUESTION}]
OPENAI = {
    "model": "openai/default",
    "api_base": f"{URL}/v1",
    "api_key": KEY,
    "extra_headers": AGENT,
}
OLLAMA = {"model": "ollama_chat/default", "api_base": URL, "extra_headers": AGENT}


def chat(server):
    return litellm.completion(**server, messages=ASK).choices[0].message.content


def stream(server):
    chunks = litellm.completion(**server, messages=ASK, stream=True)
    return [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]


def tools(server):
    offered = [{"type": "function", "function": TOOL}]
    message = litellm.completion(**server, messages=ASK, tools=offered).choices[0].message
    call = message.tool_calls[0]
    result = get_weather(**json.loads(call.function.arguments))
    said = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    again = litellm.completion(**server, messages=said, tools=offered)
    return again.choices[0].message.content


def structured(server):
    answer = litellm.completion(**server, messages=ASK, response_format=Weather)
    return Weather.model_validate_json(answer.choices[0].message.content)


def cached():
    said = [*ASK, {"role": "assistant", "content": "Good day."}, *ASK]
    usage = litellm.completion(**OPENAI, messages=said).usage
    return usage.prompt_tokens_details.cached_tokens


report(
    chat=lambda: chat(OPENAI),
    stream=lambda: stream(OPENAI),
    tools=lambda: tools(OPENAI),
    structured=lambda: structured(OPENAI),
    cached=cached,
    ollama_chat=lambda: chat(OLLAMA),
    ollama_stream=lambda: stream(OLLAMA),
    ollama_tools=lambda: tools(OLLAMA),
    ollama_structured=lambda: structured(OLLAMA),
)
