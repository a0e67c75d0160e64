"""The openai SDK: chat completions and Responses."""

import json

import openai
from checks import AGENT, KEY, QUESTION, URL, Weather, get_weather, report

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, default_headers=AGENT, max_retries=0)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "The weather in a city.", "parameters": SCHEMA}
ASK = [{"role": "user", "content": QUESTION}]


def chat():
    answer = client.chat.completions.create(model="default", messages=ASK)
    return answer.choices[0].message.content


def stream():
    chunks = client.chat.completions.create(model="default", messages=ASK, stream=True)
    return [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]


def tools():
    offered = [{"type": "function", "function": TOOL}]
    first = client.chat.completions.create(model="default", messages=ASK, tools=offered)
    message = first.choices[0].message
    call = message.tool_calls[0]
    result = get_weather(**json.loads(call.function.arguments))
    said = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    second = client.chat.completions.create(model="default", messages=said, tools=offered)
    return second.choices[0].message.content


def structured():
    answer = client.chat.completions.parse(
        model="default", messages=ASK, response_format=Weather, max_tokens=200
    )
    return answer.choices[0].message.parsed


def cached():
    said = [*ASK, {"role": "assistant", "content": "Good day."}, *ASK]
    answer = client.chat.completions.create(model="default", messages=said)
    return answer.usage.prompt_tokens_details.cached_tokens


def response():
    return client.responses.create(model="default", input=QUESTION).output_text


def response_stream():
    with client.responses.stream(model="default", input=QUESTION) as events:
        return [e.delta for e in events if e.type == "response.output_text.delta"]


def response_tools():
    offered = [{"type": "function", **TOOL}]
    first = client.responses.create(model="default", input=QUESTION, tools=offered)
    call = next(item for item in first.output if item.type == "function_call")
    result = get_weather(**json.loads(call.arguments))
    output = {"type": "function_call_output", "call_id": call.call_id, "output": result}
    second = client.responses.create(
        model="default", input=[output], tools=offered, previous_response_id=first.id
    )
    return second.output_text


def response_structured():
    answer = client.responses.parse(model="default", input=QUESTION, text_format=Weather)
    return answer.output_parsed


report(
    chat=chat,
    stream=stream,
    tools=tools,
    structured=structured,
    cached=cached,
    response=response,
    response_stream=response_stream,
    response_tools=response_tools,
    response_structured=response_structured,
)
