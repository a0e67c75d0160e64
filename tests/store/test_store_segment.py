import json
import os
import stat
import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from agentmem.errors import CorruptSegment
from agentmem.store.files import segment, segment_file
from agentmem.store.files.crypto import new_key
from agentmem.store.files.sealed import encode_sealed, read_sealed
from agentmem.store.files.segment_file import read_file
from agentmem.tensors import HostTensor, part_of


def example() -> dict[str, HostTensor]:
    """Parts "@7", "0", "1" and "10", out of order; "0" ends at an odd byte."""
    codes = np.arange(2 * 3 * 4, dtype=np.uint32).reshape(2, 3, 4)
    return {
        "s0.0@7": HostTensor("F32", (), memoryview(np.float32(1.5).reshape(()))),
        "k10.packed": HostTensor("U32", (2,), b"8 bytes!"),
        "v0.state": HostTensor("U8", (3,), b"abc"),
        "k0.scales": HostTensor("F16", (2, 2), memoryview(np.ones((2, 2), np.float16))),
        "k0.packed": HostTensor("U32", (2, 3, 4), memoryview(codes)),
        "prefix.v1.scales": HostTensor("BF16", (2,), b"\0\x3f\0\x40"),
        "k1.none": HostTensor("I32", (0, 4), b""),
    }


PARTS = ["0", "1", "10", "@7"]  # in the order of the file


def same(got: dict[str, HostTensor], parts=PARTS) -> bool:
    """Those tensors of the example, as they were, and aligned."""
    expected = {name: tensor for name, tensor in example().items() if part_of(name) in parts}
    for name, tensor in got.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert bytes(tensor.data) == bytes(expected[name].data)
        if tensor.nbytes:
            at = np.frombuffer(tensor.data, np.uint8).__array_interface__["data"][0]
            assert at % segment.ITEM_BYTES[tensor.dtype] == 0
    return got.keys() == expected.keys()


class Plain:
    def __init__(self, path):
        self.path, self.data = path, segment.encode(example(), {"tokens": "12"})

    def read(self, parts=None):
        return read_file(self.path, len(self.data), self.digest, parts)

    @property
    def header(self) -> segment.Header:
        return segment.parse_header(self.data, len(self.data))

    @property
    def digest(self) -> bytes:
        return segment.checksum(self.data[: self.header.nbytes])

    def bytes_of(self, part: str) -> range:
        start, found = self.header.nbytes, self.header.parts[part]
        return range(start + found.start, start + found.stop)


class Sealed(Plain):
    def __init__(self, path, key: bytes | None = None, context: bytes = b"block:a"):
        self.path = path
        self.key = key or new_key()
        self.context = context
        self.data = encode_sealed(example(), {"tokens": "12"}, self.key, context)

    def read(self, parts=None):
        return read_sealed(self.path, len(self.data), self.digest, self.key, self.context, parts)


@pytest.fixture(params=[Plain, Sealed])
def stored(request, tmp_path):
    file = request.param(tmp_path / "x.safetensors")
    file.path.write_bytes(file.data)
    return file


def test_a_segment_comes_back_as_it_was_and_aligned():
    buf = segment.encode(example(), {"tokens": "12"})
    tensors, metadata = segment.decode(bytearray(buf))
    assert metadata == {"tokens": "12"}
    assert same(tensors)
    assert segment.encode(tensors, metadata) == buf
    assert segment.parse_header(buf, len(buf)).nbytes % 8 == 0
    assert segment.decode(segment.encode({}, {})) == ({}, {})


def test_the_safetensors_package_reads_a_segment(tmp_path):
    path = tmp_path / "x.safetensors"
    segment.write_durable(path, segment.encode(example(), {"a": "b"}))
    with safe_open(path, framework="np") as file:
        assert file.metadata().items() > {"a": "b", "format_version": "2"}.items()
        assert set(file.keys()) == set(example())
        assert np.array_equal(
            file.get_tensor("k0.packed"), np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
        )


def test_parts_lie_in_one_order_whatever_the_order_of_the_tensors(stored):
    assert [part for part in stored.header.parts if part != ":header"] == PARTS
    data = segment.encode(dict(reversed(example().items())), {})
    assert [*segment.parse_header(data, len(data)).parts] == PARTS


@pytest.mark.parametrize(
    "parts", [None, [], ["0"], ["10", "@7"], ["1", "@7", "0"], ["@7", "none"], PARTS]
)
def test_a_read_gives_the_parts_asked_for_that_there_are(stored, parts):
    tensors, metadata = stored.read(parts)
    assert same(tensors, PARTS if parts is None else parts)
    assert metadata == {"tokens": "12"}


