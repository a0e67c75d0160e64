"""A server under load is killed and started again, 100 times (--kills), on the same home.

Four clients talk for eight agents, whose conversations grow turn by turn; a long one is deleted,
and a new one begins. At a random moment the server is stopped for an instant, its manifest is read
from outside, and it is killed (SIGKILL); some servers are killed while they start. Demands:
  - it always starts again, and answers 200 to everything while it lives
  - every token is the likeliest one to a control that computes from nothing (control.py), ties of a
    rounding apart
  - whatever the manifest named when the process was killed is there afterwards, verifies, and is
    used: the agent's next turn finds at least its blocks cached; an agent whose deletion was
    answered is gone
The model is a tiny llama of random weights, whose tokens are words.

    python benchmarks/crash.py --json benchmarks/results/crash-tiny.json
"""

import argparse
import asyncio
import dataclasses
import json
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from agentmem.linux_cpu.blas import load_fast_blas

load_fast_blas(Path("~/.agentmem").expanduser())
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from control import LOGIT_BIAS, SAMPLING, Control, Tally  # noqa: E402  (after the BLAS)
from machine import describe_machine, write_result  # noqa: E402
from persisted import Persisted, lost, read_manifest  # noqa: E402

from agentmem.models.loading import load_model  # noqa: E402
from support.server_process import ServerProcess  # noqa: E402
from support.tiny import BLOCK, word_ids  # noqa: E402
from support.tiny_model_dir import write_tiny_model  # noqa: E402

CLIENTS = 4
AGENTS = 8
FLAGS = shlex.split(
    f"--block-size {BLOCK} --prefill-chunk 64 --tail-delay 0.02 --kv-budget 8M "
    "--attention dequantized --log-level warning"
)
LONGEST_LIFE = 1.5  # s of a server, once it is up
STARTING = 10  # every tenth server is killed before it is up
SYSTEM = " ".join(f"w{i}" for i in range(10, 80))
LONGEST = 500  # tokens of a conversation
SHORTEST_ANSWER = 8
LONGEST_ANSWER = 16
BODY = {**SAMPLING, "logit_bias": {str(token): bias for token, bias in LOGIT_BIAS}}


@dataclass
class Chat:
    """An agent's conversation.

    `messages` ends with the user's word that waits for an answer, or with an answer.
    """

    agent: str
    messages: list[dict[str, str]] = field(
        default_factory=lambda: [{"role": "system", "content": SYSTEM}]
    )

    def num_tokens(self) -> int:
        """Count the prompt: each message has three tokens around it, an answer begins with two."""
        return sum(len(m["content"].split()) + 3 for m in self.messages) + 2

    def speak(self, rng: random.Random) -> None:
        """Add the user's next message, unless one waits.

        The answer to it must end in the block in which it begins: where a prompt is sent again
        after a kill, a block that had been sealed with part of the answer would be cut, and codes
        stand where full precision was: both right, not equal.
        """
        if self.messages[-1]["role"] == "user":
            return
        words = [f"w{rng.randint(8, 255)}" for _ in range(rng.randint(3, 60))]
        self.messages.append({"role": "user", "content": " ".join(words)})
        while not 1 <= self.num_tokens() % BLOCK < BLOCK - SHORTEST_ANSWER:
            self.messages[-1]["content"] += f" w{rng.randint(8, 255)}"

    def room(self) -> int:
        """Return how many tokens the answer may have."""
        return min(LONGEST_ANSWER, BLOCK - 1 - self.num_tokens() % BLOCK)


@dataclass(frozen=True)
class Said:
    """An answer to be checked."""

    agent: str
    messages: list[dict[str, str]]
    text: str


@dataclass
class Outcome:
    kills: int = 0
    killed_starting: int = 0
    answers: dict[str, int] = field(default_factory=lambda: {"cold": 0, "warm": 0, "hot": 0})
    retries: int = 0  # prompts sent again after a kill
    deletions: int = 0
    branches_seen: int = 0  # in manifests of killed servers, each looked for afterwards
    blocks_seen: int = 0
    control: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    slowest_start: float = 0.0  # s
    failures: list[str] = field(default_factory=list)


