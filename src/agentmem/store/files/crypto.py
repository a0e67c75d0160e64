"""Encryption at rest: AES-256-GCM, and who holds which key.

    master key                  one, from a key file, the environment or the macOS keychain; in no file of the store
      wraps an agent's key      Vault.wrap; once it is deleted, what only that agent held can't be read any more
        wraps a file's key      seal(agent's key, file's key, ...), once for each agent that holds the file
          seals each part of it 12 bytes nonce, ciphertext, 16 bytes tag (sealed.py), and its token ids

Nonces are random: one key may seal 2^32 times (NIST SP 800-38D, 8.3). A file's key seals its parts,
once each.
"""

import base64
import binascii
import hashlib
import os
import re
import shlex
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ...errors import CorruptSegment, StartupError
from .segment import make_private_dir, remove_file, write_durable

KEY_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = 16
OVERHEAD = _NONCE_BYTES + _TAG_BYTES  # bytes that sealing adds

KEY_VARIABLE = "AGENTMEM_MASTER_KEY"
KEYCHAIN_SERVICE, KEYCHAIN_USER = "agentmem", "master-key"
_KEYCHAIN_ITEM = f"the keychain's item {KEYCHAIN_SERVICE}/{KEYCHAIN_USER}"
_OTHER_SOURCES = f"give --key-file, or set {KEY_VARIABLE}"
_MAX_KEY_TEXT = 1024  # bytes read of a key file


def new_key() -> bytes:
    return os.urandom(KEY_BYTES)


def seal(key: bytes, data: bytes | bytearray | memoryview, context: bytes) -> bytearray:
    """Nonce, ciphertext and tag: OVERHEAD bytes more than `data`, of which there may be up to 2^31
    - 1.

    `context` says what this is ("block:" and its key, say). It isn't stored, but must be the same
    to unseal, so that nothing sealed can stand in for anything else.
    """
    nonce = os.urandom(_NONCE_BYTES)
    plain = memoryview(data).cast("B")
    sealed = bytearray(len(plain) + OVERHEAD)
    sealed[:_NONCE_BYTES] = nonce
    # in place: adding a nonce to a block's ciphertext would take longer than the encryption
    _cipher(key).encrypt_into(nonce, plain, context, memoryview(sealed)[_NONCE_BYTES:])
    return sealed


def unseal(key: bytes, sealed: bytes | bytearray | memoryview, context: bytes) -> bytes:
    """What was sealed. CorruptSegment if a bit of it, the key or the context is another one."""
    view = memoryview(sealed).cast("B")
    if len(view) < OVERHEAD:
        raise CorruptSegment(f"{len(view)} bytes, too short to be encrypted data")
    try:
        return _cipher(key).decrypt(view[:_NONCE_BYTES], view[_NONCE_BYTES:], context)
    except InvalidTag:
        raise CorruptSegment(
            "does not decrypt: its bytes changed, or it belongs to another key or place"
        ) from None


def _cipher(key: bytes) -> AESGCM:
    assert len(key) == KEY_BYTES, f"a key of {len(key)} bytes"  # AESGCM would take 16 for AES-128
    return AESGCM(key)


@dataclass(frozen=True)
class Vault:
    """The master key's uses. Each has a key of its own, derived by keyed BLAKE2b, so that none
    tells about another.
    """

    master: bytes = field(repr=False)

    def __post_init__(self) -> None:
        assert len(self.master) == KEY_BYTES, f"a master key of {len(self.master)} bytes"

    @property
    def check(self) -> bytes:
        """32 bytes to keep with the store: equal if the master key is, and no help in finding it."""
        return self._subkey(b"check")

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """KEY_BYTES + OVERHEAD bytes, which only this master key and `context` turn back into
        `key`.
        """
        assert len(key) == KEY_BYTES, f"a key of {len(key)} bytes"
        return bytes(seal(self._subkey(b"wrap"), key, context))

    def unwrap(self, wrapped: bytes | bytearray | memoryview, context: bytes) -> bytes:
        """The key that was wrapped; else CorruptSegment, as `unseal`."""
        return unseal(self._subkey(b"wrap"), wrapped, context)

    def derive(self, purpose: bytes) -> bytes:
        """KEY_BYTES that are the same for the same master key and purpose, such as the secret of
        content addresses.
        """
        return self._subkey(b"derive", purpose)

    def _subkey(self, use: bytes, purpose: bytes = b"") -> bytes:
        return hashlib.blake2b(purpose, key=self.master, person=use, digest_size=KEY_BYTES).digest()


def master_key(key_file: Path | None, *, may_create: bool) -> bytes:
    """From `key_file` if given, else AGENTMEM_MASTER_KEY, else the macOS keychain; StartupError if
    there is none.

    `may_create`: the store is a new one, so a key that is missing from the file or the keychain is
    made there. Else it is an error, since another key could not read what is stored.
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
            f"{source} doesn't hold a master key: 64 hex digits, or base64 of 32 bytes (openssl rand -hex 32 makes one)"
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
    """Unless it is there. Of two processes one creates it; the file is empty until the key is
    durably in it.
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
            f"the store is encrypted, and {_KEYCHAIN_ITEM} is missing: put it back, or {_OTHER_SOURCES}"
        )
    return _parse(text.encode(), _KEYCHAIN_ITEM)
