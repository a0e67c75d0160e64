"""The identity of a model's weights, for the cache's fingerprint."""

import json
import os
import tempfile
from pathlib import Path

import xxhash

from .model_dir import ModelDir

_CHUNK = 8 << 20  # bytes a read


def weights_hash(model: ModelDir, cache: Path) -> str:
    """Return xxh3-128, in hex, over config.json and the whole content of every weight file.

    The tokenizer does not count.

    The hash of a file is remembered in `cache`/weights.json under its path, size, modification time
    and inode, so that only a first start reads all weights.
    """
    remembered = _read(cache / "weights.json")
    known = dict(remembered)
    total = xxhash.xxh3_128()
    for path in (model.path / "config.json", *model.weight_files):
        key = _key(path)
        if key not in known:
            known[key] = _hash_file(path)
        total.update(f"{path.name} {known[key]}\n".encode())
    if known != remembered:
        _write(cache / "weights.json", known)
    return total.hexdigest()


def _key(path: Path) -> str:
    real = path.resolve()  # hub caches hold links to content-addressed files
    stat = real.stat()
    return json.dumps([str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino])


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, str]:
    """Return what is remembered: nothing if the file is not there or can't be read.

    Then all is hashed again.
    """
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, str]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump(known, file, indent=1)
    os.replace(temporary, path)
