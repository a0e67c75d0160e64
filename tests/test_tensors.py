"""Names of tensors, taken apart and put together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem.tensors import TensorName, is_state, part_of, stack_part, state_offset, state_part

NAMES = st.builds(
    TensorName,
    role=st.sampled_from("kvs"),
    stack=st.integers(0, 99).map(stack_part),
    field=st.sampled_from(["packed", "scales", "sinks", "full", "0", "12"]),
    offset=st.none() | st.integers(1, 4096),
    in_prefix=st.booleans(),
)


@given(NAMES)
def test_a_name_is_what_it_was_after_being_written_and_taken_apart(name):
    assert TensorName.parse(str(name)) == name


@pytest.mark.parametrize(
    ("text", "name", "part"),
    [
        ("k0.packed", TensorName("k", "0", "packed"), "0"),
        ("v10.sinks", TensorName("v", "10", "sinks"), "10"),
        ("s1.0@137", TensorName("s", "1", "0", 137), "@137"),
        ("prefix.v1.scales", TensorName("v", "1", "scales", in_prefix=True), "1"),
    ],
)
def test_names_on_disk_never_change(text, name, part):
    assert TensorName.parse(text) == name
    assert str(name) == text
    assert part_of(text) == part


def test_an_offset_that_is_no_number_is_refused():
    with pytest.raises(ValueError):
        TensorName.parse("s0.0@137@1")


def test_a_part_says_whether_it_is_state_and_of_which_token():
    assert is_state(state_part(137)) and state_offset(state_part(137)) == 137
    assert not is_state(stack_part(137))
