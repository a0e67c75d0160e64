"""Makes the small tokenizers of tests/chat/tokenizers, one file a family, trained on Python's own
help texts.

    PYTHONPATH=tests python -m support.chat.make_tokenizers

What is kept of the real ones: the pre-tokenizer's rules, the normalizer, byte level or byte
fallback, the added tokens and which of them are special, the dummy prefix. The files are committed,
because pydoc_data.topics differs between Pythons (these came from 3.11).
"""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

FOLDER = Path(__file__).parent / "tokenizers"
SIZE = 1100  # merges and characters; added tokens come on top
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)
QWEN_WORDS = _CL100K.replace("DIGITS", "")
LLAMA_WORDS = _CL100K.replace("DIGITS", "{1,3}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)

# fmt: off
# family: its special tokens, and the added tokens that are not special
ADDED: dict[str, tuple[list[str], list[str]]] = {
    "qwen3": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
         "<think>", "</think>"],
    ),
    "llama3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"],
        [],
    ),
    "gemma3": (
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        ["\n\n", "\n\n\n", "\n\n\n\n"],
    ),
    "deepseek": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"],
        ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁sep｜>"]
        + [f"<｜tool▁{noun}▁{side}｜>"
           for noun in ("calls", "call", "outputs", "output") for side in ("begin", "end")],
    ),
    "gpt-oss": (
        ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>",
         "<|start|>", "<|end|>", "<|message|>", "<|call|>"],
        [],
    ),
    "mistral": (
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
         "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
        [],
    ),
    "mistral-v1": (["<unk>", "<s>", "</s>"], []),
    "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"], []),
    "glm": (
        ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>",
         "<|user|>", "<|assistant|>", "<|observation|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
         "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    ),
}
# fmt: on


def words(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level_rules(family: str) -> pre_tokenizers.PreTokenizer:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if family == "smollm2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    if family == "deepseek":
        parts = [words(r"\p{N}{1,3}"), words("[一-龥\u3040-ゟ゠-ヿ]+"), words(DEEPSEEK_WORDS)]
        return pre_tokenizers.Sequence([*parts, to_bytes])
    pattern = {"qwen3": QWEN_WORDS, "gpt-oss": O200K_WORDS}.get(family, LLAMA_WORDS)
    return pre_tokenizers.Sequence([words(pattern), to_bytes])


def byte_level(family: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=family in ("llama3", "gpt-oss")))
    tokenizer.pre_tokenizer = byte_level_rules(family)
    tokenizer.decoder = decoders.ByteLevel()
    if family == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def sentencepiece(family: str) -> Tokenizer:
    """A BPE over characters with ▁ for a space; what it has no character for falls back to tokens
    of bytes.
    """
    trained = Tokenizer(models.BPE())
    # merges within words and never of digits; the rules for encoding come below
    digits = pre_tokenizers.Digits(individual_digits=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), digits]
    )
    train(trained, trainers.BpeTrainer(vocab_size=SIZE - 256, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    tokens = ADDED[family][0][:6] + [f"<0x{i:02X}>" for i in range(256)]
    tokens += sorted(learnt["vocab"], key=learnt["vocab"].get)
    merges = [tuple(pair) for pair in learnt["merges"]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    to_text: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = normalizers.Replace(" ", "▁")
    if family == "gemma3":
        tokenizer.normalizer = spaces
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif family == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        to_text.append(decoders.Strip(" ", 1, 0))
    else:  # a dummy space before each piece of text between special tokens
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        to_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def train(tokenizer: Tokenizer, trainer: trainers.BpeTrainer) -> None:
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)], trainer)


def make(family: str) -> Tokenizer:
    tokenizer = (
        sentencepiece(family)
        if family in ("gemma3", "mistral", "mistral-v1")
        else byte_level(family)
    )
    special, plain = ADDED[family]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    first = {
        "llama3": "<|begin_of_text|>",
        "gemma3": "<bos>",
        "deepseek": "<｜begin▁of▁sentence｜>",
    }.get(family)
    first = "<s>" if family.startswith("mistral") else first
    if first:  # what encode() adds by itself, and the template writes too
        number = tokenizer.token_to_id(first)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, number)]
        )
    return tokenizer


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in ADDED:
        made = make(name)
        (FOLDER / f"{name}.json").write_text(made.to_str() + "\n", encoding="utf-8")
        print(f"{name}: {made.get_vocab_size()} tokens")
