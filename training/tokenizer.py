"""The policy's tokenizer: a byte-level BPE whose pieces are the worlds' words, and its chat template."""

from collections.abc import Iterator

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

# A grid position is one piece, so one token: half the tokens of a step. A word takes the comma and the space before it
# along; other numbers are pieces of up to three digits.
PIECES = r"row \p{N}+, column \p{N}+|,? ?\p{L}+|,? ?\p{N}{1,3}|\n| ?[^\s\p{L}\p{N}]+|\s+"

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def texts(worlds: list[World]) -> Iterator[str]:
    """Every kind of turn the worlds speak."""
    for world in worlds:
        yield world.instructions
        yield from world.actions
        yield from world.states
        yield from (first for first in world.first if first)
    yield from (f"{number}, {number}: {number} " for number in range(100))


def train_tokenizer(worlds: list[World]) -> PreTrainedTokenizerFast:
    """Learns the merges from the worlds' own text; all 256 bytes are in, so that any text can be encoded."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts(worlds), trainer)
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