class Crashes:
    """A home, its servers, and the clients, who outlive them."""

    def __init__(self, directory: Path, *, seed: int = 0):
        self._model = write_tiny_model(directory / "tiny")
        self._home = directory / "home"
        loaded = load_model(str(self._model), directory)
        self._tokenizer = loaded.tokenizer
        self._control = Control(loaded, BLOCK)
        self._rng = random.Random(seed)
        self._chats = [Chat(f"agent {i}") for i in range(AGENTS)]
        self._named = AGENTS
        self._said: list[Said] = []
        self._deleted: set[str] = set()
        self._deleting: set[str] = set()
        # blocks that an agent's first turn after a restart must find
        self._expected: dict[str, int] = {}
        self._dying = False
        self.outcome = Outcome(control=self._control.tally)

    def run(self, kills: int, progress: Callable[[str], None] = lambda text: None) -> Outcome:
        """Kill so many servers; end early if one does not start."""
        began = time.monotonic()
        outcome = self.outcome
        while outcome.kills < kills:
            if outcome.kills % STARTING == STARTING - 1:
                self._kill_one_that_starts()
                continue
            try:
                asyncio.run(self._one_life())
            except AssertionError as e:  # of ServerProcess
                self._fail(f"the server does not start: {e}")
                break
            self._check_answers()
            took = f"{time.monotonic() - began:.0f} s"
            progress(f"{outcome.kills} kills, {took}, {asdict(outcome.control)}")
        outcome.seconds = round(time.monotonic() - began, 1)
        return outcome

    def _fail(self, what: str) -> None:
        self.outcome.failures.append(f"kill {self.outcome.kills}: {what}")

    # A server's life

    async def _one_life(self) -> None:
        began = time.monotonic()
        server = ServerProcess(self._home, *FLAGS, model=self._model)
        took = round(time.monotonic() - began, 2)
        self.outcome.slowest_start = max(self.outcome.slowest_start, took)
        self._dying = False
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            free = asyncio.Queue[Chat]()
            for chat in self._rng.sample(self._chats, len(self._chats)):
                free.put_nowait(chat)
            clients = [asyncio.create_task(self._client(client, free)) for _ in range(CLIENTS)]
            await asyncio.sleep(self._rng.uniform(0.0, LONGEST_LIFE))
            self._look_at_health(server)
            before = self._kill(server)
            await asyncio.gather(*clients)
        self._check_store(before)

    def _look_at_health(self, server: ServerProcess) -> None:
        health = server.client.get(server.url.removesuffix("/v1") + "/health").json()
        if health["status"] != "ok" or health["store"]["quarantined"]:
            self._fail(f"/health: {health['status']}, {health['errors']}, {health['store']}")

    def _kill(self, server: ServerProcess) -> Persisted | None:
        """Kill a server. Returns what its manifest said at that moment."""
        self._dying = True
        before = self._read_manifest_of(server.process)
        server.stop(signal.SIGKILL)
        self.outcome.kills += 1
        return before

    def _read_manifest_of(self, server: "subprocess.Popen[Any]") -> Persisted | None:
        """Read the manifest of a server, which is stopped (SIGSTOP) afterwards."""
        for _ in range(100):
            server.send_signal(signal.SIGSTOP)
            try:
                return read_manifest(self._home)
            except sqlite3.OperationalError:  # stopped while it held SQLite's lock
                server.send_signal(signal.SIGCONT)
                time.sleep(0.01)
        raise TimeoutError("the manifest is always locked")

    def _kill_one_that_starts(self) -> None:
        command = [sys.executable, "-m", "agentmem", "serve", "--port", "0"]
        command += ["--home", str(self._home), "--model", str(self._model), *FLAGS]
        server = subprocess.Popen(command, stdout=subprocess.PIPE)
        time.sleep(self._rng.uniform(0.0, 1.2) * self.outcome.slowest_start)
        before = self._read_manifest_of(server)
        server.kill()
        server.communicate()
        self.outcome.kills += 1
        self.outcome.killed_starting += 1
        self._check_store(before)

    def _check_store(self, before: Persisted | None) -> None:
        if before is None:
            return
        self.outcome.branches_seen += len(before.paths)
        self.outcome.blocks_seen += len(set().union(*[path.keys for path in before.paths]))
        for what in lost(self._home, before, deleted=self._deleted, deleting=self._deleting):
            self._fail(what)
        self._expected = {chat.agent: before.blocks_of(chat.agent) for chat in self._chats}

    def _check_answers(self) -> None:
        for said in self._said:
            prompt = self._tokenizer.apply_chat_template(
                said.messages, add_generation_prompt=True, tokenize=True
            )
            if wrong := self._control.check(list(prompt), word_ids(said.text)):
                self._fail(f"{said.agent} at {len(prompt)} tokens: {wrong}")
        self._said.clear()

    # Clients

    async def _client(self, client: httpx.AsyncClient, free: "asyncio.Queue[Chat]") -> None:
        try:
            while not self._dying:
                chat = free.get_nowait()
                if chat.num_tokens() > LONGEST and chat.messages[-1]["role"] == "assistant":
                    await self._start_afresh(client, chat)
                await self._turn(client, chat)
                free.put_nowait(chat)
        except httpx.TransportError as e:
            if not self._dying:
                self._fail(f"a server that was not killed: {type(e).__name__}: {e}")

    async def _start_afresh(self, client: httpx.AsyncClient, chat: Chat) -> None:
        """Delete the agent; the chat goes on under another name.

        Given up by a kill, the agent may be there or not.
        """
        old = chat.agent
        chat.agent = f"agent {self._named}"
        chat.messages = Chat("").messages
        self._named += 1
        self._deleting.add(old)
        response = await client.delete(f"agents/{old}")
        if response.status_code != 200:
            self._fail(f"deletion: HTTP {response.status_code}: {response.text}")
            return
        self._deleting.remove(old)
        self._deleted.add(old)
        self.outcome.deletions += 1

    async def _turn(self, client: httpx.AsyncClient, chat: Chat) -> None:
        self.outcome.retries += chat.messages[-1]["role"] == "user"
        chat.speak(self._rng)
        body = {
            **BODY,
            "messages": chat.messages,
            "agent_id": chat.agent,
            "max_tokens": chat.room(),
        }
        response = await client.post("chat/completions", json=body)
        if response.status_code != 200:
            self._fail(f"HTTP {response.status_code}: {response.text}")
            return
        answer = response.json()
        text = answer["choices"][0]["message"]["content"]
        usage = answer["usage"]
        if usage["prompt_tokens"] != chat.num_tokens() or len(text.split()) != body["max_tokens"]:
            self._fail(
                f"asked {chat.num_tokens()} tokens for {body['max_tokens']}: {usage}, {text!r}"
            )
            return
        self._check_cached(chat, usage["prompt_tokens_details"]["cached_tokens"])
        self.outcome.answers[answer["agentmem"]["cache"]] += 1
        self._said.append(Said(chat.agent, list(chat.messages), text))
        chat.messages.append({"role": "assistant", "content": text})

    def _check_cached(self, chat: Chat, cached: int) -> None:
        """Check that what was persisted is used.

        Those of its blocks are meant that lie before the prompt's last token.
        """
        blocks = min(self._expected.pop(chat.agent, 0), (chat.num_tokens() - 1) // BLOCK)
        if cached < blocks * BLOCK:
            self._fail(
                f"{chat.agent} had {blocks} blocks of its prompt on disk, "
                f"and {cached} tokens were cached"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        crashes = Crashes(Path(directory), seed=args.seed)
        outcome = crashes.run(args.kills, lambda text: print(text, file=sys.stderr))
    head: dict[str, Any] = {
        "benchmark": "crash",
        "machine": describe_machine(),
        "model": "tiny llama",
    }
    result = {**head, "seed": args.seed, **dataclasses.asdict(outcome)}
    print(json.dumps(result, indent=2))
    write_result(result, args.json)
    for failure in outcome.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    sys.exit(1 if outcome.failures else 0)


if __name__ == "__main__":
    main()
