"""A few kills of benchmarks/crash.py, which has 100."""

import numpy as np
from crash import Crashes
from persisted import lost, read_manifest

from agentmem.agent_key import AgentKey
from agentmem.store.agent_store import AgentStore
from agentmem.store.records import BlockToSave, TailToSave
from support.store_child import tensors_of


def test_a_server_that_is_killed_under_load_starts_again_has_lost_nothing_and_says_nothing_wrong(
    tmp_path,
):
    outcome = Crashes(tmp_path, seed=1).run(kills=4)
    assert outcome.failures == []
    assert outcome.kills == 4 and outcome.retries > 0 and outcome.branches_seen > 4
    assert outcome.answers["warm"] and outcome.control.tokens > 200


def test_what_is_missing_after_a_kill_is_noticed(tmp_path):
    tokens, tensors = np.arange(8, dtype=np.uint32), tensors_of(b"1")
    store = AgentStore.open(tmp_path / "store", "f0", {})
    store.save_block(
        BlockToSave(
            branch_id="1" * 32,
            agent=AgentKey("default", "alice"),
            key=b"a" * 32,
            parent=None,
            tokens=tokens,
            tensors=tensors,
        )
    )
    store.save_tail(
        TailToSave(
            branch_id="1" * 32,
            agent=AgentKey("default", "alice"),
            head=b"a" * 32,
            tokens=tokens,
            tensors=tensors,
        )
    ).result()
    before = read_manifest(tmp_path)
    store.close()
    nobody = {"deleted": set(), "deleting": set()}
    [tail], [block] = tmp_path.glob("store/f0/tails/*"), tmp_path.glob("store/f0/blocks/*/*")
    assert lost(tmp_path, before, **nobody) == []
    assert lost(tmp_path, before, deleted={"alice"}, deleting=set()) == [
        "alice was deleted, and is back"
    ]
    tail.write_bytes(tail.read_bytes()[:-1])
    assert len(lost(tmp_path, before, **nobody)) == 1
    tail.unlink()
    assert lost(tmp_path, before, **nobody) == ["alice had 1 blocks and a tail, they are lost"]
    block.unlink()
    assert lost(tmp_path, before, **nobody) == ["alice had 1 blocks and a tail, they are lost"]
    assert lost(tmp_path, before, deleted=set(), deleting={"alice"}) == []
