"""From settings to a running engine's parts: model, runner, calibration, store, contexts."""

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..config import Settings, resolve
from ..errors import CorruptSegment, StartupError, StoreError
from ..kvcache import calibrate
from ..kvcache.block import from_host, to_host
from ..kvcache.spec import describe
from ..models.loading import LoadedModel
from ..prefix_cache.cache import PrefixCache
from ..prefix_cache.load import forget, load_index
from ..prefix_cache.restore import Restorer
from ..prefix_cache.write_back import WriteBack
from ..store.agent_store import AgentStore
from ..store.files import segment
from ..store.files.crypto import Vault
from ..store.files.master_key import master_key
from ..store.upkeep.fsck import collect_garbage
from ..store.upkeep.quota import Limits
from .budget import RamBudget
from .footprint import physical_memory, room_for_caches
from .model_runner import ModelRunner
from .scheduler import Scheduler
from .trace import Trace

log = logging.getLogger(__name__)
# rises when the meaning of a stored code changes: rotation, centring, quantization
CACHE_FORMAT = "2"


@dataclass(frozen=True)
class Core:
    """What the engine thread works with."""

    model: LoadedModel
    runner: ModelRunner
    prefix_cache: PrefixCache
    restorer: Restorer
    write_back: WriteBack
    store: AgentStore
    scheduler: Scheduler
    budget: RamBudget
    trace: Trace
    post: Callable[[Callable[[], None]], None]  # runs a function on the engine thread
    fingerprint: str  # of what gives a stored byte its meaning: weights, cache layout, calibration
    vocab_size: int  # ids that the tokenizer knows; some models' logits are padded beyond


def build_core(
    settings: Settings, load: Callable[[], LoadedModel], post: Callable[[Callable[[], None]], None]
) -> Core:
    """Load everything. Raises StartupError. On the engine thread: MLX's streams belong to one."""
    model = load()
    runner = ModelRunner(
        model.model,
        kv_bits=settings.kv_bits,
        block_size=settings.block_size,
        state_interval=settings.state_interval,
    )
    log.info("cache: %s", describe(runner.spec))
    fingerprint = _fingerprint(model.weights_hash, runner.spec.identity())
    try:
        segment.make_private_dir(settings.store_dir)
        calibration = _calibrate(settings, model, runner, settings.store_dir / fingerprint)
    except OSError as e:
        raise StoreError(
            f"can't use the store at {settings.store_dir}: {e}; use another --home"
        ) from None
    trace = Trace(settings.trace)
    store = open_store(settings, fingerprint, calibration)
    try:
        return _core(settings, model, runner, store, trace, f"{fingerprint}/{calibration}", post)
    except StartupError:
        store.close()
        raise


