"""An engine without a model, and a tokenizer of a few words, for tests of the HTTP layer."""

import asyncio
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agentmem.engine.api import Finished, RequestStats, TextDelta
from agentmem.errors import ShuttingDown
from agentmem.models.model_dir import ModelDir
from agentmem.prefix_cache.info import AgentInfo

CHATML = (
    "{% if messages[0].role == 'assistant' %}"
    "{{ raise_exception('the user speaks first') }}{% endif %}"
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)

# what models that were made in memory say of their files
NOWHERE = ModelDir(
    path=Path("/nowhere"),
    config={},
    weight_files=(),
    model_type="llama",
    parameters=1_500_000,
    dtype="F32",
    max_context=1024,
    bytes=6_000_000,
    modified=1.0,
)


def tiny_tokenizer(template: str | None = CHATML, size: int = 8) -> TokenizerWrapper:
    words = ["<unk>", "<s>", "</s>", "system", "user", "assistant", "hello", "world"]
    words += [f"w{i}" for i in range(len(words), size)]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf = PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", eos_token="</s>", chat_template=template
    )
    return TokenizerWrapper(hf)


class FakeEngine:
    """Answers `words`, `delay` seconds apart after `first_delay`; then raises `error`, where there
    is one.
    """

    model_name, max_context, why_max_context, vocab_size, status = "org/tiny", 64, "", 8, "ok"
    turn_table, room_bytes = None, 1 << 30
    model_dir, weights_hash, on_gpu = NOWHERE, "0" * 32, False
    words, delay, first_delay, error, failed = ("Hello", " wörld"), 0.0, 0.0, None, False

    def __init__(self, **options):
        self.tokenizer, self.requests, self.cancelled, self.log = tiny_tokenizer(), [], 0, []
        self.sampling = {}
        self.agent_ids = ["alice", "../x", "ü/🦊"]
        self.agents = self.archives = self  # what is done to agents, it answers itself
        vars(self).update(options)

    async def generate(self, request):
        self.requests.append(request)
        try:
            await asyncio.sleep(self.first_delay)
            for word in self.words:
                yield TextDelta(word)
                await asyncio.sleep(self.delay)
                if self.status == "stopping":
                    raise ShuttingDown("The server is shutting down.")
            if self.error:
                raise self.error
            yield Finished(
                "stop",
                RequestStats(len(request.tokens), 2, 3, "warm", 1024, 1.23456, 2.0, 3.5, 0.1),
            )
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled += 1
            raise

    def generate_each(self, requests):
        return [self.generate(request) for request in requests]

    def check_queue(self):
        pass

    def health(self):
        return {"status": self.status, "errors": []}

    def metrics(self):
        return b"agentmem_running_requests 0.0\n"

    def agent_times(self, key):
        return None

    def branch_tokens(self, key):
        return []

    def infos(self, namespace):
        return [self.info(name) for name in self.agent_ids]

    @staticmethod
    def info(name):
        return AgentInfo(name, "warm", 5, 1, 0, 100, 1.0, 2.0, False, None, False, 1, 3)

    def is_ephemeral(self, key):
        return False

    def announce(self, url):
        self.url = url

    async def delete(self, key):
        known = key.agent_id in self.agent_ids
        self.agent_ids = [name for name in self.agent_ids if name != key.agent_id]
        return known

    async def prefetch(self, key):
        return 100 if key.agent_id in self.agent_ids else None

    def begin_drain(self):
        self.status = "stopping"
        self.log.append("drain")

    async def stop(self):
        self.log.append("stop")
