"""Tokenizers of fewer than 256 tokens that spell bytes, with chat templates that behave like those
of real families.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

from mlx_lm import tokenizer_utils
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QWEN3 = """
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}{{- '<|im_start|>system\\n' + first + '\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool|tojson }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}
{%- elif first %}{{- '<|im_start|>system\\n' + first + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- set tool_call = tool_call.function or tool_call %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string
                else tool_call.arguments|tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content
            + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

QWEN3_THINKING = QWEN3.replace(
    "{%- if enable_thinking is defined", "{{- '<think>\\n' }}{%- if false"
)

LLAMA3 = """
{%- set tools = tools if tools is defined else none %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- system + '<|eot_id|>' }}
{%- if tools %}{{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}
    {{- messages[0].content + '<|eot_id|>' }}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name
            + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- elif message.role == 'tool' or message.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {{- message.content if message.content is string else message.content | tojson }}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'
            + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

GEMMA3 = """
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- else %}{%- set first = '' %}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception(
            'Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- (first if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

GEMMA2 = """
{%- if messages[0].role == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception(
            'Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# reads results beside the calls, and makes a turn of its own of a role tool
GEMMA4 = """
{%- macro walk(properties) %}
    {%- for key, value in properties | dictsort %}
        {{- key + ':' + value['type'] | upper }}
        {%- if value['enum'] %}{{- value['enum'] | join(',') }}{%- endif %}
        {%- if value['properties'] is defined %}
            {{- '{' + walk(value['properties']) + '}' }}
        {%- endif %}
        {%- if value['items'] is mapping %}{{- value['items']['type'] | upper }}{%- endif %}
        {{- ';' }}
    {%- endfor %}
{%- endmacro %}
{%- for tool in tools or [] %}
    {{- '<|im_start|>tools\\n' + tool.function.name + ' ' + tool.function.description + '(' }}
    {{- walk(tool.function.parameters.properties) + ')<|im_end|>\\n' }}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- for call in m['tool_calls'] or [] %}
        {{- '<|tool_call>call:' + call.function.name }}
        {{- call.function.arguments | tojson + '<tool_call|>' }}
    {%- endfor %}
    {%- for r in m['tool_responses'] or [] %}
        {{- '<|tool_response>response:' + (r['name'] | default('unknown')) + '{' }}
        {{- r['response'] | tojson + '}<tool_response|>' }}
    {%- endfor %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# takes a content as a list of parts alone
PARTS = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- for part in m.content if part.type == 'text' %}{{- part.text }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

HARMONY = """{%- for m in messages %}
    {%- set role = 'developer' if m.role == 'system' else m.role %}
    {{- '<|start|>' + role + '<|message|>' + m.content + '<|end|>' }}
{%- endfor %}
{%- if tools %}{{- '<|start|>developer<|message|>' + tools|tojson + '<|end|>' }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

_NEVER = {
    chr(b) for b in (0xC0, 0xC1, *range(0xF5, 0x100))
}  # bytes of no UTF-8: so that it fits tiny.VOCAB
_ADDED = {
    CHATML: ("<|im_start|>", "<|im_end|>"),
    QWEN3: ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    LLAMA3: (
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ),
    GEMMA2: ("<start_of_turn>", "<end_of_turn>"),
    GEMMA3: ("<start_of_turn>", "<end_of_turn>"),
    GEMMA4: ("<|im_start|>", "<|im_end|>"),
    PARTS: ("<|im_start|>", "<|im_end|>"),
    HARMONY: (
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|return|>",
        "<|call|>",
    ),
}
_ADDED[QWEN3_THINKING] = _ADDED[QWEN3]


@cache
def chat_tokenizer(template: str, *added: str) -> tokenizer_utils.TokenizerWrapper:
    """Load it as mlx-lm does, from a directory: its tokens are bytes, and the template's own."""
    with tempfile.TemporaryDirectory() as path:
        save_tokenizer(Path(path), template, *added)
        return tokenizer_utils.load(Path(path))


def save_tokenizer(path: Path, template: str, *added: str) -> None:
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - _NEVER)
    bare = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bare.pre_tokenizer, bare.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    names = (*_ADDED.get(template, ()), *added)
    bare.add_tokens(
        [AddedToken(name, special=name.startswith("<|"), normalized=False) for name in names]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token=names[1], chat_template=template
    ).save_pretrained(path)
    config = (
        path / "tokenizer_config.json"
    )  # a template of its own: newer transformers write a file beside it
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
