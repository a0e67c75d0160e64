"""What tests say over HTTP to a real server on a tiny model (fixture `server`), and what they read
of its answers.
"""

from pathlib import Path
from urllib.parse import quote

import httpx

from support.server_process import ServerProcess
from support.tiny import BLOCK, random_tokens

FLAGS = ("--block-size", str(BLOCK), "--prefill-chunk", "64", "--tail-delay", "0.05")
KEYS = {"a": f"sk-a-{'0' * 16}", "b": f"sk-b-{'0' * 16}"}


def write_keys(path: Path) -> Path:
    """The file of KEYS, as --api-keys takes it."""
    path.write_text("".join(f'{name} = "{key}"\n' for name, key in KEYS.items()))
    path.chmod(0o600)
    return path


def words(n: int, seed: int) -> str:
    """A text of `n` tokens."""
    return " ".join(f"w{token}" for token in random_tokens(n, seed))


def user(n: int, seed: int) -> dict[str, str]:
    return {"role": "user", "content": words(n, seed)}


def text(chat: dict) -> str:
    return chat["choices"][0]["message"]["content"]


def answered(chat: dict) -> dict[str, str]:
    return {"role": "assistant", "content": text(chat)}


def path(agent: str, operation: str = "") -> str:
    return f"/agents/{quote(agent, safe='').replace('.', '%2E')}" + (
        f"/{operation}" if operation else ""
    )


def transcript(server: ServerProcess, agent: str, **params: str) -> dict:
    response = server.client.get(path(agent, "transcript"), params=params)
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: httpx.Response) -> tuple[int, str, str | None, str]:
    """Status, code and param of an error in OpenAI's shape, and its message, which is one line."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return response.status_code, error["code"], error["param"], error["message"]
