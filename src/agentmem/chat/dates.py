"""The date in a chat template stays what it was for an agent as long as its session goes on.

A template with a date (Llama 3, gpt-oss) renders another first message each day, so that at
midnight every agent's context would be prefilled again. A prompt is therefore rendered as of each
day of the agent's life, newest first, and the day whose text goes on from what the agent has cached
is taken.
"""

import re
from collections.abc import Sequence
from datetime import date, datetime, timedelta

_CALL = re.compile(r"""strftime_now\(\s*(['"])(?P<format>[^'"]*)\1\s*\)""")
MOST = 7  # days that a date may be old


def is_dated(template: str) -> bool:
    return _CALL.search(template) is not None


def on_day(template: str, day: date) -> str:
    """Return the template as if that were today."""
    return _CALL.sub(lambda call: repr(day.strftime(call["format"])), template)


def session_days(created: float, last_used: float, now: float, session: float) -> Sequence[date]:
    """Return the days whose date an agent's prompts may bear, today first. Times: Unix seconds.

    `session`: seconds after its last request in which a date is kept; 0: never.
    """
    today = datetime.fromtimestamp(now).date()
    if not session or now - last_used > session:
        return [today]
    first = max(datetime.fromtimestamp(created).date(), today - timedelta(days=MOST))
    return [today - timedelta(days=n) for n in range((today - first).days + 1)]
