"""An agent that is about to be asked is brought into RAM."""

import time
from concurrent.futures import Future

from ..errors import Busy
from .startup import Core


def prefetch_agent(core: Core, namespace: str, name: str, done: "Future[int | None]") -> None:
    """Bring the agent's newest branch into RAM; `done` gets the bytes read, None if there is no such agent.

    Busy: there is no room now.
    """
    agent = core.contexts.agents.get((namespace, name))
    if agent is None or not agent.branches:
        done.set_result(None)
        return
    branch = agent.newest
    assert branch is not None
    match = core.contexts.prefix(branch, len(branch))
    nbytes, budget = match.missing_bytes, core.budget
    if not match.missing:
        core.contexts.touch(match)
        done.set_result(0)
    elif not budget.make_room(nbytes, match.entries(), urgent=False):
        raise Busy(
            f"There is no room for the {nbytes:,} bytes of agent {name[:200]!r}: {budget.used_bytes:,} of the "
            f"{budget.limit:,} bytes of RAM for caches (kv_budget) are in use or reserved.",
            code="kv_budget_full",
        )
    else:
        core.contexts.hold_match(match)
        began = time.perf_counter()

        def restored(nbytes: int, at: float) -> None:
            core.trace.span("restore", began, max(began, at), agent=name, bytes=nbytes)
            core.contexts.release_match(match)
            done.set_result(nbytes)

        core.restorer.restore(match, restored)
