"""JSON schemas of the results.

`python -m agentmem.bench.harness.schemas DIR` writes one a benchmark.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from .result import Result

# benchmark: its result's class, from agentmem.bench
RESULTS = {
    "ttft": "ttft.TtftResult",
    "throughput": "throughput.ThroughputResult",
    "staggered": "staggered.StaggeredResult",
    "persistence": "persistence.PersistenceResult",
    "restore": "restore.RestoreResult",
    "write": "write.WriteResult",
    "ablation": "ablation.AblationResult",
    "scenario": "scenario_result.ScenarioResult",
    "compare": "compare_rows.CompareResult",
}


def result_class(benchmark: str) -> type[Result]:
    module, _, name = RESULTS[benchmark].partition(".")
    found: type[Result] = getattr(importlib.import_module(f"agentmem.bench.{module}"), name)
    return found


def schema(benchmark: str) -> dict[str, Any]:
    """Return the schema of what is written: keys with a default are required too."""
    of_class = result_class(benchmark).model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | of_class


def write_schemas(directory: Path) -> None:
    for benchmark in RESULTS:
        path = directory / f"{benchmark}.json"
        path.write_text(json.dumps(schema(benchmark), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
