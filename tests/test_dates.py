"""A date in a chat template costs a prefill only where the agent's session is over."""

from datetime import date, datetime, timedelta

import numpy as np
import pytest
from chat.families import tokenizer_of

from agentmem.server.chat import ChatRenderer
from agentmem.server.dates import MOST, session_days
from agentmem.server.messages import Message

DAY, HOUR = 86400.0, 3600.0
NOW = datetime(2026, 11, 21, 12).timestamp()
TODAY = date(2026, 11, 21)
CHAT = [Message("user", "Hello"), Message("assistant", "Hi there"), Message("user", "And now?")]


def rendered(family: str, messages: list[Message], branches=(), days=(TODAY,)) -> list[int]:
    return ChatRenderer(tokenizer_of(family), 1 << 20)._render(messages, branches, [], {}, days)


@pytest.mark.parametrize("family", ["llama3", "gpt-oss"])
def test_the_date_of_a_running_session_stays_and_a_new_one_has_todays(family):
    yesterday = TODAY - timedelta(days=1)
    before = rendered(family, CHAT[:1], days=[yesterday])
    branch = np.array(before)
    assert before != rendered(family, CHAT[:1])
    text = tokenizer_of(family).decode
    later = rendered(family, CHAT, [branch], [TODAY, yesterday])
    assert text(later).startswith(text(before[:-4]))
    assert rendered(family, CHAT, [branch], [TODAY]) == rendered(family, CHAT)
    assert rendered(family, CHAT, [], [TODAY, yesterday]) == rendered(family, CHAT)
    for written in (yesterday.strftime("%d %b %Y"), yesterday.isoformat()):
        assert (written in text(later)) == (written in text(before))


def test_a_template_without_a_date_is_rendered_once_as_it_is():
    assert rendered("smollm2", CHAT, days=[TODAY, TODAY - timedelta(days=1)]) == rendered("smollm2", CHAT, days=[])


def test_days_are_those_of_the_agents_life_while_its_session_lasts():
    assert session_days(NOW - 2 * DAY, NOW - HOUR, NOW, 24 * HOUR) == [TODAY - timedelta(days=n) for n in range(3)]
    assert session_days(NOW - HOUR, NOW - HOUR, NOW, 24 * HOUR) == [TODAY]
    assert session_days(NOW - 9 * DAY, NOW - 25 * HOUR, NOW, 24 * HOUR) == [TODAY]
    assert session_days(NOW - 9 * DAY, NOW - HOUR, NOW, 0) == [TODAY]
    assert len(session_days(NOW - 99 * DAY, NOW - HOUR, NOW, 24 * HOUR)) == MOST + 1
