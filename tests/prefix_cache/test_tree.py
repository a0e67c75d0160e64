"""An agent's tree: what it was asked before is found again, whatever came in between."""

import mlx.core as mx
import pytest

from agentmem.kvcache.block import Snapshot, Tail
from support.tiny import BLOCK, VOCAB, random_tokens, tiny_engine, tiny_loader, word_ids

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
        while not any(
            seq.cache is not None and seq.cache.length > 4 * BLOCK
            for seq in engine.core.scheduler.active
        ):
            assert not task.done()
        task.cancel()
        with pytest.raises(CancelledError):
            task.result(10)
        _, stats = engine.ask("a", long, 2)
        assert stats.cached_tokens >= 4 * BLOCK


def greedy(runner, cache, token: int, n: int) -> list[int]:
    out = []
    for _ in range(n):
        logits, fresh = runner.decode([cache], [token])
        token = int(mx.argmax(logits[0, :VOCAB]).item())
        runner.evaluate([logits], fresh)
        out.append(token)
    return out


@pytest.mark.parametrize("kind", ["llama", "gemma3", "deepseek_v2"])
@pytest.mark.parametrize("part_at", [3 * BLOCK + 11, 3 * BLOCK, 20])
def test_what_follows_a_cut_is_what_a_naive_cache_cut_at_the_same_token_says(
    tmp_path, kind, part_at
):
    first, after = random_tokens(5 * BLOCK + 9, seed=1), random_tokens(45, seed=2)
    with tiny_engine(tmp_path, tiny_loader(kind)) as engine:
        engine.ask("a", first, 2)
        text, stats = engine.ask(
            "a", first[:part_at] + after, 5, temperature=0.0
        )  # the next but one is nearly a tie
        assert stats.cached_tokens == part_at
        runner = engine.core.runner

        def naive() -> list[int]:
            cache, sealed = runner.new_cache(), []
            for token in first:
                sealed += runner.prefill(cache, [token])
            index, inside = divmod(part_at, BLOCK)
            tail = Tail.of_cut_block(sealed[index], inside, runner.spec) if inside else None
            cut = runner.new_cache(Snapshot(sealed[:index], tail))
            for token in after[:-1]:
                runner.prefill(cut, [token])
            return greedy(runner, cut, after[-1], 5)

        assert word_ids(text) == engine.on_engine(naive)


def test_a_prompt_that_goes_on_says_what_a_server_without_a_cache_says_of_the_same_ids(tmp_path):
    with tiny_engine(tmp_path / "a") as engine:
        tokens, said = PROMPT, []
        for turn in range(3):
            text, stats = engine.ask("a", tokens, 10, temperature=0.0)
            said.append((list(tokens), text))
            assert stats.cache == ("hot" if turn else "cold")
            tokens = tokens + word_ids(text) + random_tokens(20, seed=turn)
    for turn, (prompt, text) in enumerate(said):
        with tiny_engine(tmp_path / f"cold {turn}") as engine:
            assert engine.ask("a", prompt, 10, temperature=0.0)[0] == text
