"""Staggered arrivals over HTTP: C decodes throughout, A prefills a long cold prompt, B's arrive warm meanwhile.

Measured: the time to first token of five B's, one after the other, beside their times alone; A's finish beside its
finish without them; and the gaps between C's tokens, of which the longest are one prefill chunk of A and a decode step.
The server is a process of its own on a store of its own.

    python benchmarks/staggered.py --tokens 3000 --json benchmarks/results/staggered-demo.json
"""

import argparse
import itertools
import json
import pydoc_data.topics
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from machine import describe_machine, write_result
from server_process import ServerProcess

TEXT = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def prompt(characters: int, start: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": TEXT[start : start + characters] + "\n\nSummarise this."}]


def stream(server: ServerProcess, agent: str, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
    """Arrival times of content chunks (s after the request) and the answer's `agentmem` object."""
    body = {"messages": messages, "agent_id": agent, "temperature": 0, "max_tokens": max_tokens, "stream": True}
    began, times, details = time.perf_counter(), [], {}
    with server.client.stream("POST", "/chat/completions", json=body | {"ignore_eos": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    times.append(time.perf_counter() - began)
                details = chunk.get("agentmem") or details
    return {"times": times, "finish_s": time.perf_counter() - began, **details}


def one_round(server: ServerProcess, cold: list[dict[str, str]], name: str, warm: list[Any]) -> dict[str, Any]:
    stop = threading.Event()

    def c_talks() -> list[float]:
        gaps: list[float] = []
        while not stop.is_set():
            times = stream(server, "c", [{"role": "user", "content": "Tell me a long story."}], 60)["times"]
            gaps += [b - a for a, b in itertools.pairwise(times)]
        return gaps

    with ThreadPoolExecutor() as pool:
        c = pool.submit(c_talks)
        time.sleep(1.0)
        a = pool.submit(stream, server, name, cold, 4)
        b = []
        for i, messages in enumerate(warm):
            time.sleep(2.0)
            b.append(stream(server, f"b{i}", messages, 4))
        finished = a.result()
        stop.set()
        return {"a": finished, "b": b, "gaps": c.result()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--tokens", type=int, default=3000, help="about, of A's prompt")
    parser.add_argument("--max-itl-ms", type=float, help="as `agentmem serve --max-itl-ms`")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    model = args.model or Path("~/.agentmem/models/demo").expanduser()
    flags = ["--max-itl-ms", str(args.max_itl_ms)] if args.max_itl_ms else []
    warm = [prompt(2000, 200_000 + 10_000 * i) for i in range(5)]
    with tempfile.TemporaryDirectory() as home:
        with ServerProcess(Path(home), *flags, model=model) as server:
            for i, messages in enumerate(warm):
                stream(server, f"b{i}", messages, 2)
            server.stop()
        with ServerProcess(Path(home), *flags, model=model) as server:
            alone = [stream(server, f"b{i}", messages, 4) for i, messages in enumerate(warm)]
            server.stop()
        with ServerProcess(Path(home), *flags, model=model) as server:
            stream(server, "c", [{"role": "user", "content": "Tell me a long story."}], 4)
            together = one_round(server, prompt(args.tokens * 4, 0), "a1", warm)
            without_b = one_round(server, prompt(args.tokens * 4, 40_000), "a2", [])
            server.stop()
    gaps = sorted(together["gaps"])
    result = {
        "benchmark": "staggered",
        "machine": describe_machine(),
        "model": str(args.model or "demo"),
        "tokens": args.tokens,
        "b_alone_ttft_ms": [b["ttft_ms"] for b in alone],
        "b_ttft_ms": [b["ttft_ms"] for b in together["b"]],
        "b_median_ms": [statistics.median(b["ttft_ms"] for b in bs) for bs in (alone, together["b"])],
        "b_cache": [b["cache"] for b in together["b"]],
        "b_prefill_ms": [b["prefill_ms"] for b in together["b"]],
        "b_queue_ms": [b["queue_ms"] for b in together["b"]],
        "b_restore_ms": [b["restore_ms"] for b in together["b"]],
        "a_finish_s": together["a"]["finish_s"],
        "a_finish_without_b_s": without_b["a"]["finish_s"],
        "a_delay": together["a"]["finish_s"] / without_b["a"]["finish_s"] - 1,
        "c_gap_ms": {
            "median": statistics.median(gaps) * 1e3,
            "p99": gaps[int(len(gaps) * 0.99)] * 1e3,
            "max": gaps[-1] * 1e3,
        },
    }
    print(json.dumps(result, indent=2))
    write_result(result, args.json)


if __name__ == "__main__":
    main()
