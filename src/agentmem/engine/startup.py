"""build_core: makes the engine's parts of settings, and gives each what it uses."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from ..config import Settings, resolve
from ..errors import StartupError, StoreError
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
from .admission import Admission
from .agents.export import Archives
from .agents.fork import Forks
from .agents.imports import ArchivedModel
from .agents.lifecycle import Lifecycle
from .budget import RamBudget
from .calibration import calibrate_runner, fingerprint_of
from .footprint import physical_memory, room_for_caches
from .health import Health
from .metrics import Metrics
from .model_runner import ModelRunner
from .scheduler import Scheduler
from .stepper import Stepper
from .tasks import Post, Tasks
from .trace import Trace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Core:
    """The engine's parts, put together.

    Each was given what it uses; none is given all of them.
    """

    model: LoadedModel
    runner: ModelRunner
    prefix_cache: PrefixCache
    restorer: Restorer
    write_back: WriteBack
    store: AgentStore
    scheduler: Scheduler
    budget: RamBudget
    admission: Admission
    agents: Lifecycle
    forks: Forks
    archives: Archives
    metrics: Metrics
    stepper: Stepper
    health: Health
    trace: Trace
    vocab_size: int  # ids that the tokenizer knows; some models' logits are padded beyond


def build_core(
    settings: Settings, load: Callable[[], LoadedModel], post: Post, tasks: Tasks
) -> Core:
    """Load everything. Raises StartupError.

    It runs on the engine thread: MLX's streams belong to one.
    """
    model = load()
    runner = ModelRunner(
        model.model,
        kv_bits=settings.kv_bits,
        block_size=settings.block_size,
        state_interval=settings.state_interval,
    )
    log.info("cache: %s", describe(runner.spec))
    fingerprint = fingerprint_of(model.weights_hash, runner.spec.identity())
    try:
        segment.make_private_dir(settings.store_dir)
        calibration = calibrate_runner(settings, model, runner, settings.store_dir / fingerprint)
    except OSError as e:
        raise StoreError(
            f"can't use the store at {settings.store_dir}: {e}; use another --home"
        ) from None
    trace = Trace(settings.trace)
    store = open_store(settings, fingerprint, calibration)
    try:
        loaded = _Loaded(model, runner, store, trace, f"{fingerprint}/{calibration}")
        return _core(settings, loaded, post, tasks)
    except StartupError:
        store.close()
        raise


def open_store(settings: Settings, fingerprint: str, calibration: str) -> AgentStore:
    """Open the store of a model, within what other models' stores leave of the quota.

    Those give way to half of it.
    """
    root = settings.store_dir
    disk = shutil.disk_usage(settings.store_dir).total
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


@dataclass(frozen=True)
class _Loaded:
    """The parts that come from disk."""

    model: LoadedModel
    runner: ModelRunner
    store: AgentStore
    trace: Trace
    fingerprint: str  # of what gives a stored byte its meaning: weights, cache layout, calibration

    @property
    def vocab_size(self) -> int:
        """Return how many ids the tokenizer knows, as far as the model has logits for them."""
        highest: int = max(self.model.tokenizer.get_vocab().values())
        return min(self.runner.vocab_size, highest + 1)


def _core(settings: Settings, loaded: _Loaded, post: Post, tasks: Tasks) -> Core:
    """Put together what comes from disk and what works with it."""
    model = loaded.model
    runner = loaded.runner
    store = loaded.store
    trace = loaded.trace
    scheduler = Scheduler(
        max_running=settings.max_running,
        max_queue=settings.max_queue,
        max_queue_time=settings.max_queue_time,
        prefill_chunk=settings.prefill_chunk,
        max_itl_ms=settings.max_itl_ms,
    )
    prefix_cache = PrefixCache(
        fingerprint=loaded.fingerprint.encode() + store.address_secret,
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
        limit=resolve(settings.kv_budget, room_for_caches()),
        memory_limit=resolve(settings.memory_limit, physical_memory()),
        prefix_cache=prefix_cache,
        restorer=restorer,
        write_back=write_back,
        store=store,
        on_codes=runner.on_codes,
        max_context=min(settings.max_context or model.max_context, model.max_context),
        active=scheduler.active,
    )
    admission = Admission(
        tasks=tasks,
        runner=runner,
        scheduler=scheduler,
        budget=budget,
        prefix_cache=prefix_cache,
        restorer=restorer,
        write_back=write_back,
        trace=trace,
        tokenizer=model.tokenizer,
        vocab_size=loaded.vocab_size,
    )
    metrics = Metrics(
        scheduler=scheduler,
        budget=budget,
        pool=prefix_cache.pool,
        restorer=restorer,
        store=store,
    )
    stepper = Stepper(
        runner=runner,
        scheduler=scheduler,
        admission=admission,
        prefix_cache=prefix_cache,
        restorer=restorer,
        write_back=write_back,
        metrics=metrics,
        trace=trace,
        max_context=budget.max_context,
        vocab_size=loaded.vocab_size,
    )
    agents = Lifecycle(
        tasks=tasks,
        prefix_cache=prefix_cache,
        write_back=write_back,
        restorer=restorer,
        store=store,
        scheduler=scheduler,
        budget=budget,
        trace=trace,
    )
    forks = Forks(
        tasks=tasks,
        prefix_cache=prefix_cache,
        write_back=write_back,
        restorer=restorer,
        store=store,
        scheduler=scheduler,
        budget=budget,
    )
    archives = Archives(
        tasks=tasks,
        prefix_cache=prefix_cache,
        write_back=write_back,
        store=store,
        scheduler=scheduler,
        model=ArchivedModel(
            name=model.name,
            tokenizer=model.tokenizer,
            fingerprint=loaded.fingerprint,
            spec=runner.spec,
            vocab_size=runner.vocab_size,
        ),
    )
    health = Health(
        model_name=model.name,
        kv_bits=settings.kv_bits,
        runner=runner,
        scheduler=scheduler,
        budget=budget,
        store=store,
    )
    return Core(
        model=model,
        runner=runner,
        prefix_cache=prefix_cache,
        restorer=restorer,
        write_back=write_back,
        store=store,
        scheduler=scheduler,
        budget=budget,
        admission=admission,
        agents=agents,
        forks=forks,
        archives=archives,
        metrics=metrics,
        stepper=stepper,
        health=health,
        trace=trace,
        vocab_size=loaded.vocab_size,
    )
