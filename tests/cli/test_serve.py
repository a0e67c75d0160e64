"""What `agentmem serve` says at its start."""

import pytest

from support.server_process import ServerProcess
from support.tiny import BLOCK
from support.tiny_model_dir import write_tiny_model

FLAGS = ("--block-size", str(BLOCK), "--prefill-chunk", "64")


@pytest.mark.parametrize(
    ("budget", "warns"),
    [
        ("64M", False),
        ("1600K", True),
    ],
)
def test_a_budget_that_cuts_the_context_is_a_warning_at_the_start(tmp_path, budget, warns):
    model = write_tiny_model(tmp_path / "tiny", max_context=8192)
    with ServerProcess(tmp_path, *FLAGS, "--kv-budget", budget, model=model) as server:
        served = server.client.get(server.url.removesuffix("/v1") + "/health").json()["max_context"]
        assert server.stop() == 0
    assert (served < 8192) == warns
    log = (tmp_path / "server.log").read_text()
    warning = f"warning: prompt and answer have {served:,} tokens at most (kv_budget, "
    assert (warning in log) == warns
