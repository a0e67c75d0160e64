"""The master key of an encrypted store: where it comes from, and how a new one is made."""

import base64
import binascii
import os
import re
import shlex
import stat
import sys
from pathlib import Path

from ...errors import StartupError
from .crypto import KEY_BYTES, new_key
from .segment import make_private_dir, remove_file, write_durable

KEY_VARIABLE = "AGENTMEM_MASTER_KEY"
KEYCHAIN_SERVICE, KEYCHAIN_USER = "agentmem", "master-key"
_KEYCHAIN_ITEM = f"the keychain's item {KEYCHAIN_SERVICE}/{KEYCHAIN_USER}"
_OTHER_SOURCES = f"give --key-file, or set {KEY_VARIABLE}"
_MAX_KEY_TEXT = 1024  # bytes read of a key file


def master_key(key_file: Path | None, *, may_create: bool) -> bytes:
    """Return the key of `key_file` if given, of AGENTMEM_MASTER_KEY, or of the macOS keychain.

    `may_create`: the store is a new one, so a key that is missing from the file or the keychain is
    made there. Else it is an error, since another key could not read what is stored. Raises
    StartupError where there is none.
    """
    if key_file is not None:
        return _from_file(key_file.expanduser(), may_create)
    if (text := os.environ.get(KEY_VARIABLE)) is not None:
        return _parse(os.fsencode(text), KEY_VARIABLE)
    if sys.platform == "darwin":
        return _from_keychain(may_create)
    raise StartupError(
        f"encryption needs a master key, and only macOS has a keychain for it: {_OTHER_SOURCES}"
    )


def _parse(text: bytes, source: str) -> bytes:
    text = text.strip()
    if re.fullmatch(rb"[0-9a-fA-F]{64}", text):
        return bytes.fromhex(text.decode())
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        # never the value: it may be a key with a slip in it
        raise StartupError(
            f"{source} doesn't hold a master key: 64 hex digits, or base64 of 32 bytes "
            "(openssl rand -hex 32 makes one)"
        )
    return key


def _from_file(path: Path, may_create: bool) -> bytes:
    try:
        if may_create:
            _create_file(path)
        text = _read_private(path)
    except OSError as e:
        if isinstance(e, FileNotFoundError) and not may_create:
            why = "is missing: put it back, or name the right one"
            raise StartupError(f"the store is encrypted, and its key file {path} {why}") from None
        raise StartupError(f"key file {path}: {e}") from None
    if not text:
        raise StartupError(
            f"key file {path} is empty: if no other agentmem is just creating it, delete it"
        )
    return _parse(text, f"key file {path}")


def _read_private(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            command = f"chmod 600 {shlex.quote(str(path))}"
            raise StartupError(
                f"key file {path} is open to other users (mode {mode:04o}): {command}"
            )
        return file.read(_MAX_KEY_TEXT)


def _create_file(path: Path) -> None:
    """Make a key file unless it is there.

    Of two processes one creates it; the file is empty until the key is durably in it.
    """
    make_private_dir(path.parent)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return
    try:
        write_durable(path, new_key().hex().encode() + b"\n")
    except OSError:
        remove_file(path)
        raise


def _from_keychain(may_create: bool) -> bytes:
    import keyring  # a dependency on macOS only, and slow to import
    from keyring.errors import KeyringError

    try:
        text = keyring.get_password(KEYCHAIN_SERVICE, KEYCHAIN_USER)
        if text is None and may_create:
            created = new_key().hex()
            keyring.set_password(KEYCHAIN_SERVICE, KEYCHAIN_USER, created)
            text = keyring.get_password(KEYCHAIN_SERVICE, KEYCHAIN_USER)
            if text != created:  # keyring's null backend forgets
                raise StartupError(f"the keychain didn't keep the master key: {_OTHER_SOURCES}")
    except KeyringError as e:
        raise StartupError(
            f"the keychain can't be used ({e}): unlock it, or {_OTHER_SOURCES}"
        ) from None
    if text is None:
        raise StartupError(
            f"the store is encrypted, and {_KEYCHAIN_ITEM} is missing: put it back, or "
            f"{_OTHER_SOURCES}"
        )
    return _parse(text.encode(), _KEYCHAIN_ITEM)
