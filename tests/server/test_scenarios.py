"""The paper's two workflows, on a tiny model over HTTP.

What an agent has read once it never reads again.
"""

from support.chat_http import words
from support.server_process import ServerProcess
from support.tiny import BLOCK

FLAGS = (
    "--block-size",
    str(BLOCK),
    "--tail-delay",
    "0",
    "--write-amplification",
    "1000",
    "--max-context",
    "1024",
)


class Agent:
    """One that keeps its own messages, as agent frameworks do, and sends all of them each turn."""

    def __init__(self, name: str, role: str):
        self.name, self.messages, self.seen = name, [{"role": "system", "content": role}], 0

    def turn(self, server: ServerProcess, said: str, max_tokens: int = 6) -> dict:
        self.messages.append({"role": "user", "content": said})
        chat = server.chat(self.messages, self.name, max_tokens=max_tokens, ignore_eos=True)
        self.messages.append(chat["choices"][0]["message"])
        usage = chat["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached >= self.seen, (
            f"{self.name} prefills {self.seen - cached} tokens a second time"
        )
        self.seen = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        return chat["agentmem"]


def test_five_phases_of_a_prisoners_dilemma_read_nothing_twice(model, tmp_path):
    """Four agents, 25 turns; what was said in a phase is told to each in the next.

    The server restarts in between.
    """
    names = ("warden", "marco", "danny", "analyst")
    agents = {name: Agent(name, words(60, seed)) for seed, name in enumerate(names)}
    phases = [
        ("warden", "marco", "warden", "marco", "warden"),
        ("warden", "danny", "warden", "danny", "warden"),
        ("marco", "danny", "marco", "danny", "marco"),
        ("warden", "marco", "danny", "marco", "danny"),
        ("analyst", "analyst", "warden", "marco", "danny"),
    ]
    assert sum(map(len, phases)) == 25
    for number, phase in enumerate(phases):
        with ServerProcess(tmp_path / "home", *FLAGS, model=model) as server:
            met = set()
            for i, name in enumerate(phase):
                known = agents[name].seen
                cost = agents[name].turn(server, words(12, seed=100 * number + i))
                if known and name not in met:
                    assert cost["cache"] == "warm", f"{name} in phase {number}"
                met.add(name)
            assert server.stop() == 0


def test_ten_experts_are_primed_once_and_asked_many_times(model, tmp_path):
    """Prime, query, repeat: RAM holds a few of the ten."""
    experts = [Agent(f"expert {i}", words(300, seed=50 + i)) for i in range(10)]
    with ServerProcess(tmp_path / "home", *FLAGS, "--kv-budget", "1600K", model=model) as server:
        primed = [expert.turn(server, "w8", max_tokens=1)["cache"] for expert in experts]
        assert primed == ["cold"] * 10
        for repeat in range(2):
            states = [expert.turn(server, words(8, seed=repeat))["cache"] for expert in experts]
            assert "cold" not in states
            assert "warm" in states
        assert server.stop() == 0
