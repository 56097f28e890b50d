"""The policy's tokenizer, a byte-level BPE trained on the texts of the worlds, and its chat template."""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training.worlds import World

BEGIN, END, SYSTEM, USER, ASSISTANT, PAD = SPECIAL_TOKENS = (
    "<|begin|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|pad|>",
)

MAX_POSITIONS = 8192
VOCAB_SIZE = 1024

# The text is split into these pieces before BPE. A whole grid position is one piece and becomes one token, which halves
# the number of tokens of a step. A word includes the comma and the space before it. Other numbers are split into pieces
# of up to three digits.
PIECES = r"row \p{N}+, column \p{N}+|,? ?\p{L}+|,? ?\p{N}{1,3}|\n| ?[^\s\p{L}\p{N}]+|\s+"

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def texts(worlds: list[World]) -> Iterator[str]:
    """The training text of the tokenizer: every text that occurs in the worlds, and number pairs."""
    for world in worlds:
        yield world.instructions
        yield from world.actions
        yield from world.states
        yield from (first for first in world.first if first)
    yield from (f"{number}, {number}: {number} " for number in range(100))


def byte_level_bpe(corpus: Iterable[str], pieces: str, special_tokens: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a BPE on texts, which the pattern `pieces` splits. It has tokens for all 256 bytes and can encode any
    text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return core


def train_tokenizer(worlds: list[World]) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on the texts of the worlds."""
    core = byte_level_bpe(texts(worlds), PIECES, SPECIAL_TOKENS, VOCAB_SIZE)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
