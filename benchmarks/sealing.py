"""What sealing a block, and handing its bytes to the writer, adds to a decode step.

Agents answer at length, beside each other, over HTTP; from the server's trace: the time of decode
steps in which some agent's block filled up (it is quantized there, all layers), of those in which
none did, and of the handing over after.

    python benchmarks/sealing.py --json benchmarks/results/sealing-demo.json
"""

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from machine import describe_machine, write_result

from support.server_process import ServerProcess


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Read Chrome's trace events: a line "[", then one event a line, with a comma behind it."""
    events = []
    for line in path.read_text().splitlines():
        if line.startswith("{"):
            events.append(json.loads(line.rstrip(",\n")))
    return events


def measure(model: Path, agents: int, answer_tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        with ServerProcess(Path(directory), "--trace", str(trace), model=model) as server:
            server.client.timeout = 600

            def talk(i: int) -> None:
                text = f"Story {i}. Tell me a long one." + " And on." * 40 * i
                messages = [{"role": "user", "content": text}]
                server.chat(messages, f"agent-{i}", max_tokens=answer_tokens, ignore_eos=True)

            with ThreadPoolExecutor(agents) as pool:
                list(pool.map(talk, range(agents)))
            server.stop()
        events = read_trace(trace)
    steps = [e for e in events if e["name"] == "decode" and len(e["args"]["agents"]) == agents]
    plain = [e["dur"] / 1e3 for e in steps if not e["args"]["sealed"]]
    sealing = [e["dur"] / 1e3 for e in steps if e["args"]["sealed"] == 1]
    handing = [e["dur"] / 1e3 for e in events if e["name"] == "seal"]
    step_ms = statistics.median(plain)
    sealing_step_ms = statistics.median(sealing)
    hand_over_ms = statistics.median(handing)
    seal_ms = sealing_step_ms - step_ms + hand_over_ms
    return {
        "agents": agents,
        "steps": len(plain),
        "seals": len(sealing),
        "step_ms": step_ms,
        "sealing_step_ms": sealing_step_ms,
        "hand_over_ms": hand_over_ms,
        "hand_over_max_ms": max(handing),
        "seal_ms": seal_ms,
        "seal_over_step": seal_ms / step_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("~/.agentmem/models/demo").expanduser())
    parser.add_argument("--answer-tokens", type=int, default=800)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    rows = []
    for agents in (1, 4):
        row = measure(args.model, agents, args.answer_tokens)
        rows.append(row)
        print({k: round(v, 2) for k, v in row.items()}, flush=True)
    result = {
        "benchmark": "sealing",
        "machine": describe_machine(),
        "model": args.model.name,
        "rows": rows,
    }
    write_result(result, args.json)
    if any(row["seal_over_step"] >= 1 for row in rows):
        sys.exit("FAILED: sealing costs more than a decode step")


if __name__ == "__main__":
    main()
