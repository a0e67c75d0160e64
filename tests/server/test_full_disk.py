"""A full disk costs persistence while it lasts, and nothing else."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentmem.store.upkeep.fsck import store_stats, stores, verify
from support import full_disk_server
from support.server_process import ServerProcess
from support.tiny_model_dir import write_tiny_model

FLAGS = (
    "--block-size",
    "32",
    "--tail-delay",
    "0.05",
    "--write-amplification",
    "1e9",
    "--store-min-free",
    "0",
)


def message(i: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": " ".join(f"w{8 + (i * 37 + j * 11) % 240}" for j in range(120))}
    ]


def health(server: ServerProcess) -> dict:
    return server.client.get(server.url.removesuffix("/v1") + "/health").json()


def wait_for(server: ServerProcess, status: str) -> dict:
    deadline = time.monotonic() + 20
    while (now := health(server))["status"] != status:
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    return now


def run_through_a_full_disk(server: ServerProcess, fill, empty) -> None:
    """Check that answers go on, and that /health says what is wrong.

    What could not be saved is saved without a restart.
    """
    first = server.chat(message(0), "before", max_tokens=4)
    wait_for(server, "ok")
    fill()
    answers = {
        f"during{i}": server.chat(message(i), f"during{i}", max_tokens=4) for i in range(1, 5)
    }
    assert re.search("No space left|disk is full", wait_for(server, "degraded")["errors"][0])
    again = server.chat(message(1), "during1", max_tokens=4)
    assert again["agentmem"]["cache"] == "hot"
    empty()
    wait_for(server, "ok")
    deadline = time.monotonic() + 20
    while not all(a["disk_bytes"] > 20_000 for a in server.client.get("/agents").json()["data"]):
        assert time.monotonic() < deadline, server.client.get("/agents").json()
        time.sleep(0.2)
    for name, answer in {"before": first, **answers}.items():
        server.client.post(f"/agents/{name}/evict").raise_for_status()
        index = 0 if name == "before" else int(name[-1])
        back = server.chat(message(index), name, max_tokens=4)
        assert back["agentmem"]["cache"] == "warm"
        assert back["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
        assert back["agentmem"]["cached_tokens"] == back["usage"]["prompt_tokens"] - 1
    assert server.stop() == 0


def test_a_server_on_a_full_disk_goes_on_and_recovers_by_itself(tmp_path):
    model, flag = write_tiny_model(tmp_path / "tiny"), tmp_path / "full"
    command = (sys.executable, full_disk_server.__file__, str(flag))
    with ServerProcess(tmp_path / "home", *FLAGS, model=model, command=command) as server:
        run_through_a_full_disk(server, flag.touch, flag.unlink)
    (layout,) = stores(tmp_path / "home" / "store")
    assert store_stats(layout).agents == 5
    assert verify(layout, lambda _: None).ok
    assert not list(layout.root.rglob("*.tmp"))


def _can_mount() -> bool:
    return (
        sys.platform == "linux"
        and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(
    not _can_mount(), reason="needs user and mount namespaces, for a small tmpfs of its own"
)
def test_a_server_on_a_full_tmpfs_goes_on_and_recovers_by_itself(tmp_path):
    """Here the manifest meets the full disk too."""
    model, home = write_tiny_model(tmp_path / "tiny"), tmp_path / "home"
    mount = (
        f'mount -t tmpfs -o size=6m tmpfs {home} && exec {sys.executable} -m agentmem serve "$@"'
    )
    with ServerProcess(
        home, *FLAGS, model=model, command=("unshare", "-rm", "sh", "-c", mount, "sh")
    ) as server:
        # as the server's mounts show it
        filler = Path(f"/proc/{server.process.pid}/root{home}/filler")

        def fill() -> None:
            with (
                filler.open("wb", buffering=0) as file,
                pytest.raises(OSError, match="No space left"),
            ):
                while True:
                    file.write(bytes(4096))

        run_through_a_full_disk(server, fill, filler.unlink)
