#!/usr/bin/env python3
"""Show the longest chain of imports inside each package, and any cycle; 1 if there is too much.

A chain is counted in modules, and imports for type checking count like all others. Floors are the
layers of import-linter's contract in pyproject.toml.

Usage: import_chains.py [--report]    with --report it shows all the same, and ends with 0
"""

import sys
import tomllib
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = "agentmem"
MOST_MODULES = 7
MOST_FLOORS = 8
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


Imports = dict[str, set[str]]  # of each module, the modules that it imports


def break_cycles(imports: Imports) -> list[list[str]]:
    """Return cycles, importer first, and take one import of each away, so that none is left."""
    cycles: list[list[str]] = []
    while True:
        try:
            TopologicalSorter(imports).prepare()
            return cycles
        except CycleError as e:
            cycle = e.args[1][::-1]
            cycles.append(cycle)
            imports[cycle[0]].remove(cycle[1])


def longest_chains(imports: Imports) -> dict[str, list[str]]:
    """Return the longest chain of each package, importer first, of imports without a cycle.

    A package is what stands directly in agentmem; a module there is a package of one.
    """
    longest: dict[str, list[str]] = defaultdict(list)
    chains: dict[str, list[str]] = {}
    for module in TopologicalSorter(imports).static_order():  # what is imported comes first
        package = package_of(module)
        below = [chains[other] for other in imports[module] if package_of(other) == package]
        chains[module] = [module, *max(sorted(below), key=len, default=[])]
        longest[package] = max(longest[package], chains[module], key=len)
    return longest


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def floors() -> int:
    contracts = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    return max(len(contract["layers"]) for contract in contracts if contract["type"] == "layers")


def arrows(chain: list[str]) -> str:
    return " -> ".join(module.removeprefix(f"{ROOT}.") for module in chain)


def main() -> int:
    graph = grimp.build_graph(ROOT, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    cycles = break_cycles(imports)
    chains = [chain for chain in longest_chains(imports).values() if len(chain) > 1]
    for chain in sorted(chains, key=len, reverse=True):
        print(f"{len(chain):2}  {arrows(chain)}")
    for cycle in cycles:
        print(f"a cycle: {arrows(cycle)}")
    most = max(map(len, chains), default=1)
    print(f"{most} modules in the longest chain (at most {MOST_MODULES}), ", end="")
    print(f"{len(cycles)} cycles (none), {floors()} floors (at most {MOST_FLOORS})")
    return 1 if cycles or most > MOST_MODULES or floors() > MOST_FLOORS else 0


if __name__ == "__main__":
    status = main()
    sys.exit(0 if "--report" in sys.argv[1:] else status)
