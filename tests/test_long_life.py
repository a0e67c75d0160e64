"""What a cache is worth after a long life, and attention sinks over a quantized cache."""

import random
from dataclasses import replace

import mlx.core as mx
import pytest
from tiny import BLOCK, random_tokens, run, tiny_model, tiny_runner

from agentmem.engine.model_runner import ModelRunner
from agentmem.kvcache.attention import relative_error
from agentmem.kvcache.block import SealedBlock, Snapshot, Tail, from_host, to_host

ROUNDS = 20
