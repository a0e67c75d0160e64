"""`agentmem chat`: talk to an agent of a running server, in a terminal or from a script."""

import os
import readline
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import load_settings
from ..errors import AgentMemError, StartupError
from .chat_session import ChatAnswer, ChatSession
from .options import Home, Key, Url, connect
from .show import console, counted, size

HELP = """\
/fork NAME     go on as agent NAME; this one stays as it is
/system TEXT   instructions, from the next message on
/stats         the agent's cache, and what this chat took from it
/help          these lines
/quit          leave, as Ctrl-D and Ctrl-C do
Ctrl-C stops an answer. A \\ at the end of a line goes on in the next.
A space before a / makes it a message."""
_SHOWN = 1500  # characters of a message of the last exchange
_HISTORY = 1000  # lines
# nothing of a model's drives a terminal
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), 127, *range(128, 160)])


def chat(
    agent: Annotated[str, typer.Option(help="Id of the agent.")] = "chat",
    system: Annotated[str | None, typer.Option(help="Instructions to the agent.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer (default: the server's).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="Temperature; 0: always the likeliest token.")
    ] = None,
    think: Annotated[
        bool | None, typer.Option(help="Reason first, where the model's template has a switch.")
    ] = None,
    url: Url = None,
    api_key: Key = None,
    home: Home = None,
) -> None:
    """Chat with an agent of a running server, which remembers. Leave, restart either, and go on.

    What is piped in is answered line by line, without decoration; the first error ends that.
    """
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    if think is not None:
        options["chat_template_kwargs"] = {"enable_thinking": think}
    talk = ChatScreen(ChatSession(connect(url, api_key), agent, options))
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if system is not None:
        system = os.fsencode(system).decode(errors="replace")
    found = talk.begin(system or None)
    if not sys.stdin.isatty():
        talk.answer_lines(line.rstrip("\n") for line in sys.stdin)
        return
    talk.greet(found)
    talk.run(_Editor(load_settings({"home": home}).home_dir / "chat_history"))


class ChatScreen:
    """A conversation on the screen."""

    def __init__(self, session: ChatSession):
        self._session = session
        self._console = console()
        self._num_answers = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/fork": self._fork,
            "/system": self._system,
            "/stats": lambda _: self._stats(),
            "/help": lambda _: self._say(HELP),
        }

    def begin(self, system: str | None) -> dict[str, Any]:
        """Return the transcript so far, after which `system` holds."""
        found = self._session.load()
        instructions = [
            message["content"]
            for message in found["messages"]
            if message["role"] in ("system", "developer")
        ]
        if system is not None and system not in instructions[-1:]:
            self._session.instruct(system)
        return found

    def answer_lines(self, lines: Iterator[str]) -> None:
        """Answer each line on stdout, and take commands."""

        def hear(_: str, content: str) -> None:
            print(content, end="", flush=True)

        for line in lines:
            if line.strip() == "/quit":
                return
            if line.strip() and not self._command(line):
                self._count(self._session.ask(line.strip(), hear))
                print(flush=True)

    def greet(self, found: dict[str, Any]) -> None:
        """Show how much is there already, and the last of it."""
        name = self._session.agent
        messages = found["messages"]
        if not messages:
            self._say(f"{name} is new: nothing was said yet. /help for help")
            return
        stats = self._session.stats() or {"tokens": 0, "tier": "cold"}
        turns = counted(len(found["turns"]), "turn")
        self._say(f"{name}: {turns}, {stats['tokens']:,} tokens, {stats['tier']}. /help for help")
        questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
        for message in messages[max(questions, default=0) :]:
            who = name if message["role"] == "assistant" else message["role"]
            text = _text(message)
            more = " ..." if len(text) > _SHOWN else ""
            self._say(f"{who}: {text[:_SHOWN]}{more}")

    def run(self, editor: "_Editor") -> None:
        """Answer what is typed, until the user leaves."""
        unsaid = ""
        while True:
            try:
                line = editor.read(f"{self._session.agent}> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.strip() == "/quit":
                return
            if not line.strip():
                line = unsaid
            unsaid = ""
            try:
                if line and not self._command(line):
                    self._ask(line.strip())
            except AgentMemError as e:
                self._say(str(e))
                if not line.startswith("/"):
                    self._say(
                        "this is not in the conversation; Enter sends your line again, the up key "
                        "brings it back"
                    )
                    unsaid = line
            except KeyboardInterrupt:
                self._say("\nstopped")

    def _ask(self, question: str) -> None:
        try:
            answer = self._session.ask(question, self._hear)
        except KeyboardInterrupt:
            print()
            self._stopped(question)
        except AgentMemError:
            if self._session.answer.is_begun:
                print()
            raise
        else:
            print()
            self._count(answer)
            self._say(_cost(answer))

    def _stopped(self, question: str) -> None:
        try:
            kept = self._session.keep_cut(question)
        except (AgentMemError, KeyboardInterrupt) as e:
            self._say(
                f"stopped; what was said so far goes to the server with the next message. {e}"
            )
            return
        if kept is None:
            self._say("stopped before the answer began: nothing was said")
        else:
            self._say(f"stopped: kept as far as it came, {kept['prompt_tokens']:,} tokens in all")

    def _hear(self, reasoning: str, content: str) -> None:
        said = self._session.answer
        if reasoning:
            self._out(reasoning, "dim")
        if content:
            is_first = bool(said.reasoning) and said.content == content
            self._out(f"\n{content}" if is_first else content)

    def _out(self, text: str, style: str = "", end: str = "") -> None:
        self._console.out(text.translate(_CONTROL), style=style, end=end, highlight=False)

    def _say(self, text: str) -> None:
        self._out(text, "dim", "\n")

    def _count(self, answer: ChatAnswer) -> None:
        self._num_answers += 1
        self._prompt_tokens += answer.usage["prompt_tokens"]
        self._cached_tokens += answer.cost["cached_tokens"]

    def _command(self, line: str) -> bool:
        """Do what a line says if it is a command; return whether it was one."""
        if not line.startswith("/"):
            return False
        name, _, text = line.strip().partition(" ")
        if name not in self._commands:
            raise StartupError(
                f"there is no {name}; /help lists what there is, and a space before it makes it a "
                "message"
            )
        self._commands[name](text.strip())
        return True

    def _fork(self, name: str) -> None:
        if not name:
            raise StartupError("usage: /fork NAME, the id of the agent to go on as")
        self._session.fork(name)
        self._say(f"{name} goes on from here")

    def _system(self, text: str) -> None:
        if not text:
            raise StartupError("usage: /system TEXT")
        self._session.instruct(text)
        self._say("from the next message on")

    def _stats(self) -> None:
        name = self._session.agent
        stats = self._session.stats()
        if stats is None:
            self._say(f"{name} holds nothing yet")
            return
        branches = counted(len(stats["branches"]), "branch", "branches")
        where = f"{size(stats['ram_bytes'])} in RAM, {size(stats['disk_bytes'])} on disk"
        self._say(f"{name}: {stats['tier']}, {stats['tokens']:,} tokens, {branches}, {where}")
        cached = f"{self._cached_tokens:,} of {self._prompt_tokens:,} prompt tokens cached"
        self._say(f"this chat: {cached}, in {counted(self._num_answers, 'answer')}")


def _cost(answer: ChatAnswer) -> str:
    cost = answer.cost
    usage = answer.usage
    rate = answer.tokens_per_second
    speed = f" at {rate:.1f}/s" if rate else ""
    parts = [
        cost["cache"],
        f"{cost['cached_tokens']:,} of {usage['prompt_tokens']:,} tokens cached",
        f"{cost['ttft_ms']:,.0f} ms to the first token",
        f"{usage['completion_tokens']:,} tokens{speed}",
    ]
    if answer.reason == "length":
        parts.append("ended by the limit of its length")
    if cost["turn"] is None:
        parts.append("not kept")
    return ", ".join(parts)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


class _Editor:
    """Lines with readline's keys, and a history that only the user can read."""

    def __init__(self, history: Path):
        self._history = history
        os.umask(0o077)
        readline.set_history_length(_HISTORY)
        # Python turns it off: what is pasted is one message
        readline.parse_and_bind("set enable-bracketed-paste on")
        with suppress(OSError):  # none yet, or another readline's: a chat does not depend on it
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.read_history_file(history)

    def read(self, prompt: str) -> str:
        """Return what is typed. Raise EOFError, KeyboardInterrupt."""
        line = input(prompt)
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{input('... ')}"
        with suppress(OSError):
            readline.write_history_file(self._history)
        return line
