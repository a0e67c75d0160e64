"""The master key of an encrypted store: its sources, and how a new one is made."""

import base64
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.backends import null
from keyring.errors import KeyringLocked

from agentmem.config import load_settings
from agentmem.errors import StartupError
from agentmem.store.files.crypto import KEY_BYTES, new_key
from agentmem.store.files.master_key import KEY_VARIABLE, master_key

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


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
    monkeypatch.setenv(KEY_VARIABLE, text)
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
    monkeypatch.setenv(KEY_VARIABLE, text)
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
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(StartupError, match="AGENTMEM_MASTER_KEY doesn't hold"):
        master_key(None, may_create=True)


def test_the_key_in_the_environment_is_no_unknown_setting(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY.hex())
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
    key = master_key(Path("~/master.key"), may_create=True)
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
from agentmem.store.files.master_key import master_key
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
    monkeypatch.setenv(KEY_VARIABLE, in_env.hex())
    path = key_file(tmp_path, in_file.hex())
    assert master_key(path, may_create=False) == in_file
    assert master_key(None, may_create=False) == in_env
    monkeypatch.delenv(KEY_VARIABLE)
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
