"""The fast BLAS has to be loaded before any test module imports MLX."""

import os
from pathlib import Path

import pytest

from agentmem.models.blas import load_fast_blas

HOME = Path(os.environ.get("AGENTMEM_TEST_HOME") or "~/.agentmem").expanduser()

load_fast_blas(HOME)


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The converted demo model; downloaded on the first run."""
    from agentmem.models.pull import pull_demo

    return pull_demo(HOME)
