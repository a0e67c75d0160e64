"""The anthropic SDK."""

import anthropic
from checks import AGENT, KEY, QUESTION, URL, Weather, get_weather, report

client = anthropic.Anthropic(base_url=URL, api_key=KEY, default_headers=AGENT, max_retries=0)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "The weather in a city.", "input_schema": SCHEMA}
ASK = [{"role": "user", "content": QUESTION}]
GIVEN = {"model": "default", "max_tokens": 200}


def chat():
    return client.messages.create(**GIVEN, messages=ASK).content[0].text


def stream():
    with client.messages.stream(**GIVEN, messages=ASK) as events:
        return list(events.text_stream)


def tools():
    first = client.messages.create(**GIVEN, messages=ASK, tools=[TOOL])
    call = next(block for block in first.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": get_weather(**call.input)}
    said = [
        *ASK,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    return client.messages.create(**GIVEN, messages=said, tools=[TOOL]).content[0].text


def structured():
    return client.messages.parse(**GIVEN, messages=ASK, output_format=Weather).parsed_output


def cached():
    said = [*ASK, {"role": "assistant", "content": "Good day."}, *ASK]
    return client.messages.create(**GIVEN, messages=said).usage.cache_read_input_tokens


report(chat=chat, stream=stream, tools=tools, structured=structured, cached=cached)
