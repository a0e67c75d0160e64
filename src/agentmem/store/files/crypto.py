"""Encryption at rest: AES-256-GCM, and who holds which key.

    master key (master_key.py)    one, in no file of the store
      wraps an agent's key        Vault.wrap; once it is deleted, what only that agent held can't
                                  be read any more
        wraps a file's key        seal(agent's key, file's key, ...), once for each agent that
                                  holds the file
          seals each part of it   12 bytes nonce, ciphertext, 16 bytes tag (sealed.py), and its
                                  token ids

Nonces are random: one key may seal 2^32 times (NIST SP 800-38D, 8.3). A file's key seals its parts,
once each.
"""

import hashlib
import os
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ...errors import CorruptSegment

KEY_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = 16
OVERHEAD = _NONCE_BYTES + _TAG_BYTES  # bytes that sealing adds


def new_key() -> bytes:
    """Return KEY_BYTES random bytes."""
    return os.urandom(KEY_BYTES)


def seal(key: bytes, data: bytes | bytearray | memoryview, context: bytes) -> bytearray:
    """Encrypt `data`, up to 2^31 - 1 bytes; return nonce, ciphertext and tag, OVERHEAD bytes more.

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
    """Return what was sealed.

    Raises CorruptSegment if a bit of it, the key or the context is another one.
    """
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
    """The master key's uses.

    Each has a key of its own, derived by keyed BLAKE2b, so that none tells about another.
    """

    master: bytes = field(repr=False)

    def __post_init__(self) -> None:
        assert len(self.master) == KEY_BYTES, f"a master key of {len(self.master)} bytes"

    @property
    def check(self) -> bytes:
        """Return 32 bytes to keep with the store, which only the same master key gives again.

        They are no help in finding it.
        """
        return self._subkey(b"check")

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """Return KEY_BYTES + OVERHEAD bytes, from which `unwrap` gives `key` back."""
        assert len(key) == KEY_BYTES, f"a key of {len(key)} bytes"
        return bytes(seal(self._subkey(b"wrap"), key, context))

    def unwrap(self, wrapped: bytes | bytearray | memoryview, context: bytes) -> bytes:
        """Return the key that was wrapped. Raises CorruptSegment, as `unseal` does."""
        return unseal(self._subkey(b"wrap"), wrapped, context)

    def derive(self, purpose: bytes) -> bytes:
        """Return KEY_BYTES that are the same for the same master key and purpose.

        The secret of content addresses is one.
        """
        return self._subkey(b"derive", purpose)

    def _subkey(self, use: bytes, purpose: bytes = b"") -> bytes:
        return hashlib.blake2b(purpose, key=self.master, person=use, digest_size=KEY_BYTES).digest()
