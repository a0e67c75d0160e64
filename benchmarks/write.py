"""What a conversation writes to disk, against what of it is there in the end.

One agent talks to a server over HTTP, turn by turn, and rests after each long enough for its tail to be written, if it
ever is before the server stops. Written: every byte of block and tail files; and, on Linux, all that the process gave
to the disk, the manifest and its log included. Kept: the bytes of the files that are left.

    python benchmarks/write.py --json benchmarks/results/write-demo.json
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from machine import describe_machine, write_result
from server_process import ServerProcess

from agentmem.store.maintenance import store_stats, stores

TAIL_DELAY = 0.2  # s of rest, instead of 3, so that this takes minutes; the rest is in proportion
_WORDS = "Tell me of the sea, of ships and of the people who live by it, and why the tide comes twice a day. "


def converse(server: ServerProcess, turns: int, tokens: int, rest: float) -> list[dict[str, int]]:
    """Each turn's tokens, and bytes that it wrote by the end of its rest."""
    messages: list[dict[str, str]] = []
    rows, written, held = [], 0, 0
    for turn in range(turns):
        words = (f"Turn {turn}. " + _WORDS * 20).split()
        messages.append({"role": "user", "content": " ".join(words[: max(8, (tokens // turns - 24) * 7 // 9)])})
        answer = server.chat(messages, "alice", max_tokens=16, ignore_eos=True)
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        time.sleep(rest)
        now = server.client.get(server.url.removesuffix("/v1") + "/health").json()["store"]["bytes_written"]
        total = answer["usage"]["total_tokens"]
        rows.append({"tokens": total - held, "bytes": now - written})
        print(f"turn {turn + 1}: {total} tokens, {now - written:,} bytes", file=sys.stderr)
        written, held = now, total
    return rows


def process_writes(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return None
    return int(text.split("write_bytes: ")[1].split()[0])


def measure(model: Path | None, turns: int, tokens: int, rest: float, *flags: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        with ServerProcess(home, "--tail-delay", str(TAIL_DELAY), *flags, model=model) as server:
            before = process_writes(server.process.pid)
            rows = converse(server, turns, tokens, rest)
            after = process_writes(server.process.pid)
            assert server.stop() == 0
        (layout,) = stores(home / "store")
        stats = store_stats(layout)
    kept, written = stats.block_bytes + stats.tail_bytes, sum(stats.bytes_written_by_hour.values())
    half = len(rows) // 2
    return {
        "turns": rows,
        "tokens": sum(row["tokens"] for row in rows),
        "written_bytes": written,
        "kept_bytes": kept,
        "amplification": written / kept,
        "process_bytes_before_stop": after - before if after is not None and before is not None else None,
        "bytes_per_token_first_half": sum(r["bytes"] for r in rows[:half]) / sum(r["tokens"] for r in rows[:half]),
        "bytes_per_token_second_half": sum(r["bytes"] for r in rows[half:]) / sum(r["tokens"] for r in rows[half:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("~/.agentmem/models/demo").expanduser())
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=4000, help="about, at the end")
    parser.add_argument("--rest", type=float, default=0.6, help="seconds after each turn")
    parser.add_argument("--write-amplification", default="1.25", help="the server's setting")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    flags = ("--write-amplification", args.write_amplification)
    found = measure(args.model, args.turns, args.tokens, args.rest, *flags)
    result = {"benchmark": "write", "machine": describe_machine(), "model": args.model.name}
    result |= {"write_amplification": float(args.write_amplification), **found}
    write_result(result, args.json)
    print(f"{found['tokens']} tokens, {found['written_bytes']:,} bytes written for {found['kept_bytes']:,} kept")
    print(f"amplification {found['amplification']:.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
