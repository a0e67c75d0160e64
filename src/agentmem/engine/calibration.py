"""Key centres and the way of attention: from disk, or measured at a model's first load."""

import hashlib
import logging
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..config import Settings
from ..errors import CorruptSegment
from ..kvcache import calibrate
from ..kvcache.block import from_host, to_host
from ..models.loading import LoadedModel
from ..store.files import segment
from .model_runner import ModelRunner

log = logging.getLogger(__name__)
# rises when the meaning of a stored code changes: rotation, centring, quantization
CACHE_FORMAT = "2"


def fingerprint_of(weights_hash: str, spec_identity: str) -> str:
    """Return what names a store: a hash of all that gives its bytes their meaning, in hex."""
    text = files(calibrate.__package__).joinpath("calibration.txt").read_bytes()
    digest = hashlib.blake2b(digest_size=16)
    for part in (CACHE_FORMAT.encode(), weights_hash.encode(), spec_identity.encode(), text):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def calibrate_runner(
    settings: Settings, model: LoadedModel, runner: ModelRunner, directory: Path
) -> str:
    """Give the runner its key centres and way of attention; return the centres' checksum.

    They come from `directory`, or from a calibration pass.

    Both decide the numbers that come out, so both are stored: a restart must not change them.
    """
    if runner.spec.bits is None:
        return "none"
    path = directory / "calibration.safetensors"
    found = _read_calibration(path)
    if found is None:
        log.info(
            "first start of this model with these settings: calibrating over %d tokens",
            calibrate.NUM_TOKENS,
        )
        tokens = calibrate.calibration_tokens(
            lambda text: model.tokenizer.encode(text, add_special_tokens=False)
        )
        centres = runner.calibrate(tokens)
        runner.use_centres(centres)
        attention = faster_attention(runner)
        found = centres, attention
        _write_calibration(path, centres, attention)
    centres, attention = found
    runner.use_centres(centres)
    runner.on_codes = (attention if settings.attention == "auto" else settings.attention) == "codes"
    return _checksum(centres)


def faster_attention(runner: ModelRunner) -> str:
    """Return the faster way of attention on this device: "codes" or "dequantized".

    A CPU reads the dequantized copy, faster by far (docs/architecture.md has the figures);
    elsewhere both are measured.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return "dequantized"
    runner.choose_attention()
    return "codes" if runner.on_codes else "dequantized"


def _checksum(centres: list[mx.array]) -> str:
    """Return a checksum of key centres, in hex."""
    return segment.checksum(b"".join(bytes(memoryview(cast(Any, c))) for c in centres)).hex()


def _read_calibration(path: Path) -> tuple[list[mx.array], str] | None:
    """Return centres and way of attention, or None where the file is missing or damaged.

    They are made again then, and come out the same on the same machine.
    """
    try:
        tensors, metadata = segment.decode(path.read_bytes())
    except (FileNotFoundError, CorruptSegment):
        return None
    by_layer = from_host(tensors)
    centres = [by_layer[str(i)] for i in range(len(by_layer)) if str(i) in by_layer]
    if len(centres) != len(by_layer) or metadata.get("checksum") != _checksum(centres):
        return None
    return centres, metadata.get("attention", "dequantized")


def _write_calibration(path: Path, centres: list[mx.array], attention: str) -> None:
    """Write centres and way of attention, durably."""
    segment.make_private_dir(path.parent)
    tensors = to_host({str(i): c for i, c in enumerate(centres)})
    data = segment.encode(tensors, {"checksum": _checksum(centres), "attention": attention})
    segment.write_durable(path, data)
