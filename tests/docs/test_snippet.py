"""The README's Python snippet runs as it stands there, but for the port."""

import re
import subprocess
import sys

import figures
import pytest

from support.server_process import ServerProcess

pytestmark = pytest.mark.demo


def test_the_snippet_of_the_readme_answers(tmp_path, demo_model_dir):
    readme = (figures.ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    with ServerProcess(tmp_path, model=demo_model_dir) as server:
        assert "http://127.0.0.1:8000/v1" in snippet
        code = snippet.replace("http://127.0.0.1:8000/v1", server.url)
        answers = []
        for _ in range(2):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            answers.append(done.stdout.splitlines())
        assert server.stop() == 0
    assert all("Paris" in said for said, _ in answers)
    assert "'cache': 'cold'" in answers[0][1]
    assert "'cache': 'hot'" in answers[1][1]
