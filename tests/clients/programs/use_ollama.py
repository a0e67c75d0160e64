"""The ollama package."""

import ollama
from checks import AGENT, QUESTION, URL, Weather, get_weather, report

client = ollama.Client(host=URL, headers=AGENT)
ASK = [{"role": "user", "content": QUESTION}]


def chat():
    return client.chat(model="default", messages=ASK).message.content


def stream():
    parts = client.chat(model="default", messages=ASK, stream=True)
    return [part.message.content for part in parts if part.message.content]


def tools():
    first = client.chat(model="default", messages=ASK, tools=[get_weather])
    call = first.message.tool_calls[0].function
    result = {"role": "tool", "tool_name": call.name, "content": get_weather(**call.arguments)}
    said = [*ASK, first.message, result]
    return client.chat(model="default", messages=said, tools=[get_weather]).message.content


def structured():
    answer = client.chat(model="default", messages=ASK, format=Weather.model_json_schema())
    return Weather.model_validate_json(answer.message.content)


def generate():
    return client.generate(model="default", prompt=QUESTION).response


report(chat=chat, stream=stream, tools=tools, structured=structured, generate=generate)
