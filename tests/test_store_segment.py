import os
import stat
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from agentmem.errors import CorruptSegment
from agentmem.store import segment
from agentmem.tensors import HostTensor


def example() -> dict[str, HostTensor]:
    codes = np.arange(2 * 3 * 4, dtype=np.uint32).reshape(2, 3, 4)
    return {
        "state": HostTensor("U8", (3,), b"abc"),
        "scales": HostTensor("F16", (2, 2), memoryview(np.ones((2, 2), np.float16))),
        "codes": HostTensor("U32", (2, 3, 4), memoryview(codes)),
        "bf": HostTensor("BF16", (2,), b"\0\x3f\0\x40"),
        "f": HostTensor("F32", (), memoryview(np.float32(1.5).reshape(()))),
        "none": HostTensor("I32", (0, 4), b""),
    }


def test_a_segment_comes_back_as_it_was_and_aligned():
    buf = segment.encode(example(), {"tokens": "12"})
    tensors, metadata = segment.decode(bytearray(buf))
    assert metadata == {"tokens": "12", "format_version": "1"}
    for name, tensor in example().items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(tensors[name].data) == bytes(tensor.data)
    start = 8 + struct.unpack_from("<Q", buf)[0]
    at = np.frombuffer(buf, np.uint8).__array_interface__["data"][0]
    for tensor in segment.decode(buf)[0].values():
        if tensor.nbytes:
            offset = np.frombuffer(tensor.data, np.uint8).__array_interface__["data"][0] - at
            assert (offset - start) % segment.ITEM_BYTES[tensor.dtype] == 0
    assert start % 8 == 0


def test_the_safetensors_package_reads_a_segment(tmp_path):
    path = tmp_path / "x.safetensors"
    segment.write_durable(path, segment.encode(example(), {"a": "b"}))
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"a": "b", "format_version": "1"}
        assert set(file.keys()) == set(example())
        assert np.array_equal(file.get_tensor("codes"), np.arange(24, dtype=np.uint32).reshape(2, 3, 4))


def test_a_file_is_private_whatever_the_umask_and_leaves_no_temporary(tmp_path):
    for umask in (0, 0o777):
        path = tmp_path / f"{umask}.safetensors"
        before = os.umask(umask)
        try:
            segment.write_durable(path, b"x")
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors"}


@given(st.data())
def test_any_bit_flip_or_truncation_is_found(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flip.safetensors"
    buf = segment.encode(example(), {})
    digest = segment.checksum(buf)
    bit = data.draw(st.integers(0, len(buf) * 8 - 1))
    bad = bytearray(buf)
    bad[bit // 8] ^= 1 << bit % 8
    bad = bad[: data.draw(st.sampled_from([len(buf), bit // 8]))]
    path.write_bytes(bad)
    with pytest.raises(CorruptSegment):
        segment.read_verified(path, len(buf), digest)
    path.write_bytes(buf)
    assert segment.read_verified(path, len(buf), digest) == buf
    path.unlink()
    with pytest.raises(CorruptSegment):
        segment.read_verified(path, len(buf), digest)


@given(st.data())
def test_decode_never_fails_but_with_corrupt_segment(data):
    """Without the checksum in front of it, decode may accept a flipped payload bit, and must refuse the rest."""
    buf = bytearray(segment.encode(example(), {}))
    header = 8 + struct.unpack_from("<Q", buf)[0]
    for _ in range(data.draw(st.integers(1, 3))):
        buf[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors, _ = segment.decode(buf)
    except CorruptSegment:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) == len(buf) - header


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 200_000,
        '{"__metadata__": []}',
        '{"__metadata__": {"format_version": "2"}}',
        '{"__metadata__": {"format_version": "1"}, "a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}',
        '{"__metadata__": {"format_version": "1"}, "a": {"dtype": "U8", "shape": [-4], "data_offsets": [0, -4]}}',
        '{"__metadata__": {"format_version": "1"}, "a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}',
        '{"__metadata__": {"format_version": "1"}, "a": {"dtype": "U9", "shape": [4], "data_offsets": [0, 4]}}',
        '{"__metadata__": {"format_version": "1"}, "a": 3}',
        '{"__metadata__": {"format_version": "1"}}',
    ],
)
def test_a_malformed_header_is_corrupt(text):
    with pytest.raises(CorruptSegment):
        segment.decode(struct.pack("<Q", len(text)) + text.encode() + b"body")
    with pytest.raises(CorruptSegment):
        segment.decode(text.encode()[:7])
