"""Decode throughput over HTTP: 8 agents of about 500 tokens that answer at once, against one of them alone.

Every agent first sends its prompt once; the measured answers are to the same prompt again, so that caches are hot and
nothing is prefilled. Tokens/s come from the arrival of chunks: alone from the first to the last one; together only
while all 8 stream, from the last first chunk to the first last one. A chunk may carry more than one token, so each
counts as an answer's tokens over its chunks. Rounds are interleaved, alone and together; a figure is their median.

    python benchmarks/http_throughput.py --json benchmarks/results/http-throughput-demo.json
"""

import argparse
import asyncio
import pydoc_data.topics
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from machine import describe_machine
from server_process import ServerProcess
from streams import Answer, StreamError, report, stream_chat

DEMO = Path("~/.agentmem/models/demo").expanduser()
SPEEDUP = 3.0  # that must hold for 8 agents


@dataclass(frozen=True)
class Round:
    alone_tokens_per_s: float
    together_tokens_per_s: float
    window_s: float  # while all of them streamed


def prompts(model: Path, agents: int, tokens: int) -> list[list[dict[str, str]]]:
    """One conversation for each agent, of as many tokens without the chat template, each of a text of its own."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer.encode(text[: agents * tokens * 8], add_special_tokens=False).ids
    assert len(ids) >= agents * tokens, "the corpus is too short for that"
    parts = (tokenizer.decode(ids[i * tokens : (i + 1) * tokens]) for i in range(agents))
    return [[{"role": "user", "content": part}] for part in parts]


def tokens_per_s(answers: list[Answer]) -> tuple[float, float]:
    """(tokens/s of all together, seconds) while all of them streamed."""
    start, stop = max(a.times[0] for a in answers), min(a.times[-1] for a in answers)
    tokens = 0.0
    for answer in answers:
        chunks = sum(start < t <= stop for t in answer.times)
        tokens += chunks * answer.usage["completion_tokens"] / len(answer.times)
    return tokens / (stop - start), stop - start


class Asker:
    """Asks for answers of `max_tokens`, and checks that each came whole and, once `hot`, without any prefill."""

    def __init__(self, client: httpx.AsyncClient, max_tokens: int):
        self._client, self._max_tokens = client, max_tokens

    async def ask(self, agent: int, messages: list[dict[str, str]], *, hot: bool = True) -> Answer:
        max_tokens = self._max_tokens if hot else 1
        body: dict[str, Any] = {"messages": messages, "agent_id": f"agent-{agent}", "temperature": 0}
        answer = await stream_chat(self._client, body | {"max_tokens": max_tokens, "ignore_eos": True})
        if answer.usage.get("completion_tokens") != max_tokens or not answer.is_done:
            raise StreamError(f"agent {agent}: not a whole answer of {max_tokens} tokens: {answer.usage}")
        cached, prompt = answer.agentmem["cached_tokens"], answer.usage["prompt_tokens"]
        if hot and (answer.agentmem["cache"] != "hot" or cached != prompt - 1):
            raise StreamError(f"agent {agent}: {answer.agentmem['cache']}, {cached} of {prompt} tokens cached")
        return answer

    async def one_round(self, chats: list[list[dict[str, str]]], number: int) -> Round:
        alone = await self.ask(number % len(chats), chats[number % len(chats)])
        together = await asyncio.gather(*(self.ask(i, chat) for i, chat in enumerate(chats)))
        return Round(tokens_per_s([alone])[0], *tokens_per_s(together))


async def measure(url: str, chats: list[list[dict[str, str]]], max_tokens: int, rounds: int) -> list[Round]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        asker, found = Asker(client, max_tokens), []
        for i, chat in enumerate(chats):
            await asker.ask(i, chat, hot=False)
            print(f"prefilled {i + 1}/{len(chats)}", file=sys.stderr)
        for i in range(rounds):
            found.append(await asker.one_round(chats, i))
            print(f"round {i + 1}/{rounds}  {found[-1]}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO, help="a model directory; default: the demo model")
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=490, help="of a prompt, less the chat template (30)")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    chats = prompts(args.model, args.agents, args.tokens)
    with (
        tempfile.TemporaryDirectory() as home,
        ServerProcess(Path(home), "--max-running", str(args.agents), model=args.model) as server,
    ):
        try:
            rounds = asyncio.run(measure(server.url, chats, args.answer_tokens, args.rounds))
        except (StreamError, httpx.HTTPError) as e:
            sys.exit(f"FAILED: {type(e).__name__}: {e}")
        server.stop()
    alone = statistics.median(r.alone_tokens_per_s for r in rounds)
    together = statistics.median(r.together_tokens_per_s for r in rounds)
    result = {
        "benchmark": "http_throughput",
        "machine": describe_machine(),
        "model": args.model.name,
        "agents": args.agents,
        "tokens": args.tokens,
        "answer_tokens": args.answer_tokens,
        "rounds": [asdict(r) for r in rounds],
        "alone_tokens_per_s": alone,
        "together_tokens_per_s": together,
        "speedup": together / alone,
    }
    too_slow = f"{args.agents} agents answer at {together / alone:.2f}x of one, not {SPEEDUP}x"
    report(result, [] if together >= SPEEDUP * alone else [too_slow], args.json)


if __name__ == "__main__":
    main()
