"""The corpus of conversations (tests/support/chat): tokens to prefill, and what others prefill.

    python benchmarks/splice.py [--by-conversation] [--json FILE]

Columns, summed over all requests: the prompts' tokens; ideal, those after the first place where the
rendered text differs from every earlier request and answer of the agent, and one each; naive, those
after the first token that differs when each prompt is tokenized as a whole; linear, the same where
the last request's tokens alone are kept (definitions: tests/support/chat/ideal.py);
prefilled, what this server prefills (tests/support/chat/served.py).
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.chat.families import FAMILIES
from support.chat.ideal import Need
from support.chat.served import table

COLUMNS = ("requests", "tokens", "prefilled", "ideal", "naive", "linear")


def row(steps: Iterable[tuple[Need, int]]) -> dict[str, float]:
    steps = list(steps)
    return {
        "requests": len(steps),
        "tokens": sum(need.total for need, _ in steps),
        "prefilled": sum(prefilled for _, prefilled in steps),
        "ideal": sum(need.ideal for need, _ in steps),
        "naive": sum(need.naive for need, _ in steps),
        "linear": sum(need.linear for need, _ in steps),
    }


def show(name: str, figures: dict[str, float]) -> None:
    print(f"{name:32}" + "".join(f"{value:>10}" for value in figures.values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--by-conversation", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    print(f"{'':32}" + "".join(f"{key:>10}" for key in COLUMNS))
    for family in FAMILIES:
        steps = table(family)
        rows[family] = row((need, count) for _, _, need, count in steps)
        show(family, rows[family])
        if options.by_conversation:
            for name in dict.fromkeys(conversation for conversation, *_ in steps):
                rows[f"{family}/{name}"] = row(
                    (need, count) for found, _, need, count in steps if found == name
                )
                show(f"  {name}", rows[f"{family}/{name}"])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
