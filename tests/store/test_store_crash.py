"""kill -9 at random moments.

What was acknowledged is there and equal, and nothing is half there.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from agentmem.store.agent_store import AgentStore
from agentmem.store.files.layout import Layout
from support import store_child


def run_and_kill(root: Path, lines: int, seconds: float) -> set[bytes]:
    """The keys that the child acknowledged, which is killed so long after it did so many."""
    child = subprocess.Popen(
        [sys.executable, store_child.__file__, str(root)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    said = [child.stdout.readline() for _ in range(lines)]
    time.sleep(seconds)
    child.kill()
    out, _ = child.communicate()
    assert child.returncode == -signal.SIGKILL
    said += out.splitlines(keepends=True)
    return {bytes.fromhex(line.split()[1]) for line in said if line.endswith("\n")}


def check_whole(store: AgentStore) -> set[bytes]:
    """Check that every chain leads to a root, and every block and tail is what was saved.

    Returns the keys of the blocks.
    """
    index = store.index()
    blocks = {block.key: block for block in index.blocks}
    for block in index.blocks:
        assert block.parent is None or block.parent in blocks
        assert store_child.key_of(block.parent, block.tokens) == block.key
        assert_equal(store.read_block(block.key).result(), store_child.tensors_of(block.key))
    for branch in index.branches:
        assert branch.head in blocks
        if branch.tail is not None:
            tensors, metadata = store.read_tail(branch.id).result()
            assert metadata["of"] == branch.head.hex()
            assert_equal(tensors, store_child.tensors_of(branch.head[::-1]))
    return set(blocks)


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(got[name].data) == bytes(tensor.data)


def test_acknowledged_blocks_survive_kill_9_and_leave_no_garbage(tmp_path):
    rng = random.Random(7)
    acknowledged: set[bytes] = set()
    for _ in range(10):
        acknowledged |= run_and_kill(tmp_path, rng.randint(1, 20), rng.uniform(0, 0.05))
        store = AgentStore.open(tmp_path, "f0", {})
        keys = check_whole(store)
        tails = sum(branch.tail is not None for branch in store.index().branches)
        store.close()
        assert acknowledged <= keys
        layout = Layout(tmp_path / "f0")
        assert sum(path.is_file() for path in layout.blocks.rglob("*")) == len(keys)
        assert len(list(layout.tails.iterdir())) == tails
    assert len(acknowledged) > 50
