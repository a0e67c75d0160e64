"""Figures of the paper (arXiv 2603.04428): agents that fit, times, rates of two agents.

Its rule for agents that fit is every layer at full length, 16 bits a value, or 0.28125 of that. Its
"10.2 GB" is no single number: Gemma's row comes out with 10.2 GiB (24 agents of 432 MiB do not fit
into 10,200 MiB), the other two rows with 10,200 MiB (70, not 72, agents of 144 MiB): so all 24
figures. Likewise its "3.4 GB" for 32K tokens of Gemma are 3.375 GiB, 3.62 GB.
"""

from dataclasses import dataclass

_GIB = 1 << 30
_MIB = 1 << 20
CONTEXTS = (4096, 8192, 16384, 32768)  # tokens


@dataclass(frozen=True)
class PaperRow:
    """One row of the table; `fp16` and `q4` are agents that fit, for each of CONTEXTS."""

    model: str  # name of a built-in config
    budget: int  # bytes, as the paper must have read its "10.2 GB"
    fp16: tuple[int, ...]
    q4: tuple[int, ...]


PAPER_TABLE = (
    PaperRow("gemma-3-12b", budget=int(10.2 * _GIB), fp16=(6, 3, 1, 0), q4=(24, 12, 6, 3)),
    PaperRow("deepseek-coder-v2-lite", budget=10_200 * _MIB, fp16=(9, 4, 2, 1), q4=(33, 16, 8, 4)),
    PaperRow("llama-3.1-8b", budget=10_200 * _MIB, fp16=(19, 9, 4, 2), q4=(70, 35, 17, 8)),
)


# ms to the first token on an M4 Pro with 24 GB, batch 1, streaming; 1K to 32K tokens
_TTFT: dict[str, dict[str, tuple[int, ...]]] = {
    "gemma-3-12b": {
        "cold": (3964, 7119, 15736, 35009, 74219, 172096),
        "warm": (475, 495, 577, 626, 795, 1819),
        "hot": (683, 709, 719, 807, 934, 1264),
    },
    "deepseek-coder-v2-lite": {
        "cold": (1043, 1737, 3970, 8296, 19396, 47315),
        "warm": (234, 246, 271, 338, 434, 633),
        "hot": (345, 368, 366, 386, 490, 624),
    },
    "llama-3.1-8b": {
        "cold": (2500, 4530, 10235, 21536, 47629),
        "warm": (260, 274, 290, 331, 431),
        "hot": (412, 420, 429, 458, 526),
    },
}


# tokens/s over two agents at once, warm: 1K, 4K and 16K tokens each
_BATCH_2 = {
    "gemma-3-12b": {1024: 22.6, 4096: 19.6, 16384: 11.9},
    "deepseek-coder-v2-lite": {1024: 63.0, 4096: 52.6, 16384: 27.9},
    "llama-3.1-8b": {1024: 37.8, 4096: 34.5, 16384: 26.1},
}


def ttft_of(model: str) -> dict[int, dict[str, int]] | None:
    """Return the paper's times by context and state, where `model` names one of its three."""
    states = _TTFT.get(_known(model))
    if states is None:
        return None
    times = {}
    for i in range(len(states["cold"])):
        times[1024 << i] = {state: ms[i] for state, ms in states.items()}
    return times


def batch_2_of(model: str) -> dict[int, float] | None:
    """Return the same of its tokens/s, by context."""
    return _BATCH_2.get(_known(model))


def _known(model: str) -> str:
    name = model.lower().replace("meta-llama-3", "llama-3")
    return next((known for known in _TTFT if known in name), "")
