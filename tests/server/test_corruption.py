"""A few cases of benchmarks/corruption.py, which has 500."""

import pytest
from control import Control
from corruption import KINDS, Cases

from support.tiny import BLOCK, VOCAB, random_tokens, tiny_loader


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return Cases(tmp_path_factory.mktemp("corruption"), seed=3)


def test_a_flipped_bit_or_a_lost_end_of_any_file_costs_no_agent_its_answer_nor_a_right_token(cases):
    result = cases.run(8 * len(KINDS))
    assert result.failures == []
    assert result.tally.answers > 50
    assert result.rows["block"].quarantined == result.rows["tail"].quarantined == 8


def test_the_control_knows_a_wrong_token():
    control = Control(tiny_loader()(), BLOCK)
    prompt = random_tokens(100)
    gaps = {token: control.gaps(prompt, [token])[0] for token in range(8, VOCAB)}
    likeliest, *_, unlikeliest = sorted(gaps, key=gaps.__getitem__)
    assert control.check(prompt, [likeliest]) is None
    assert control.check(prompt, [unlikeliest]) is not None
    assert control.check(prompt[:-40] + random_tokens(40, seed=1), [likeliest]) is not None
    assert control.tally.wrong == 2
