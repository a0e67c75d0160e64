"""What tests of an agent's life do with an engine."""

import io

from agentmem.agent_key import AgentKey
from support.engines import settle
from support.tiny import BLOCK, random_tokens, word_ids

PROMPT, MORE = random_tokens(3 * BLOCK + 10, seed=1), random_tokens(2 * BLOCK, seed=2)


def talk(engine, agent: str, turns: int = 1) -> list[int]:
    """Tokens of prompt and answers after `turns`."""
    tokens = list(PROMPT)
    for turn in range(turns):
        answer, _ = engine.ask(agent, tokens + (MORE if turn else []))
        tokens = tokens + (MORE if turn else []) + word_ids(answer)
    return tokens


def rested(engine, *, hot: bool) -> list[int]:
    """Tokens of alice, who was asked once and is on disk; and in RAM, if `hot`."""
    tokens = talk(engine, "alice")
    settle(engine)
    if not hot:
        engine.call(engine.engine.agents.evict(AgentKey("default", "alice")))
    return tokens


def store_files(home) -> list:
    return [path for path in (home / "store").rglob("*") if path.is_file()]


def drain(engine, request) -> None:
    async def run() -> None:
        async for _ in engine.engine.generate(request):
            pass

    engine.call(run())


def exported(engine, agent: str = "alice") -> bytes:
    export = engine.call(engine.engine.archives.export(AgentKey("default", agent)))
    try:
        return b"".join(export.chunks)
    finally:
        export.close()


def imported(engine, archive: bytes, name: str | None = None):
    return engine.call(engine.engine.archives.import_("default", name, io.BytesIO(archive)))
