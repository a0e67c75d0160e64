"""A fast BLAS takes the place of the reference one.

Each case is a process of its own: MLX is linked only once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX brings its own BLAS")

LOAD = """
from pathlib import Path
from agentmem.linux_cpu.blas import *
from agentmem.linux_cpu import blas
home = Path({home!r})
"""


def run(home: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("AGENTMEM_", "MLX_"))
    } | environment
    command = [sys.executable, "-c", LOAD.format(home=str(home)) + code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def output(home: Path, code: str, **environment: str) -> str:
    done = run(home, code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_found_blas_is_several_times_faster_than_the_reference(tmp_path):
    code = "load_fast_blas(home); print(measure_gflops(size=512))"
    one_thread = {
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }  # whatever else keeps the machine busy
    fast = float(output(tmp_path, code, **one_thread))
    slow = float(output(tmp_path, code, AGENTMEM_BLAS="reference"))
    assert fast > 4 * slow, f"{fast:.1f} against {slow:.1f} GFLOP/s"


def test_threads_of_the_blas_sleep_after_a_product(tmp_path):
    code = """
load_fast_blas(home)
import time
import mlx.core as mx
a = mx.random.normal((512, 512))
spent = []
for _ in range(5):
    mx.eval(a @ a)
    began = time.process_time()
    time.sleep(0.05)
    spent.append(time.process_time() - began)
print(sorted(spent)[2])
"""
    threads = {"OPENBLAS_NUM_THREADS": "2"}
    assert float(output(tmp_path, code, **threads)) < 0.01
    if (os.cpu_count() or 1) > 1:
        spins = output(tmp_path, code, **threads, OPENBLAS_THREAD_TIMEOUT="28")
        assert float(spins) > 0.01  # what a user sets is kept


def test_products_through_the_shim_equal_numpys(tmp_path):
    code = """
assert blas._load_wheel(blas._wheel_library(), home / "cache")
import mlx.core as mx, numpy as np
random = np.random.default_rng(0)
for dtype in (np.float32, np.float64, np.complex64):
    a, b = (random.normal(size=shape).astype(dtype) for shape in ((70, 50), (90, 50)))
    if dtype == np.complex64:
        a, b = a + 1j * a[::-1], b - 2j * b[::-1]
    product = np.array(mx.matmul(mx.array(a), mx.array(b).T, stream=mx.cpu))
    assert np.allclose(product, a @ b.T, rtol=1e-3, atol=1e-3), dtype
"""
    output(tmp_path, code)


def test_the_shim_is_compiled_once_and_readable_by_its_owner_alone(tmp_path):
    code = "assert blas._load_wheel(blas._wheel_library(), home / 'cache')"
    output(tmp_path / "home", code)
    (shim,) = (tmp_path / "home" / "cache").iterdir()
    before = shim.stat()
    assert (shim.parent.stat().st_mode | shim.parent.parent.stat().st_mode) & 0o077 == 0
    output(tmp_path / "home", code, PATH="/nonexistent")  # the second start needs no compiler
    assert (shim.stat().st_mtime_ns, shim.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_cache_that_others_can_write_to_is_not_loaded_from(tmp_path):
    code = "assert blas._load_wheel(blas._wheel_library(), home / 'cache')"
    output(tmp_path, code)
    (shim,) = (tmp_path / "cache").iterdir()
    shim.write_bytes(b"planted")
    (tmp_path / "cache").chmod(0o777)
    output(tmp_path, code)  # would fail on the planted file
    assert shim.read_bytes() == b"planted"


def test_without_any_blas_a_warning_says_what_to_install(tmp_path):
    code = """
blas._SYSTEM_LIBRARIES = blas._MKL_LIBRARIES = ()
print(load_fast_blas(home))
"""
    text = output(tmp_path, code, PATH="/nonexistent")
    assert "reference" in text and "libopenblas0-pthread" in text and "C compiler" in text


def test_on_a_cpu_compiled_functions_run_without_a_compiler_and_write_no_libraries(tmp_path):
    code = """
load_fast_blas(home)
import mlx.core as mx
mx.set_default_device(mx.cpu)
print(mx.compile(lambda x: mx.exp(x) * 2 + 1)(mx.zeros(3)).tolist())
"""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    assert output(tmp_path, code, PATH="/nonexistent", TMPDIR=str(scratch)) == "[3.0, 3.0, 3.0]"
    assert list(scratch.iterdir()) == []


def test_a_blas_that_comes_too_late_is_reported(tmp_path):
    assert "imported before" in output(
        tmp_path, "import mlx.core; print(load_fast_blas(home).warning)"
    )


def test_the_first_answer_is_kept(tmp_path):
    output(tmp_path, "a = load_fast_blas(home); import mlx.core; assert load_fast_blas(home) is a")


def test_a_named_library_that_is_no_blas_is_refused_in_one_line(tmp_path):
    code = """
from agentmem.errors import StartupError
try:
    load_fast_blas(home)
except StartupError as e:
    print(e)
"""
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(b"no library")
    for path in (str(wrong), "/nonexistent.so", "libc.so.6"):
        text = output(tmp_path, code, AGENTMEM_BLAS=path)
        assert path in text and "\n" not in text
