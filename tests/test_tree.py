"""An agent's tree: what it was asked before is found again, at once, and whatever came in between."""

import pytest
from tiny import BLOCK, random_tokens, tiny_engine, tiny_loader, word_ids

PROMPT = random_tokens(60)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_two_hundred_requests_in_a_row_each_find_all_of_the_ones_before(tmp_path, kind):
    with tiny_engine(tmp_path, tiny_loader(kind)) as engine:
        tokens, before = PROMPT, 0
        for turn in range(200):
            text, stats = engine.ask("a", tokens, 2)
            assert stats.cached_tokens == before, f"turn {turn}"
            before = len(tokens) + 1  # of two answered tokens the last was never an input
            tokens = tokens + word_ids(text) + random_tokens(1, seed=turn)


def test_a_title_call_under_the_same_name_leaves_the_conversation_alone(tmp_path):
    with tiny_engine(tmp_path) as engine:
        text, _ = engine.ask("a", PROMPT, 8)
        _, stats = engine.ask("a", random_tokens(50, seed=9), 8)
        assert stats.cause == "parted"
        _, stats = engine.ask("a", PROMPT + word_ids(text) + random_tokens(5, seed=1), 8)
        assert (stats.cached_tokens, stats.cause) == (len(PROMPT) + 7, "extended")


def test_edits_and_branches_find_what_they_have_in_common_down_to_the_token(tmp_path):
    with tiny_engine(tmp_path) as engine:
        first, _ = engine.ask("a", PROMPT, 40)
        line = PROMPT + word_ids(first)
        edited = line[:77] + random_tokens(30, seed=3)
        _, stats = engine.ask("a", edited, 8)
        assert (stats.cached_tokens, stats.cause) == (77, "parted")
        _, stats = engine.ask("a", line + random_tokens(5, seed=4), 8)  # back to the first line
        assert (stats.cached_tokens, stats.cause) == (len(line) - 1, "extended")
        _, stats = engine.ask("a", PROMPT, 8)
        assert (stats.cached_tokens, stats.cause) == (len(PROMPT) - 1, "repeated")


def test_the_line_that_was_asked_most_outlives_newer_side_branches(tmp_path):
    with tiny_engine(tmp_path, max_branches=2) as engine:
        tokens = PROMPT
        for turn in range(3):
            text, _ = engine.ask("a", tokens, 8)
            tokens = tokens + word_ids(text) + random_tokens(BLOCK, seed=turn)
        for seed in range(10, 14):
            engine.ask("a", random_tokens(20, seed=seed), 2)
        _, stats = engine.ask("a", tokens, 2)
        assert stats.cause == "extended"
        assert stats.cached_tokens >= len(tokens) - BLOCK - 1


def test_a_prefill_that_is_given_up_keeps_the_blocks_it_has_sealed(tmp_path):
    from concurrent.futures import CancelledError

    with tiny_engine(tmp_path, prefill_chunk=BLOCK) as engine:
        import asyncio

        long = random_tokens(900, seed=5)
        task = asyncio.run_coroutine_threadsafe(engine.answer("a", long, 2), engine.loop)
        while not any(seq.cache is not None and seq.cache.length > 4 * BLOCK for seq in engine.core.scheduler.active):
            assert not task.done()
        task.cancel()
        with pytest.raises(CancelledError):
            task.result(10)
        _, stats = engine.ask("a", long, 2)
        assert stats.cached_tokens >= 4 * BLOCK
