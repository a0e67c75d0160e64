"""The corpus of conversations (tests/chat): tokens of all prompts, of what must be prefilled, and of what would be.

    python benchmarks/splice.py [--by-conversation] [--json FILE]

Columns, summed over all requests: the prompts' tokens; ideal, those after the first place where the rendered text
differs from every earlier request and answer of the agent, and one each; naive, those after the first token that
differs when each prompt is tokenized as a whole; linear, the same where the last request's tokens alone are kept
(definitions: tests/chat/ideal.py).
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from chat.families import FAMILIES
from chat.ideal import Need, needs_of
from chat.play import supported

COLUMNS = ("ideal", "naive", "linear")


def row(needs: Iterable[Need]) -> dict[str, float]:
    needs = list(needs)
    total, *sums = (sum(getattr(need, key) for need in needs) for key in ("total", "ideal", "naive", "linear"))
    return {"requests": len(needs), "tokens": total, **dict(zip(COLUMNS, sums, strict=True))}


def show(name: str, figures: dict[str, float]) -> None:
    print(f"{name:32}" + "".join(f"{value:>10}" for value in figures.values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--by-conversation", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    print(f"{'':32}" + "".join(f"{key:>10}" for key in ("requests", "tokens", *COLUMNS)))
    for family in FAMILIES:
        found = {name: needs_of(family, name) for name in supported(family)}
        rows[family] = row(need for needs in found.values() for need in needs)
        show(family, rows[family])
        if options.by_conversation:
            for name, needs in found.items():
                rows[f"{family}/{name}"] = row(needs)
                show(f"  {name}", rows[f"{family}/{name}"])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
