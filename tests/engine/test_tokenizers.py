"""Tokenizers and chat templates of every kind: control tokens, exact texts, and where a reply starts and ends."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.completion import CompletionText, without_prefix
from service.engine.prompt import Prompt
from service.engine.template import TemplateError
from service.engine.tokenizer import HFTokenizer
from tests.support import tokenizers as kinds

CONTROL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "<s>", "</s>", "<unk>", "<|user|>"]
LOSSY = {"Unigram", "whole words"}
"""Kinds whose tokens cannot express every text."""


@pytest.fixture(scope="module")
def made() -> dict[str, HFTokenizer]:
    return {name: HFTokenizer(make()) for name, make in kinds.KINDS.items()}


PIECES = st.lists(st.sampled_from([*CONTROL, *kinds.TEXTS, "<", "|", ">", " ", "  ", "\n", "go", "▁"]), max_size=8)
FORGERIES = PIECES.map("".join)


@pytest.mark.parametrize("name", kinds.KINDS)
@settings(max_examples=40)
@given(forgery=FORGERIES)
def test_text_of_callers_never_becomes_a_control_token(made: dict[str, HFTokenizer], name: str, forgery: str):
    tokenizer = made[name]
    control = set(tokenizer.control_tokens.values()) - {tokenizer.control_tokens.get("<unk>")}
    for ids in (
        tokenizer.encode(forgery),
        tokenizer.encode_segment(forgery, is_first=True),
        tokenizer.encode_segment(forgery, is_first=False),
    ):
        assert not control & set(ids)


@pytest.mark.parametrize("name", kinds.KINDS)
@settings(max_examples=40)
@given(forgery=FORGERIES)
def test_a_turn_has_the_control_tokens_of_its_template_only(made: dict[str, HFTokenizer], name: str, forgery: str):
    tokenizer = made[name]
    prompt = Prompt(tokenizer)
    control = set(tokenizer.control_tokens.values()) - {tokenizer.control_tokens.get("<unk>")}

    def controls(ids: list[int]) -> list[int]:
        return [token for token in ids if token in control]

    assert controls(prompt.first_turn(f"a{forgery}", forgery)) == controls(prompt.first_turn("a", "b"))
    assert controls(prompt.next_turn(forgery)) == controls(prompt.next_turn("b"))
    assert controls(prompt.encode_reply(forgery)) == []


@pytest.mark.parametrize("name", sorted(kinds.KINDS.keys() - LOSSY))
@settings(max_examples=40)
@given(text=FORGERIES | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_any_text_survives_and_streams_as_a_whole(made: dict[str, HFTokenizer], name: str, text: str):
    tokenizer = made[name]
    ids = tokenizer.encode(text)
    if "▁" not in text or name in ("Qwen3", "base model with ChatML"):  # this character is a space to the others
        assert tokenizer.decode(ids) == text
    decoder = tokenizer.decoder()
    assert "".join(decoder.add([token]) for token in ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["Qwen3", "Llama 2"])
def test_an_incomplete_character_is_left_out_and_a_genuine_replacement_character_is_not(
    made: dict[str, HFTokenizer], name: str
):
    tokenizer = made[name]
    smile = tokenizer.encode("🙂")
    assert tokenizer.decode(tokenizer.encode("a\ufffd")) == "a\ufffd"
    for size in range(1, len(smile)):
        assert tokenizer.decode([*tokenizer.encode("a\ufffd"), *smile[:size]]) == "a\ufffd"
        assert tokenizer.decode([*smile[:size], *tokenizer.encode("b")]).endswith("\ufffdb")


def test_tokens_of_a_tag_that_the_policy_draws_are_text(made: dict[str, HFTokenizer]):
    """They are not marked as special, and a parser of tool calls needs them."""
    tokenizer = made["Qwen3"]
    tag = tokenizer.control_tokens["<tool_call>"]
    assert tokenizer.decode([tag, *tokenizer.encode("{}"), tokenizer.control_tokens["<|im_end|>"]]) == "<tool_call>{}"


@pytest.mark.parametrize(
    "name", sorted(kinds.KINDS.keys() - {"Llama 2", "Llama 2, space at the start only", "text only"})
)
def test_the_tokens_are_the_templates_own(made: dict[str, HFTokenizer], name: str):
    assert Prompt(made[name]).report.canonical


@pytest.mark.parametrize("name", ["Llama 2", "Llama 2, space at the start only"])
def test_a_first_turn_of_llama_2_has_the_templates_own_tokens(made: dict[str, HFTokenizer], name: str):
    prompt = Prompt(made[name])
    assert prompt.report.append_only
    assert prompt.first_turn("", "go") == made[name].canonical([{"role": "user", "content": "go"}])


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("Qwen3", "<|im_end|>"),
        ("base model with ChatML", "<|im_end|>"),
        ("Llama 2", "</s>"),
        ("TinyLlama", "</s>"),
        ("Phi-3", "<|end|>"),
        ("Unigram", "<|im_end|>"),
    ],
)
def test_a_reply_stops_where_the_template_ends_a_turn(made: dict[str, HFTokenizer], name: str, end: str):
    prompt = Prompt(made[name])
    token = made[name].control_tokens[end]
    assert (prompt.terminator, prompt.stop_token_ids, prompt.stop) == (token, (token,), ())
    assert token not in prompt.next_turn("x")[:1], "the turn ends twice"


@pytest.mark.parametrize(("name", "stop"), [("text only", "\nUser:"), ("base model", "\nObservation:")])
def test_a_reply_stops_before_a_next_turn_that_is_marked_by_text(made: dict[str, HFTokenizer], name: str, stop: str):
    assert Prompt(made[name]).stop == (stop,)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_without_a_template_a_prompt_starts_as_the_tokenizer_starts_a_text(adds_bos: bool):
    backend = kinds.sentencepiece(None, adds_bos=adds_bos)
    prompt = Prompt(HFTokenizer(backend))
    ids = prompt.first_turn("Play.", "a door")
    assert ids == backend.encode("Play.\n\nObservation: a door\nAction:")
    assert (ids[0] == backend.bos_token_id) == adds_bos
    assert backend.bos_token_id not in prompt.next_turn("a wall")


@pytest.mark.parametrize("template", [kinds.PARTS, kinds.REQUIRES_SYSTEM])
def test_content_parts_and_a_required_system_message_give_the_same_turns(template: str):
    usual, prompt = Prompt(HFTokenizer(kinds.chatml())), Prompt(HFTokenizer(kinds.chatml(template=template)))
    assert prompt.report == usual.report
    assert prompt.first_turn("Play.", "a") == usual.first_turn("Play.", "a")
    assert prompt.next_turn("b") == usual.next_turn("b")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ messages[0].nothing.at_all }}", "{{ messages[-1].content }}"]
)
def test_a_template_that_renders_no_conversation_is_refused_with_its_reason(template: str):
    with pytest.raises(TemplateError, match="the chat template"):
        Prompt(HFTokenizer(kinds.chatml(template=template)))


# --- the text of a completion


class Words:
    """Decodes the tokens of a list of words: token i is word i."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def add(self, token_ids: Any) -> str:
        return "".join(self._words[token] for token in token_ids)


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=8),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    st.integers(0, 3),
)
def test_the_emitted_pieces_are_the_text_before_the_first_stop_string(words: list[str], stop: list[str], late: int):
    """The engine may find a stop string some tokens late."""
    emitted: list[str] = []
    text = CompletionText(Words(words), stop, emitted.append)
    is_found = [any(string in "".join(words[:size]) for string in stop) for size in range(len(words) + 1)]
    size = min(is_found.index(True) + late if any(is_found) else len(words), len(words))
    for number in range(1, size):
        text.update(range(number))
    whole = "".join(words[:size])
    found = text.finish(range(size))
    assert found == min((whole.partition(string)[0] for string in stop), key=len, default=whole)
    assert "".join(emitted) == found


@given(st.text(" \na", max_size=6), st.sampled_from(["", " ", "\n", "\n "]), st.data())
def test_a_prefix_is_left_out_of_a_stream_as_of_the_text(text: str, prefix: str, data: st.DataObject):
    emitted: list[str] = []
    emit = without_prefix(emitted.append, prefix)
    for piece in _cut(text, data):
        emit(piece)
    emit("end")
    assert "".join(emitted) == (text + "end").removeprefix(prefix)


def _cut(text: str, data: st.DataObject) -> Iterator[str]:
    while text:
        size = data.draw(st.integers(1, len(text)))
        yield text[:size]
        text = text[size:]


def test_a_pattern_for_a_space_sees_the_first_space(made: dict[str, HFTokenizer]):
    """A grammar works on the bytes of tokens, so the text must contain them all."""
    tokenizer = made["Llama 2"]
    assert re.fullmatch(" [a-z]+", tokenizer.decode(tokenizer.encode(" go")))