def open_store(settings: Settings, fingerprint: str, calibration: str) -> AgentStore:
    """With the quota that other models' stores leave; those give way to half of it."""
    root, disk = settings.store_dir, shutil.disk_usage(settings.store_dir).total
    quota = resolve(settings.store_quota, disk)
    others = collect_garbage(root, quota // 2, keep=fingerprint)
    return AgentStore.open(
        root,
        fingerprint,
        {"calibration": calibration},
        limits=Limits(max(quota - others, 0), resolve(settings.store_min_free, disk)),
        unlock=(lambda may_create: Vault(master_key(settings.key_file, may_create=may_create)))
        if settings.encrypt
        else None,
    )


def _core(
    settings: Settings,
    model: LoadedModel,
    runner: ModelRunner,
    store: AgentStore,
    trace: Trace,
    fingerprint: str,
    post: Callable[[Callable[[], None]], None],
) -> Core:
    scheduler = Scheduler(
        max_running=settings.max_running,
        max_queue=settings.max_queue,
        prefill_chunk=settings.prefill_chunk,
        max_itl_ms=settings.max_itl_ms,
    )
    prefix_cache = PrefixCache(
        fingerprint=fingerprint.encode() + store.address_secret,
        spec=runner.spec,
        sharing=settings.sharing,
        max_branches=settings.max_branches,
        running=scheduler.holders,
    )
    restorer = Restorer(prefix_cache, store, post)
    write_back = WriteBack(
        prefix_cache,
        store,
        tail_delay=settings.tail_delay,
        write_amplification=settings.write_amplification,
        post=post,
    )
    store.on_trim = lambda gone: post(lambda: forget(prefix_cache, gone))
    load_index(prefix_cache, store)
    budget = RamBudget(
        resolve(settings.kv_budget, room_for_caches()),
        resolve(settings.memory_limit, physical_memory()),
        prefix_cache,
        restorer,
        write_back,
        store,
        on_codes=runner.on_codes,
        max_context=min(settings.max_context or model.max_context, model.max_context),
        active=lambda: scheduler.active,
    )
    vocab_size = min(runner.vocab_size, max(model.tokenizer.get_vocab().values()) + 1)
    return Core(
        *(model, runner, prefix_cache, restorer, write_back, store, scheduler, budget),
        *(trace, post, fingerprint, vocab_size),
    )


def _fingerprint(weights_hash: str, spec_identity: str) -> str:
    text = files(calibrate.__package__).joinpath("calibration.txt").read_bytes()
    digest = hashlib.blake2b(digest_size=16)
    for part in (CACHE_FORMAT.encode(), weights_hash.encode(), spec_identity.encode(), text):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _calibrate(settings: Settings, model: LoadedModel, runner: ModelRunner, directory: Path) -> str:
    """Give the runner its key centres and way of attention, from disk or by a calibration pass;
    returns their checksum.

    Both decide the numbers that come out, so both are stored: a restart must not change them.
    """
    if runner.spec.bits is None:
        return "none"
    path = directory / "calibration.safetensors"
    found = _read_calibration(path)
    if found is None:
        log.info(
            "first start of this model with these settings: calibrating over %d tokens",
            calibrate.NUM_TOKENS,
        )
        tokens = calibrate.calibration_tokens(
            lambda text: model.tokenizer.encode(text, add_special_tokens=False)
        )
        centres = runner.calibrate(tokens)
        runner.use_centres(centres)
        attention = faster_attention(runner)
        found = centres, attention
        _write_calibration(path, centres, attention)
    centres, attention = found
    runner.use_centres(centres)
    runner.on_codes = (attention if settings.attention == "auto" else settings.attention) == "codes"
    return _checksum(centres)


def faster_attention(runner: ModelRunner) -> str:
    """On a CPU the dequantized copy, by far (docs/architecture.md has the figures); elsewhere
    measured here.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return "dequantized"
    runner.choose_attention()
    return "codes" if runner.on_codes else "dequantized"


def _checksum(centres: list[mx.array]) -> str:
    return segment.checksum(b"".join(bytes(memoryview(cast(Any, c))) for c in centres)).hex()


def _read_calibration(path: Path) -> tuple[list[mx.array], str] | None:
    """None where there is none, or a damaged one: it is made again, and gives the same numbers on
    the same machine.
    """
    try:
        tensors, metadata = segment.decode(path.read_bytes())
    except (FileNotFoundError, CorruptSegment):
        return None
    by_layer = from_host(tensors)
    centres = [by_layer[str(i)] for i in range(len(by_layer)) if str(i) in by_layer]
    if len(centres) != len(by_layer) or metadata.get("checksum") != _checksum(centres):
        return None
    return centres, metadata.get("attention", "dequantized")


def _write_calibration(path: Path, centres: list[mx.array], attention: str) -> None:
    segment.make_private_dir(path.parent)
    tensors = to_host({str(i): c for i, c in enumerate(centres)})
    data = segment.encode(tensors, {"checksum": _checksum(centres), "attention": attention})
    segment.write_durable(path, data)