@pytest.mark.parametrize("part", PARTS)
def test_damage_of_a_part_is_found_by_who_reads_it_and_nobody_else(stored, part):
    for at in stored.bytes_of(part):
        bad = bytearray(stored.data)
        bad[at] ^= 1 << at % 8
        stored.path.write_bytes(bad)
        assert same(
            stored.read([p for p in PARTS if p != part])[0], [p for p in PARTS if p != part]
        )
        for wanted in ([part], PARTS, None):
            with pytest.raises(CorruptSegment, match="checksum"):
                stored.read(wanted)


def test_a_partial_read_reads_the_header_and_its_parts_only(stored, monkeypatch):
    reads = []
    real = segment_file._read_at
    monkeypatch.setattr(segment_file, "_HEADER_GUESS", stored.header.nbytes)
    monkeypatch.setattr(
        segment_file, "_read_at", lambda file, *at: reads.append(at) or real(file, *at)
    )
    stored.read(["1", "10"])
    ranges = [
        stored.bytes_of(part) for part in (":header", "1", "10") if part in stored.header.parts
    ]
    wanted = {at for part in ranges for at in part} | set(range(stored.header.nbytes))
    assert [at for start, n in reads for at in range(start, start + n)] == sorted(wanted)
    assert len(reads) == (3 if isinstance(stored, Sealed) else 2)
    reads.clear()
    stored.read()
    assert len(reads) == 2


def test_a_header_of_any_length_is_read(tmp_path):
    tensors = {f"k{i}.packed": HostTensor("U32", (1,), b"%4d" % i) for i in range(400)}
    path, data = tmp_path / "x", segment.encode(tensors, {})
    path.write_bytes(data)
    nbytes = segment.header_bytes(data, len(data))
    assert nbytes > segment_file._HEADER_GUESS
    found, _ = read_file(path, len(data), segment.checksum(data[:nbytes]), ["17", "399"])
    assert {name: bytes(tensor.data) for name, tensor in found.items()} == {
        "k17.packed": b"  17",
        "k399.packed": b" 399",
    }


@pytest.mark.parametrize("parts", [None, [], ["10"]])
def test_a_header_flip_and_every_truncation_and_extension_are_found_by_any_read(stored, parts):
    for at in range(stored.header.nbytes):
        bad = bytearray(stored.data)
        bad[at] ^= 1 << at % 8
        stored.path.write_bytes(bad)
        with pytest.raises(CorruptSegment):
            stored.read(parts)
    for bad in [*(stored.data[:n] for n in range(len(stored.data))), stored.data + b"\0"]:
        stored.path.write_bytes(bad)
        with pytest.raises(CorruptSegment):
            stored.read(parts)
    stored.path.unlink()
    with pytest.raises(CorruptSegment):
        stored.read(parts)


def test_a_file_that_becomes_shorter_while_it_is_read_is_corrupt(stored, monkeypatch):
    real = segment_file._read_header

    def cut_after_header(file, *args):
        header = real(file, *args)
        os.truncate(stored.path, len(stored.data) - 1)
        return header

    monkeypatch.setattr(segment_file, "_read_header", cut_after_header)
    with pytest.raises(CorruptSegment, match="shorter"):
        stored.read(["@7"])


def test_a_length_that_the_file_cannot_hold_allocates_nothing(stored):
    stored.path.write_bytes(struct.pack("<Q", 1 << 62) + stored.data[8:])
    with pytest.raises(CorruptSegment, match="header of"):
        stored.read([])


def forged(file: Plain, other: Plain, part: str) -> Plain:
    """`file` with another one's part in place of its own, and checksums that fit, as an attacker
    would make it.
    """
    tensors = {name: t for name, t in segment.decode(file.data)[0].items() if part_of(name) != part}
    tensors |= {
        name: t for name, t in segment.decode(other.data)[0].items() if part_of(name) == part
    }
    file.data = segment.encode(tensors, segment.decode(file.data)[1])
    file.path.write_bytes(file.data)
    return file


@pytest.mark.parametrize("part", [":header", *PARTS])
@pytest.mark.parametrize("same_key", [True, False])
def test_no_sealed_part_stands_in_for_that_of_another_file_even_where_the_checksums_fit(
    tmp_path, part, same_key
):
    file = Sealed(tmp_path / "x")
    other = Sealed(tmp_path / "y", file.key if same_key else None, b"block:b")
    file.path.write_bytes(file.data)
    assert same(file.read()[0])
    with pytest.raises(CorruptSegment, match="decrypt"):
        forged(file, other, part).read([part])


