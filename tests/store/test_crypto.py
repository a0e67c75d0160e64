import base64
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import keyring
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyring.backend import KeyringBackend
from keyring.backends import null
from keyring.errors import KeyringLocked

from agentmem.config import load_settings
from agentmem.errors import CorruptSegment, StartupError
from agentmem.store.files import crypto
from agentmem.store.files.crypto import (
    KEY_BYTES,
    OVERHEAD,
    Vault,
    master_key,
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


# the master key's sources


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv(crypto.KEY_VARIABLE, raising=False)


@pytest.fixture
def linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")


def mode(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def key_file(tmp_path, text: str | bytes = KEY.hex(), permissions: int = 0o600):
    path = tmp_path / "my master.key"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(permissions)
    return path


GOOD = [KEY.hex(), KEY.hex().upper(), f"  {KEY.hex()}\r\n", base64.b64encode(KEY).decode() + "\n"]
BAD = [
    KEY.hex()[:-1],  # a digit short
    KEY.hex() + "0",
    KEY.hex()[:32] + " " + KEY.hex()[32:],
    "0x" + KEY.hex(),
    "\N{SUPERSCRIPT TWO}" * 64,  # a digit, but no hex digit
    base64.b64encode(KEY[:31]).decode(),
    base64.b64encode(KEY + b"!").decode(),
    base64.b64encode(KEY).decode().rstrip("="),
    base64.b64encode(KEY).decode().replace("E", "!E"),
    "correct horse battery staple",
    "   ",
]


@pytest.mark.parametrize("text", GOOD)
def test_a_key_is_hex_or_base64_in_file_and_environment(tmp_path, monkeypatch, text):
    assert master_key(key_file(tmp_path, text), may_create=False) == KEY
    monkeypatch.setenv(crypto.KEY_VARIABLE, text)
    assert master_key(None, may_create=False) == KEY


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("may_create", [False, True])
def test_a_wrong_key_is_refused_by_its_sources_name_and_never_shown(
    tmp_path, monkeypatch, text, may_create
):
    path = key_file(tmp_path, text)
    with pytest.raises(
        StartupError, match="doesn't hold a master key: 64 hex digits, or base64 of 32"
    ) as in_file:
        master_key(path, may_create=may_create)
    monkeypatch.setenv(crypto.KEY_VARIABLE, text)
    with pytest.raises(
        StartupError, match="doesn't hold a master key: 64 hex digits, or base64 of 32"
    ) as in_env:
        master_key(None, may_create=may_create)
    assert in_file.value.message.startswith(f"key file {path} ")
    assert in_env.value.message.startswith("AGENTMEM_MASTER_KEY ")
    for error in (in_file.value, in_env.value):
        assert error.__cause__ is None and (error.__suppress_context__ or error.__context__ is None)
        assert not text.strip() or text.strip() not in error.message
    assert path.read_bytes() == text.encode()


def test_a_key_file_of_arbitrary_bytes_is_refused(tmp_path):
    for text in (bytes(32), bytes(range(256)), b"\xff" * 64, KEY.hex().encode() * 100):
        with pytest.raises(StartupError, match="doesn't hold a master key"):
            master_key(key_file(tmp_path, text), may_create=False)


def test_an_empty_environment_variable_is_no_reason_to_look_elsewhere(monkeypatch):
    monkeypatch.setenv(crypto.KEY_VARIABLE, "")
    with pytest.raises(StartupError, match="AGENTMEM_MASTER_KEY doesn't hold"):
        master_key(None, may_create=True)


def test_the_key_in_the_environment_is_no_unknown_setting(monkeypatch):
    monkeypatch.setenv(crypto.KEY_VARIABLE, KEY.hex())
    assert KEY.hex() not in repr(load_settings({}))


@pytest.mark.parametrize("permissions", [0o640, 0o604, 0o644, 0o620, 0o602, 0o610, 0o777])
def test_a_key_file_open_to_others_is_refused_with_the_command_that_closes_it(
    tmp_path, permissions
):
    path = key_file(tmp_path, permissions=permissions)
    with pytest.raises(StartupError, match=rf"open to other users \(mode {permissions:04o}\)") as e:
        master_key(path, may_create=True)
    subprocess.run(e.value.message.partition("): ")[2], shell=True, check=True)
    assert mode(path) == 0o600
    assert master_key(path, may_create=False) == KEY


def test_a_read_only_key_file_and_a_link_to_one_will_do(tmp_path):
    (tmp_path / "link").symlink_to(key_file(tmp_path, permissions=0o400))
    assert master_key(tmp_path / "link", may_create=True) == KEY


def test_a_missing_key_file_is_made_private_and_stays(tmp_path):
    path = tmp_path / "new" / "dir" / "master.key"
    umask = os.umask(0)
    try:
        key = master_key(path, may_create=True)
    finally:
        os.umask(umask)
    assert len(key) == KEY_BYTES and key != bytes(KEY_BYTES)
    assert (mode(path), mode(path.parent), mode(path.parent.parent)) == (0o600, 0o700, 0o700)
    assert master_key(path, may_create=True) == master_key(path, may_create=False) == key
    assert list(path.parent.iterdir()) == [path]
    assert master_key(tmp_path / "other.key", may_create=True) != key


def test_a_home_relative_key_file_is_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    key = master_key(crypto.Path("~/master.key"), may_create=True)
    assert bytes.fromhex((tmp_path / "master.key").read_text()) == key


def test_the_missing_key_of_an_encrypted_store_is_not_replaced(tmp_path):
    path = tmp_path / "new" / "master.key"
    with pytest.raises(
        StartupError, match=f"the store is encrypted, and its key file {path} is missing"
    ):
        master_key(path, may_create=False)
    assert not path.parent.exists()


def test_processes_that_start_together_get_one_key_or_an_error(tmp_path):
    """Threads stand in for processes: what decides is the file system."""

    def start(path) -> bytes | None:
        try:
            return master_key(path, may_create=True)
        except StartupError as e:
            assert "is empty" in e.message
            return None

    with ThreadPoolExecutor(8) as pool:
        for i in range(20):
            path = tmp_path / f"{i}.key"
            keys = set(pool.map(start, [path] * 8))
            assert keys - {None} == {master_key(path, may_create=False)}


def test_an_empty_key_file_of_a_start_cut_short_is_reported_as_such(tmp_path):
    for may_create in (False, True):
        with pytest.raises(
            StartupError, match="is empty: if no other agentmem is just creating it, delete it"
        ):
            master_key(key_file(tmp_path, ""), may_create=may_create)


def test_a_key_that_can_not_be_written_leaves_no_file(tmp_path):
    script = """
import resource, sys
from pathlib import Path
from agentmem.errors import StartupError
from agentmem.store.files.crypto import master_key
assert "keyring" not in sys.modules
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
    master_key(Path(sys.argv[1]), may_create=True)
except StartupError as e:
    print(e)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "master.key")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"key file {tmp_path}/master.key: [Errno 27] File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_a_key_file_that_can_not_be_opened_is_an_error_of_one_line(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, may_create, problem in (
        (tmp_path, False, "Is a directory"),
        (tmp_path, True, "Is a directory"),
        (key_file(tmp_path) / "x", False, "Not a directory"),
        (key_file(tmp_path) / "x", True, "File exists: .*my master.key'"),
        (tmp_path / "dangling", False, "is missing"),
        (tmp_path / "dangling", True, "No such file"),
    ):
        with pytest.raises(StartupError, match=f"key file {path}.*{problem}") as e:
            master_key(path, may_create=may_create)
        assert "\n" not in e.value.message
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("may_create", [False, True])
def test_without_a_keychain_the_user_is_told_what_to_give(linux, may_create):
    with pytest.raises(
        StartupError, match=r"needs a master key.*give --key-file, or set AGENTMEM_MASTER_KEY"
    ):
        master_key(None, may_create=may_create)


# the keychain: keyring's own interface with a backend in memory, on every platform


class MemoryKeyring(KeyringBackend):
    priority = 1  # type: ignore[assignment]

    def __init__(self):
        super().__init__()
        self.items = {}

    def get_password(self, service, username):
        return self.items.get((service, username))

    def set_password(self, service, username, password):
        self.items[service, username] = password


class LockedKeyring(MemoryKeyring):
    def get_password(self, service, username):
        raise KeyringLocked("Can't get password from keychain: user interaction is not allowed")


@pytest.fixture
def keychain(monkeypatch):
    """A Mac's, as far as the code can tell."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(keyring.core, "_keyring_backend", None)  # put back afterwards
    keyring.set_keyring(MemoryKeyring())
    return keyring.get_keyring()


def test_the_keychain_makes_a_key_once_and_keeps_it(keychain):
    key = master_key(None, may_create=True)
    assert len(key) == KEY_BYTES
    assert keychain.items == {("agentmem", "master-key"): key.hex()}
    assert master_key(None, may_create=True) == master_key(None, may_create=False) == key


def test_the_missing_keychain_item_of_an_encrypted_store_is_not_replaced(keychain):
    with pytest.raises(
        StartupError,
        match="the store is encrypted, and the keychain's item agentmem/master-key is mi",
    ):
        master_key(None, may_create=False)
    assert keychain.items == {}


def test_key_file_comes_before_environment_before_keychain(tmp_path, monkeypatch, keychain):
    in_keychain = master_key(None, may_create=True)
    in_env, in_file = new_key(), new_key()
    monkeypatch.setenv(crypto.KEY_VARIABLE, in_env.hex())
    path = key_file(tmp_path, in_file.hex())
    assert master_key(path, may_create=False) == in_file
    assert master_key(None, may_create=False) == in_env
    monkeypatch.delenv(crypto.KEY_VARIABLE)
    assert master_key(None, may_create=False) == in_keychain


def test_a_keychain_that_forgets_or_is_locked_is_refused_with_a_way_out(keychain):
    keyring.set_keyring(null.Keyring())
    with pytest.raises(
        StartupError,
        match="didn't keep the master key: give --key-file, or set AGENTMEM_MASTER_KEY",
    ):
        master_key(None, may_create=True)
    keyring.set_keyring(LockedKeyring())
    with pytest.raises(
        StartupError,
        match=r"can't be used \(Can't get.*\): unlock it, or give --key-file, or set AGE",
    ):
        master_key(None, may_create=True)


def test_a_wrong_keychain_item_is_refused_and_never_shown(keychain):
    keychain.items["agentmem", "master-key"] = "correct horse"
    with pytest.raises(
        StartupError, match=r"^the keychain's item agentmem/master-key doesn't hold a master key"
    ) as e:
        master_key(None, may_create=True)
    assert "correct" not in e.value.message
