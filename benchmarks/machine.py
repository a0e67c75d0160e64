"""Results of scripts: what they were measured on, and the files that they go to."""

import json
from pathlib import Path
from typing import Any

from agentmem.bench.harness.machine import describe_machine

__all__ = ["describe_machine", "write_result"]


def write_result(result: dict[str, Any], path: Path | None) -> None:
    """Write a result as JSON, if there is a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
