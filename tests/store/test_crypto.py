import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem.errors import CorruptSegment
from agentmem.store.files.crypto import (
    KEY_BYTES,
    OVERHEAD,
    Vault,
    new_key,
    seal,
    unseal,
)

KEYS = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
DATA = st.binary(max_size=300)
CONTEXTS = st.binary(max_size=40)
KEY = bytes(range(32))


# sealed data


@given(KEYS, DATA, CONTEXTS, st.sampled_from([bytes, bytearray, memoryview]))
def test_what_was_sealed_comes_back_with_a_fixed_overhead(key, data, context, kind):
    sealed = seal(key, kind(data), context)
    assert len(sealed) == len(data) + OVERHEAD
    assert unseal(key, kind(sealed), context) == data


@given(KEYS, DATA, CONTEXTS, st.data())
def test_no_bit_of_sealed_data_can_change(key, data, context, draw):
    sealed = seal(key, data, context)
    bit = draw.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptSegment, match="does not decrypt"):
        unseal(key, sealed, context)


@given(KEYS, DATA, CONTEXTS, st.data())
def test_sealed_data_can_not_be_cut_or_extended(key, data, context, draw):
    sealed = seal(key, data, context)
    cut = draw.draw(st.integers(0, len(sealed) - 1))
    with pytest.raises(CorruptSegment, match="too short" if cut < OVERHEAD else "does not decrypt"):
        unseal(key, sealed[:cut], context)
    with pytest.raises(CorruptSegment):
        unseal(key, bytes(sealed) + draw.draw(st.binary(min_size=1, max_size=20)), context)


@given(KEYS, KEYS, DATA, CONTEXTS, CONTEXTS)
def test_sealed_data_opens_only_with_its_key_and_in_its_context(
    key, other_key, data, context, other_context
):
    sealed = seal(key, data, context)
    for k, c in ((other_key, context), (key, other_context), (other_key, other_context)):
        if (k, c) == (key, context):
            continue
        with pytest.raises(CorruptSegment, match="does not decrypt"):
            unseal(k, sealed, c)


def test_the_same_data_is_never_sealed_to_the_same_bytes():
    assert len({bytes(seal(KEY, b"data", b"context")) for _ in range(200)}) == 200


def test_sealed_data_is_aes_256_gcm():
    """Test case 16 of McGrew and Viega, "The Galois/Counter Mode of Operation": what is on disk
    keeps its meaning.
    """
    key = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
    nonce = bytes.fromhex("cafebabefacedbaddecaf888")
    context = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    data = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    ciphertext = bytes.fromhex(
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
    )
    tag = bytes.fromhex("76fc6ece0f4e1768cddf8853bb2d551b")
    assert unseal(key, nonce + ciphertext + tag, context) == data


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_a_key_of_another_length_is_a_bug(length):
    key = bytes(length)
    for use in (
        lambda: seal(key, b"", b""),
        lambda: unseal(key, bytes(40), b""),
        lambda: Vault(key),
    ):
        with pytest.raises(AssertionError):
            use()
    with pytest.raises(AssertionError):
        Vault(KEY).wrap(key, b"")


# the vault


@given(KEYS, KEYS, KEYS, CONTEXTS, CONTEXTS)
def test_a_wrapped_key_opens_only_with_its_master_key_and_in_its_context(
    master, other, key, context, other_context
):
    wrapped = Vault(master).wrap(key, context)
    assert Vault(master).unwrap(wrapped, context) == key
    for m, c in ((other, context), (master, other_context)):
        if (m, c) != (master, context):
            with pytest.raises(CorruptSegment):
                Vault(m).unwrap(wrapped, c)


@given(KEYS, KEYS)
def test_check_tells_the_same_master_key_from_another(master, other):
    assert Vault(master).check == Vault(master).check
    assert (Vault(master).check == Vault(other).check) == (master == other)


@given(KEYS, st.lists(st.binary(max_size=20), min_size=1, max_size=5, unique=True))
def test_every_use_of_a_master_key_has_a_key_of_its_own(master, purposes):
    """Also for purposes that bear the name of another use: whatever is stored or handed out opens
    nothing.
    """
    vault = Vault(master)
    purposes = list({*purposes, b"wrap", b"check", b"derive", b""})
    keys = {vault.check, master, *(vault.derive(purpose) for purpose in purposes)}
    assert len(keys) == 2 + len(purposes)
    wrapped = vault.wrap(KEY, b"agent:1")
    for key in keys:
        with pytest.raises(CorruptSegment):
            unseal(key, wrapped, b"agent:1")


def test_derived_values_keep_their_meaning():
    """They are on disk; RFC 7693's keyed BLAKE2b, 32 bytes, the use as its personalization."""
    vault = Vault(KEY)
    assert vault.check.hex() == "62ae624ef8426ea3a8c7528c1b7da24b3c20a6b2805cd6e6797201efcb18e2e4"
    assert (
        vault.derive(b"block names").hex()
        == "80ae0ee50c23811804f6b91c90da9996f616832f060fc322acce20b72ddf9498"
    )
    wrapped = (
        "0783063e38b10505fb771d76d365f61c3e635db76ddc118100bbcf757836"
        "24d7eb9e2756e85ccd14f37cbe779f2d6db5415a09bd2e91492025055a62"
    )
    assert vault.unwrap(bytes.fromhex(wrapped), b"agent:1") == KEY


def test_a_vault_does_not_show_its_key():
    assert repr(Vault(KEY)) == "Vault()"


def test_without_an_agents_key_only_what_it_shares_can_be_read():
    """The whole hierarchy, as bytes that a store might hold."""
    vault = Vault(new_key())
    agents = {name: vault.wrap(new_key(), b"agent:" + name) for name in (b"alice", b"bob")}
    files = {}
    for name, holders in ((b"shared", (b"alice", b"bob")), (b"alices", (b"alice",))):
        file_key = new_key()
        wraps = {
            who: seal(vault.unwrap(agents[who], b"agent:" + who), file_key, b"key:" + name)
            for who in holders
        }
        files[name] = seal(file_key, b"text of " + name, b"block:" + name), wraps

    def read(name: bytes) -> bytes:
        sealed, wraps = files[name]
        who = next(who for who in wraps if who in agents)
        file_key = unseal(vault.unwrap(agents[who], b"agent:" + who), wraps[who], b"key:" + name)
        return unseal(file_key, sealed, b"block:" + name)

    assert (read(b"shared"), read(b"alices")) == (b"text of shared", b"text of alices")
    del agents[b"alice"]
    assert read(b"shared") == b"text of shared"
    for key in (vault.master, vault.check, vault.unwrap(agents[b"bob"], b"agent:bob")):
        for sealed in (files[b"alices"][0], *files[b"alices"][1].values()):
            for context in (b"block:alices", b"key:alices"):
                with pytest.raises(CorruptSegment):
                    unseal(key, sealed, context)
