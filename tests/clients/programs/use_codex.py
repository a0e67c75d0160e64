"""Codex, the program, as openai-codex carries it: two turns of one thread."""

import os
import tempfile
from pathlib import Path

from checks import QUESTION, URL, report
from openai_codex import ApprovalMode, Codex, CodexConfig, Sandbox

HOME = tempfile.mkdtemp()
CONFIG = f"""
model = "default"
model_provider = "agentmem"

[model_providers.agentmem]
name = "agentmem"
base_url = "{URL}/v1"
wire_api = "responses"
"""


def turns():
    Path(HOME, "config.toml").write_text(CONFIG)
    with Codex(CodexConfig(cwd=HOME, env=dict(os.environ, CODEX_HOME=HOME))) as codex:
        thread = codex.thread_start(approval_mode=ApprovalMode.deny_all, sandbox=Sandbox.read_only)
        results = [thread.run(QUESTION), thread.run(QUESTION)]
    _usage.append(results[1].usage)
    return [result.final_response for result in results]


def cached():
    return _usage[0].total.cached_input_tokens


_usage = []
report(turns=turns, cached=cached)
