"""Order and size of prefill, on sequences without a model."""

import time
from types import SimpleNamespace

import pytest

from agentmem.agent_key import AgentKey
from agentmem.engine.api import GenerateRequest, SamplingParams
from agentmem.engine.scheduler import Scheduler, Step
from agentmem.engine.sequence import Sequence, Status
from agentmem.errors import Busy


def scheduler(**options) -> Scheduler:
    made = Scheduler(**({"max_running": 4, "max_queue": 8, "prefill_chunk": 512} | options))
    made.pace.saw_prefill(512.0, 512)  # 1 ms a token
    made.pace.saw_decode(50.0)
    return made


def sequence(prompt_len: int, cached: int = 0, priority: int = 0, waited: float = 0.0) -> Sequence:
    request = GenerateRequest(
        AgentKey("ns", "a"), [0] * prompt_len, SamplingParams(max_tokens=8), priority
    )
    seq = Sequence(request, emit=lambda event: None, tokens=[0] * prompt_len)
    seq.submitted = time.perf_counter() - waited
    seq.cache = SimpleNamespace(length=cached)
    return seq


def activate(made: Scheduler, status: Status, *sequences: Sequence) -> None:
    for seq in sequences:
        seq.status = status
        made.active.append(seq)


def test_a_warm_agent_overtakes_a_cold_one():
    made = scheduler()
    cold, warm = sequence(4000), sequence(4000, cached=3900)
    activate(made, Status.PREFILL, cold, warm)
    assert made.schedule().prefill is warm


def test_a_long_prefill_is_not_starved_by_short_ones():
    made = scheduler()
    cold = sequence(4000, waited=4.0)
    activate(made, Status.PREFILL, cold, sequence(100))
    assert made.schedule().prefill is cold


def test_time_in_which_a_prefill_was_served_does_not_count_as_waiting():
    made = scheduler()
    cold = sequence(4000, waited=8.0)
    cold.served_ms = 7000.0
    warm = sequence(100)
    activate(made, Status.PREFILL, cold, warm)
    assert made.schedule().prefill is warm


def test_priority_comes_before_length():
    made = scheduler()
    urgent = sequence(4000, priority=-1)
    activate(made, Status.PREFILL, sequence(100), urgent)
    assert made.schedule().prefill is urgent


def test_beside_decode_a_prefill_waits_for_a_read_but_not_for_long():
    made = scheduler()
    cold, talking = sequence(4000), sequence(100, cached=99)
    activate(made, Status.PREFILL, cold)
    assert made.schedule(reading_ms=1.0).prefill is cold
    activate(made, Status.DECODE, talking)
    assert made.schedule(reading_ms=1.0) == Step((talking,), None, 0)
    assert made.schedule(reading_ms=300.0).prefill is cold
    assert made.schedule().prefill is cold


def test_the_queue_is_left_in_the_same_order():
    made = scheduler(max_running=2)
    long, short, urgent = sequence(900), sequence(50), sequence(900, priority=-5)
    for seq in (long, short, urgent):
        made.add(seq)
    assert made.upcoming() == [urgent, short, long]
    for expected in (urgent, short):
        assert made.next_waiting() is expected
        made.activate(expected)
    assert made.next_waiting() is None
    assert made.waiting == [long]


def test_the_newest_of_the_least_urgent_is_preempted_first():
    made = scheduler()
    old, new, urgent = (
        sequence(100, cached=50, waited=2.0),
        sequence(100, cached=50),
        sequence(9, cached=5, priority=-1),
    )
    activate(made, Status.DECODE, old, new, urgent)
    assert made.least_urgent() is new
    made.preempt(new)
    assert made.waiting == [new]
    assert made.least_urgent() is old


def test_alone_a_prefill_takes_whole_chunks_that_end_at_multiples():
    made = scheduler()
    activate(made, Status.PREFILL, sequence(2000, cached=300))
    step = made.schedule()
    assert (step.chunk, step.decode) == (212, ())


def test_the_last_prompt_token_is_left_to_decode():
    made = scheduler()
    activate(made, Status.PREFILL, sequence(100, cached=90))
    assert made.schedule().chunk == 9


@pytest.mark.parametrize(("bound", "chunk"), [(250.0, 200), (10.0, 16), (5000.0, 512), (None, 128)])
def test_beside_decoding_ones_a_chunk_fits_the_bound(bound, chunk):
    made = scheduler(max_itl_ms=bound)
    activate(made, Status.DECODE, sequence(10))
    activate(made, Status.PREFILL, sequence(2000))
    assert made.schedule().chunk == chunk


def test_the_chunk_follows_what_was_measured():
    made = scheduler(max_itl_ms=450.0)
    activate(made, Status.DECODE, sequence(10))
    activate(made, Status.PREFILL, sequence(2000))
    for _ in range(8):
        made.pace.saw_prefill(4 * 128.0, 128)  # a longer context: 4 ms a token
    assert 95 <= made.schedule().chunk <= 105


def test_beside_a_restore_a_chunk_is_short():
    made = scheduler()
    activate(made, Status.PREFILL, sequence(2000))
    activate(made, Status.RESTORING, sequence(2000))
    assert made.schedule().chunk == 32


def test_without_a_bound_the_gap_stays_that_of_the_first_128_tokens():
    made = scheduler()
    activate(made, Status.DECODE, sequence(10))
    activate(made, Status.PREFILL, sequence(2000))
    for _ in range(12):
        made.pace.saw_prefill(4 * 128.0, 128)
    assert made.schedule().chunk == 32


def test_every_decoding_sequence_is_in_every_step():
    made = scheduler()
    running = [sequence(10) for _ in range(3)]
    activate(made, Status.DECODE, *running)
    activate(made, Status.PREFILL, sequence(2000))
    assert list(made.schedule().decode) == running


def test_a_full_queue_refuses_the_next():
    made = scheduler(max_queue=1)
    made.add(sequence(10))
    with pytest.raises(Busy):
        made.add(sequence(10))
