"""`agentmem` as a process, beside a real server."""

from support.chat_http import user
from support.server_process import ServerProcess

KEY = f"sk-{'0' * 16}"


def chat(server: ServerProcess, agent: str, seed: int, **options) -> dict:
    return server.chat([user(100, seed)], agent=agent, max_tokens=4, **options)
