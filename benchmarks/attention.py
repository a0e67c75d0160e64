"""A decode step with attention on codes and on their dequantized copy, by context length.

It says which of the two a device wants.

python benchmarks/attention.py --contexts 1024,4096 --json benchmarks/results/attention-demo.json
"""

import argparse
from pathlib import Path

from agentmem.linux_cpu.allocator import keep_freed_memory
from agentmem.linux_cpu.blas import load_fast_blas

HOME = Path("~/.agentmem").expanduser()
keep_freed_memory()
load_fast_blas(HOME)

from machine import describe_machine, write_result  # noqa: E402  (after the BLAS)

from agentmem.engine.model_runner import ModelRunner  # noqa: E402
from agentmem.models.loading import load_model  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--contexts", default="1024,4096", help="tokens, comma-separated")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    loaded = load_model(args.model, HOME)
    runner = ModelRunner(loaded.model)
    rows = []
    for context in map(int, args.contexts.split(",")):
        rows.append({"context": context, **runner.choose_attention(context)})
        figures = "  ".join(f"{name} {value:,.0f}" for name, value in rows[-1].items())
        print(f"{figures}  (ms a decode step, median of 4)")
    result = {
        "benchmark": "attention",
        "machine": describe_machine(),
        "model": loaded.name,
        "rows": rows,
    }
    write_result(result, args.json)


if __name__ == "__main__":
    main()
