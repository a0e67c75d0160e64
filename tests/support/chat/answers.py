"""What a model of each family generates for an answer: its markup, and the token that ends it."""

import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON text, with the spaces that the model put there
    id: str = "call00001"


@dataclass(frozen=True)
class Answer:
    text: str = ""
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()
    cut: bool = False  # stopped by max_tokens: no end token
    # where not 0: at most so many characters a token, as a sampler may choose shorter tokens
    piece: int = 0


Written = tuple[str, str]  # generated text and the text of the end token


def _joined(parts: list[str]) -> str:
    return "\n".join(part for part in parts if part)


def qwen3_instruct(answer: Answer, prompt: str) -> Written:
    calls = [
        f'<tool_call>\n{{"name": "{c.name}", "arguments": {c.arguments}}}\n</tool_call>'
        for c in answer.calls
    ]
    return _joined([answer.text, *calls]), "<|im_end|>"


def qwen3(answer: Answer, prompt: str) -> Written:
    text, end = qwen3_instruct(answer, prompt)
    thoughts = (
        ""
        if prompt.endswith("</think>\n\n")
        else f"<think>\n{answer.reasoning or ''}\n</think>\n\n"
    )
    return thoughts + text, end


def llama3(answer: Answer, prompt: str) -> Written:
    calls = [f'{{"name": "{c.name}", "parameters": {c.arguments}}}' for c in answer.calls]
    return _joined(calls) or answer.text, "<|eot_id|>"


def gemma3(answer: Answer, prompt: str) -> Written:
    return answer.text, "<end_of_turn>"


def deepseek(answer: Answer, prompt: str) -> Written:
    calls = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{c.name}\n```json\n{c.arguments}\n```<｜tool▁call▁end｜>"
        for c in answer.calls
    ]
    section = f"<｜tool▁calls▁begin｜>{_joined(calls)}<｜tool▁calls▁end｜>" if calls else ""
    thoughts = f"{answer.reasoning or ''}\n</think>\n\n" if prompt.endswith("<think>\n") else ""
    return thoughts + answer.text + section, "<｜end▁of▁sentence｜>"


def gpt_oss(answer: Answer, prompt: str) -> Written:
    again = "<|end|><|start|>assistant"
    thoughts = (
        f"<|channel|>analysis<|message|>{answer.reasoning}{again}" if answer.reasoning else ""
    )
    if answer.calls:
        call = answer.calls[0]
        header = f"<|channel|>commentary to=functions.{call.name} <|constrain|>json<|message|>"
        return thoughts + header + call.arguments, "<|call|>"
    return f"{thoughts}<|channel|>final<|message|>{answer.text}", "<|return|>"


def mistral(answer: Answer, prompt: str) -> Written:
    calls = [f'{{"name": "{c.name}", "arguments": {c.arguments}}}' for c in answer.calls]
    return f"[TOOL_CALLS] [{', '.join(calls)}]" if calls else " " + answer.text, "</s>"


def smollm2(answer: Answer, prompt: str) -> Written:
    return answer.text, "<|im_end|>"


def glm(answer: Answer, prompt: str) -> Written:
    """Its end tokens are the headers of what comes next."""
    thoughts = "" if prompt.endswith("</think>") else f"\n<think>{answer.reasoning or ''}</think>"
    text = f"\n{answer.text}" if answer.text else ""
    calls = ["\n" + glm_call(c) for c in answer.calls]
    return thoughts + text + "".join(calls), "<|observation|>" if calls else "<|user|>"


def glm_call(call: Call) -> str:
    arguments = json.loads(call.arguments).items()
    values = {
        k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments
    }
    pairs = [f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in values.items()]
    return f"<tool_call>{call.name}\n{''.join(pairs)}</tool_call>"


WRITERS: dict[str, Callable[[Answer, str], Written]] = {
    "qwen3": qwen3,
    "qwen3-instruct": qwen3_instruct,
    "llama3": llama3,
    "gemma3": gemma3,
    "deepseek": deepseek,
    "gpt-oss": gpt_oss,
    "mistral": mistral,
    "mistral-v1": mistral,
    "smollm2": smollm2,
    "glm": glm,
}
