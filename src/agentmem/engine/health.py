"""What /health tells: the state of the engine, and figures of its parts."""

import time
from typing import Any

import mlx.core as mx

from .. import __version__
from ..kvcache.spec import KVBits, describe
from ..store.agent_store import AgentStore
from .budget import RamBudget
from .footprint import process_footprint
from .model_runner import ModelRunner
from .scheduler import Scheduler


class Health:
    """One engine's state. Read on any thread."""

    def __init__(
        self,
        *,
        model_name: str,
        kv_bits: KVBits,
        runner: ModelRunner,
        scheduler: Scheduler,
        budget: RamBudget,
        store: AgentStore,
    ):
        self._model_name = model_name
        self._kv_bits = kv_bits
        self._runner = runner
        self._scheduler = scheduler
        self._budget = budget
        self._store = store
        self._started = time.monotonic()

    def told(
        self, *, failure: str | None, stopping: bool, memory_error: str | None
    ) -> dict[str, Any]:
        """Return {"status": "ok" | "degraded" | "failed" | "stopping", "errors": [...], figures}.

        `failure`: the bug that ended the engine's work; `memory_error`: why new requests are
        refused.
        """
        known = (failure, self._store.background_error, memory_error)
        errors = [error for error in known if error]
        if failure:
            status = "failed"
        elif stopping:
            status = "stopping"
        else:
            status = "degraded" if errors else "ok"
        return {
            "status": status,
            "errors": errors,
            "version": __version__,
            "uptime": round(time.monotonic() - self._started, 1),
            "model": self._model_name,
            "max_context": self._budget.max_context,
            "device": str(mx.default_device()),
            "kv_bits": self._kv_bits if self._runner.spec.bits else "16",
            "cache": describe(self._runner.spec),
            "attention": "codes" if self._runner.on_codes else "dequantized",
            "running": len(self._scheduler.active),
            "waiting": len(self._scheduler.waiting),
            "ram_bytes": self._budget.noted_used,
            "reserved_bytes": self._budget.noted_reserved,
            "kv_budget": self._budget.limit,
            "process_bytes": process_footprint(),
            "memory_limit": self._budget.memory_limit,
            "store": self._store.stats() | {"room_bytes": self._store.capacity},
        }
