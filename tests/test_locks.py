"""agentmem.locks: files that one process at a time holds."""

import subprocess
import sys
import threading
import time

import pytest

from agentmem.locks import acquire, holder_note, release, write_note


def test_a_lock_is_held_once_and_its_note_is_told_while_it_is_held(tmp_path):
    path = tmp_path / "lock"
    assert holder_note(path) is None
    held = acquire(path)
    assert holder_note(path) == ""
    write_note(held, "12345 http://127.0.0.1:8000")
    write_note(held, "678")
    assert holder_note(path) == "678"
    with pytest.raises(BlockingIOError):
        acquire(path)
    assert holder_note(path) == "678"
    release(held)
    assert holder_note(path) is None
    release(acquire(path))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_child_that_inherits_a_lock_holds_it_on(tmp_path):
    path = tmp_path / "lock"
    held = acquire(path)
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        pass_fds=(held,),
    )
    write_note(held, str(child.pid))
    release(held)
    assert holder_note(path) == str(child.pid)
    with pytest.raises(BlockingIOError):
        acquire(path)
    child.communicate()
    release(acquire(path))


def test_patience_waits_for_a_lock_that_is_let_go(tmp_path):
    path = tmp_path / "lock"
    timer = threading.Timer(0.2, release, (acquire(path),))
    timer.start()
    began = time.monotonic()
    release(acquire(path, patience=30))
    assert 0.1 < time.monotonic() - began < 30
    timer.join()
