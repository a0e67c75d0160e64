"""Staggered arrivals over HTTP: C decodes throughout, A prefills a long cold prompt, B arrives warm meanwhile.

Measured: B's time to first token beside its time alone, A's finish beside its finish without B, and the gaps between
C's tokens. The server is a process of its own on a store of its own.

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


def one_round(server: ServerProcess, cold: list[dict[str, str]], name: str, with_b: bool, warm: Any) -> dict[str, Any]:
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
        time.sleep(2.0)
        b = stream(server, "b", warm, 4) if with_b else None
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
    warm = prompt(2000, 200_000)
    with tempfile.TemporaryDirectory() as home:
        with ServerProcess(Path(home), *flags, model=model) as server:
            stream(server, "b", warm, 2)
            server.stop()
        with ServerProcess(Path(home), *flags, model=model) as server:
            warm_alone = stream(server, "b", warm, 4)
            server.stop()
        with ServerProcess(Path(home), *flags, model=model) as server:
            stream(server, "c", [{"role": "user", "content": "Tell me a long story."}], 4)
            together = one_round(server, prompt(args.tokens * 4, 0), "a1", True, warm)
            without_b = one_round(server, prompt(args.tokens * 4, 40_000), "a2", False, warm)
            server.stop()
    gaps = sorted(together["gaps"])
    result = {
        "benchmark": "staggered",
        "machine": describe_machine(),
        "model": str(args.model or "demo"),
        "tokens": args.tokens,
        "b_alone_ttft_ms": warm_alone["ttft_ms"],
        "b_ttft_ms": together["b"]["ttft_ms"],
        "b_cache": together["b"]["cache"],
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