def test_no_sealed_part_stands_in_for_another_one_of_its_file(tmp_path):
    file = Sealed(tmp_path / "x")
    tensors, _ = segment.decode(file.data)
    file.data = segment.encode(tensors | {"s0": tensors["s1"], "s1": tensors["s0"]}, {})
    file.path.write_bytes(file.data)
    assert same(file.read(["10", "@7"])[0], ["10", "@7"])
    for part in ("0", "1"):
        with pytest.raises(CorruptSegment, match="decrypt"):
            file.read([part])


def test_a_part_swapped_with_another_files_is_found(tmp_path):
    file, other = Plain(tmp_path / "x"), bytearray(segment.encode(example(), {"tokens": "21"}))
    at = file.bytes_of("0")
    other[at.start] ^= 1
    file.path.write_bytes(file.data[: at.start] + other[at.start : at.stop] + file.data[at.stop :])
    with pytest.raises(CorruptSegment, match="checksum"):
        file.read(["0"])
    assert same(file.read(["1"])[0], ["1"])


def test_the_token_ids_metadata_and_names_in_a_sealed_file_are_not_readable(tmp_path):
    data = Sealed(tmp_path / "x").data
    assert not any(trace in data for trace in (b"tokens", b"packed", b"8 bytes!", b"scales"))


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
def test_decode_never_fails_but_with_corrupt_segment(data):
    """Decoding may accept another name or dtype: the header's checksum is missing."""
    buf = bytearray(segment.encode(example(), {}))
    header = 8 + struct.unpack_from("<Q", buf)[0]
    for _ in range(data.draw(st.integers(1, 3))):
        buf[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors, _ = segment.decode(buf)
    except CorruptSegment:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) == len(buf) - header


SUM = xxhash.xxh3_128_hexdigest(b"body")


def header_text(parts, tensors) -> str:
    return json.dumps(
        {"__metadata__": {"format_version": "2", "parts": json.dumps(parts)}, **tensors}
    )


def entry(dtype="U8", shape=(4,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_header_as_those_below_that_has_no_fault_is_accepted():
    text = header_text({"0": [0, 4, SUM]}, {"k0.a": entry()})
    tensors, _ = segment.decode(struct.pack("<Q", len(text)) + text.encode() + b"body")
    assert bytes(tensors["k0.a"].data) == b"body"


MALFORMED = [  # parts and tensors, of 4 bytes
    ({"0": [0, 9, SUM]}, {"k0.a": entry(shape=[9], offsets=[0, 9])}),
    ({"0": [0, -4, SUM]}, {"k0.a": entry(shape=[-4], offsets=[0, -4])}),
    ({"0": [0, 4.5, SUM]}, {"k0.a": entry()}),
    ({"0": [1, 4, SUM]}, {"k0.a": entry()}),
    ({"0": [SUM]}, {"k0.a": entry()}),
    ({"0": [0, 4, "0" * 32]}, {"k0.a": entry()}),
    ({"0": [0, 4, SUM]}, {"k0.a": entry(offsets=[4, 8])}),
    ({"0": [0, 4, SUM]}, {"k0.a": entry(offsets=[0])}),
    ({"0": [0, 4, SUM]}, {"k0.a": entry(offsets=["0", "4"])}),
    ({"0": [0, 4, SUM]}, {"k0.a": entry(offsets=[0, 3], shape=[3])}),
    ({"0": [0, 4, SUM]}, {"k0.a": entry("U9")}),
    ({"0": [0, 4, SUM]}, {"k0.a": entry(shape=[True, 4])}),
    ({"0": [0, 4, SUM]}, {"k1.a": entry()}),
    ({"0": [0, 4, SUM]}, {"k0.a": 3}),
    ({"0": [0, 4, SUM]}, {}),
    ({}, {"k0.a": entry()}),
    ({"0": [0, 4, SUM], "1": [4, 4, ""]}, {"k0.a": entry()}),
    (
        {"0": [0, 2, SUM], "1": [2, 4, SUM]},
        {"k0.a": entry(shape=[2], offsets=[0, 2]), "k1.a": entry()},
    ),
]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 200_000,
        '{"__metadata__": []}',
        '{"__metadata__": {"format_version": "1", "parts": "{}"}}',
        '{"__metadata__": {"format_version": "2"}}',
        '{"__metadata__": {"format_version": "2", "parts": 3}}',
        '{"__metadata__": {"format_version": "2", "parts": "["}}',
        '{"__metadata__": {"format_version": "2", "parts": "[]"}}',
        '{"__metadata__": {"format_version": "2", "parts": "{}"}}',
        *(header_text(*case) for case in MALFORMED),
    ],
)
def test_a_malformed_header_is_corrupt(text):
    with pytest.raises(CorruptSegment):
        segment.decode(struct.pack("<Q", len(text)) + text.encode() + b"body")
    with pytest.raises(CorruptSegment):
        segment.decode(text.encode()[:7])
