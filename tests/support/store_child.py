"""Run as a process by test_store_crash.py: saves blocks and tails until it is killed, and prints
what was acknowledged.

usage: store_child.py ROOT
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from agentmem.agent_key import AgentKey
from agentmem.store.agent_store import AgentStore
from agentmem.store.records import BlockToSave, BranchHead, TailToSave
from agentmem.tensors import HostTensor

BRANCHES = ["0" * 32, "1" * 32]


def key_of(parent: bytes | None, tokens: np.ndarray) -> bytes:
    return hashlib.sha256((parent or b"") + tokens.tobytes()).digest()[:16]


def tensors_of(key: bytes) -> dict[str, HostTensor]:
    rng = np.random.default_rng(list(key))
    codes = rng.integers(0, 2**32, (2, 3, 512), np.uint32)
    return {
        "k.codes": HostTensor("U32", codes.shape, memoryview(codes)),
        "k.scales": HostTensor("BF16", (2, 3, 8), rng.bytes(2 * 3 * 8 * 2)),
    }


def main(root: Path) -> None:
    store = AgentStore.open(root, "f0", {})
    heads = {branch.id: branch.head for branch in store.index().branches}
    step = len(store.index().blocks)
    while True:
        branch = BRANCHES[step % 2]
        parent = heads.get(branch)
        tokens = np.arange(step, step + 8, dtype=np.uint32)
        heads[branch] = key = key_of(parent, tokens)
        tail = np.array([step], np.uint32)
        block = store.save_block(
            BlockToSave(
                branch_id=branch,
                agent=AgentKey("default", "a"),
                key=key,
                parent=parent,
                tokens=tokens,
                tensors=tensors_of(key),
            )
        )
        block.add_done_callback(lambda _, key=key: print("block", key.hex(), flush=True))
        done = store.save_tail(
            TailToSave(
                branch_id=branch,
                agent=AgentKey("default", "a"),
                head=key,
                tokens=tail,
                tensors=tensors_of(key[::-1]),
                metadata={"of": key.hex()},
            )
        )
        if step % 3 == 0:
            done.result()
        if step % 11 == 10:
            store.save_branch(BranchHead("2" * 32, AgentKey("default", "b"), key, last_used=0.0))
            store.delete_agent(AgentKey("default", "b"))
        step += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
