"""Tiny tokenizers of the kinds that models have. Each has its kind's control tokens, decoder and chat template."""

# ruff: noqa: S106 - names of tokens are not passwords

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT_ONLY = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REQUIRES_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system message is required') }}{% endif %}" + CHATML
)

TEXTS = ["go to the kitchen", " go left", "an open door", "ünïcode 東京 🙂", "a\ufffd", "1.5 , 'll be , n't"]


def chatml(*, eos: str = "<|im_end|>", template: str | None = CHATML) -> Any:
    """Qwen3's kind: byte-level BPE, and tags of thoughts and tools that are not marked as special."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.model = models.BPE(vocab={char: place for place, char in enumerate(_byte_level_alphabet())}, merges=[])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>", "  "]
    core.add_tokens([AddedToken(name, normalized=False, special=False) for name in tags])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, chat_template=template)


def sentencepiece(template: str | None = LLAMA_2, *, scheme: str = "prepend", adds_bos: bool = True) -> Any:
    """Llama 2's kind: BPE over characters with byte fallback, a space before text, and a decoder that strips it.

    scheme: `prepend` puts the space before each text, `first` only at the start of a prompt.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)] + ["go", "to", "▁go", "▁to", "\ufffd"]
    merges = [("g", "o"), ("t", "o"), ("▁", "go"), ("▁", "to")]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    if template == PHI_3:
        names = [f"<|{name}|>" for name in ("system", "user", "assistant", "end")]
        core.add_special_tokens([AddedToken(name, normalized=False, rstrip=True) for name in names])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", special_tokens=[("<s>", 1)])
    eos = "<|end|>" if template == PHI_3 else "</s>"
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        chat_template=template,
        clean_up_tokenization_spaces=True,
    )


def unigram() -> Any:
    """A Unigram model, whose vocabulary contains the control tokens: without care, it finds them in any text."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<|im_start|>", 0.0), ("<|im_end|>", 0.0)]
    pieces += [("▁", -2.0), *((chr(code), -4.0 - code / 100) for code in range(33, 127)), ("▁go", -3.0)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    core.add_special_tokens([name for name, _ in pieces[:5]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHATML
    )


def whole_words() -> Any:
    """BPE that takes a whole word from its vocabulary, as Llama 3 does. Its control tokens are whole words."""
    core = chatml().backend_tokenizer
    special = {"<|im_start|>": 256, "<|im_end|>": 257, "<think>": 258}
    vocab = {char: place for place, char in enumerate(_byte_level_alphabet())} | special
    core.model = models.BPE(vocab=vocab, merges=[], ignore_merges=True)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML)


KINDS: dict[str, Callable[[], Any]] = {
    "Qwen3": chatml,
    "base model with ChatML": lambda: chatml(eos="<|endoftext|>"),
    "base model": lambda: sentencepiece(None),
    "Llama 2": sentencepiece,
    "Llama 2, space at the start only": lambda: sentencepiece(scheme="first"),
    "TinyLlama": lambda: sentencepiece(ZEPHYR),
    "Phi-3": lambda: sentencepiece(PHI_3),
    "text only": lambda: chatml(template=TEXT_ONLY),
    "content parts": lambda: chatml(template=PARTS),
    "requires a system message": lambda: chatml(template=REQUIRES_SYSTEM),
    "Unigram": unigram,
    "whole words": whole_words,
}


def _byte_level_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())
