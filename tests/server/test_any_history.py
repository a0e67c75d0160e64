"""Whatever a client's history holds, it can be read: items of Responses, and Anthropic's blocks."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.server.api.message_blocks import to_messages as of_anthropic
from agentmem.server.api.response_items import to_messages as of_responses

HELLO = {"role": "user", "content": "hello"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
TYPES = st.sampled_from(
    [
        *("message", "reasoning", "function_call", "function_call_output", "custom_tool_call"),
        *("custom_tool_call_output", "local_shell_call", "local_shell_call_output", "mcp_call"),
        *("web_search_call", "tool_search_call", "tool_search_output", "additional_tools"),
        *("image_generation_call", "compaction", "program", "mcp_approval_response"),
        *("text", "input_text", "refusal", "input_image", "image", "document", "search_result"),
        *("thinking", "redacted_thinking", "tool_use", "server_tool_use", "tool_result"),
        *("web_search_tool_result", "tool_addition", "tool_reference", "container_upload"),
    ]
)
IDS = st.sampled_from(["c1", "c2"])
FIELDS = {
    **dict.fromkeys(("summary", "arguments", "input", "output", "action", "tools"), JSON),
    **dict.fromkeys(("source", "title", "thinking", "tool", "result", "text", "name"), JSON),
    **dict.fromkeys(("id", "call_id", "tool_use_id", "tool_call_id", "status"), IDS | JSON),
}


def things(**more):
    """Return what has a type, and any of the fields that such things have, with any value."""
    return st.fixed_dictionaries({"type": TYPES | JSON}, optional={**FIELDS, **more})


BLOCKS = things(content=JSON | st.lists(things(), max_size=2))
ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool", "function"]) | JSON
MESSAGES = st.fixed_dictionaries({"role": ROLES}, optional={"content": JSON | st.lists(BLOCKS)})


def check(messages):
    """Check that messages have the form that prompts are rendered from."""
    assert messages[-1] == HELLO
    for message in messages:
        assert message["role"] in ("user", "assistant", "system", "developer", "tool")
        assert isinstance(message["content"], str) or message["role"] == "assistant"
        says = ("content", "tool_calls", "reasoning_content")
        assert any(message.get(name) is not None for name in says)
        assert (message["role"] == "tool") == isinstance(message.get("tool_call_id"), str)
        for call in message.get("tool_calls", ()):
            function = call["function"]
            assert all(isinstance(text, str) for text in (call["id"], *function.values()))
    json.dumps(messages)


@given(st.lists(things(role=ROLES, content=JSON | st.lists(BLOCKS, max_size=2)) | MESSAGES))
@settings(max_examples=150, deadline=None)
def test_any_items_of_responses_are_messages(items):
    check(of_responses([*items, HELLO]))


@given(st.lists(MESSAGES, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_messages_of_anthropics_are_messages(messages):
    check(of_anthropic([*messages, HELLO]))
