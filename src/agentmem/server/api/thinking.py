"""Whether a model is to think before it answers: each client says it in a field of its own."""

from typing import Any

_OFF = ("none", "off", "disabled", "false")


def thinking_options(*wishes: Any) -> dict[str, Any]:
    """Return the chat template's options for the first wish that says something.

    A wish is a switch, an effort such as "low" or "none", or an object that holds one of them:
    `{"type": "disabled"}`, `{"effort": "high"}`, `{"enabled": false}`. What is said in another form
    is left to the template, as is everything in silence. Most templates that can think read
    enable_thinking; gpt-oss' reads reasoning_effort.
    """
    for wish in wishes:
        said = _said(wish)
        if isinstance(said, bool):
            return {"enable_thinking": said}
        if isinstance(said, str) and said.lower() in _OFF:
            return {"enable_thinking": False}
        if isinstance(said, str) and said:
            return {"enable_thinking": True, "reasoning_effort": said}
    return {}


def _said(wish: Any) -> Any:
    """Return the switch or the effort in a wish; None: there is none."""
    if not isinstance(wish, dict):
        return wish
    if isinstance(enabled := wish.get("enabled"), bool):
        return enabled
    if isinstance(effort := wish.get("effort"), str):
        return effort
    kind = wish.get("type")
    return kind != "disabled" if isinstance(kind, str) else None
