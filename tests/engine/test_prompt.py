"""Prompts: chat templates of several kinds with the packaged tokenizer. Text of callers never has special tokens."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from service.agent.options import system_text
from service.engine.base import TemplateReport
from service.engine.prompt import Prompt, observation_text
from service.engine.template import TemplateError
from service.engine.tokenizer import HFTokenizer
from tests.conftest import POLICY

ROLES = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
REPLY = "{% if add_generation_prompt %}<|assistant|>{% endif %}"

CHATML = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}" + REPLY
)
IGNORES_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}" + REPLY
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|system|>You are helpful.<|end|>{% endif %}" + ROLES + REPLY
TRIMS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}" + REPLY
OPENS_WITH_THINKING = ROLES + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
COUNTS_BACKWARDS = (
    "{% for m in messages %}<|{{ m.role }}|>[{{ loop.revindex }}] {{ m.content }}<|end|>{% endfor %}" + REPLY
)
DROPS_THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}" + REPLY
)
NO_SPECIAL_TOKENS = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)

GOOD = TemplateReport(append_only=True, canonical=True, system_role=True, plain=False)

CANONICAL: dict[str, tuple[str, TemplateReport]] = {
    "roles": (ROLES + REPLY, GOOD),
    "ChatML with newlines": (CHATML, GOOD),
    "refuses the system role": (REFUSES_SYSTEM, TemplateReport(True, True, False, False)),
    "ignores the system role": (IGNORES_SYSTEM, TemplateReport(True, True, False, False)),
    "default system message": (DEFAULT_SYSTEM, GOOD),
    "trims": (TRIMS, GOOD),
}
OTHERS: dict[str, tuple[str | None, TemplateReport]] = {
    "opens the reply with thinking": (OPENS_WITH_THINKING, TemplateReport(False, False, True, False)),
    "numbers turns from the end": (COUNTS_BACKWARDS, TemplateReport(False, False, True, False)),
    "drops earlier thinking": (DROPS_THINKING, TemplateReport(False, True, True, False)),
    "no special tokens": (NO_SPECIAL_TOKENS, TemplateReport(True, False, True, False)),
    "none": (None, TemplateReport(True, True, True, True)),
}


def prompt_with(template: str | None) -> Prompt:
    tokenizer: Any = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.chat_template = template
    return Prompt(HFTokenizer(tokenizer))


@pytest.fixture(scope="module")
def prompts() -> dict[str, Prompt]:
    return {name: prompt_with(template) for name, (template, _) in (CANONICAL | OTHERS).items()}


@pytest.fixture(scope="module")
def packaged(tokenizer: HFTokenizer) -> Prompt:
    return Prompt(tokenizer)


def test_the_packaged_template_is_as_it_should_be(packaged: Prompt):
    assert packaged.report == GOOD


@pytest.mark.parametrize("name", CANONICAL | OTHERS)
def test_the_report_says_how_a_template_behaves(prompts: dict[str, Prompt], name: str):
    assert prompts[name].report == (CANONICAL | OTHERS)[name][1]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"], exclude_characters="<"))
TEXTS = st.lists(WORDS.filter(bool), min_size=1, max_size=4).map(" ".join)
REPLIES = st.from_regex("[a-z]+( [a-z]+)*", fullmatch=True)


@pytest.mark.parametrize("name", CANONICAL)
@settings(max_examples=30)
@given(system=TEXTS, observations=st.lists(TEXTS, min_size=2, max_size=4), data=st.data())
def test_the_tokens_are_the_templates_own(
    prompts: dict[str, Prompt], name: str, system: str, observations: list[str], data: st.DataObject
):
    prompt = prompts[name]
    replies = [data.draw(REPLIES) for _ in observations[1:]]
    with_system = prompt.report.system_role
    ids = prompt.first_turn(system if with_system else "", observations[0])
    messages = [{"role": "system", "content": system}] if with_system else []
    messages.append({"role": "user", "content": observations[0]})
    for reply, observation in zip(replies, observations[1:], strict=True):
        ids += [*prompt.tokenizer.encode(reply), prompt.terminator, *prompt.next_turn(observation)]
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": observation}]
    assert ids == prompt.tokenizer.canonical(messages)


def test_a_default_system_message_stays_where_no_instructions_are(prompts: dict[str, Prompt]):
    prompt = prompts["default system message"]
    text = prompt.tokenizer.decode(prompt.first_turn("", "hello"))
    assert text == "You are helpful.hello"
    assert prompt.tokenizer.decode(prompt.first_turn("Be terse.", "hello")) == "Be terse.hello"


@pytest.mark.parametrize("name", ["refuses the system role", "ignores the system role"])
def test_without_a_system_role_instructions_go_into_the_first_observation(prompts: dict[str, Prompt], name: str):
    prompt = prompts[name]
    assert prompt.first_turn("Play.\n\nGoal: win", "hello") == prompt.tokenizer.canonical(
        [{"role": "user", "content": "Play.\n\nGoal: win\n\nhello"}]
    )


def test_a_model_without_a_template_reads_plain_text(prompts: dict[str, Prompt]):
    prompt = prompts["none"]
    first = prompt.first_turn("Play.", "a door")
    assert prompt.tokenizer.decode(first) == "Play.\n\nObservation: a door\nAction:"
    assert prompt.tokenizer.decode(prompt.next_turn("a wall")) == "\nObservation: a wall\nAction:"
    assert prompt.terminator == prompt.tokenizer.eos_token_id


def test_a_reply_opened_with_thinking_is_opened_so_at_every_step(prompts: dict[str, Prompt]):
    prompt = prompts["opens the reply with thinking"]
    opening = [4, *prompt.tokenizer.encode("<think>\n")]
    assert prompt.first_turn("", "a", thinks=True)[-len(opening) :] == opening
    assert prompt.next_turn("b", thinks=True)[-len(opening) :] == opening
    silent = prompt.next_turn("b")
    assert prompt.tokenizer.decode(silent).endswith("<think>\n\n</think>\n\n"), "the turn lacks an empty thought"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    ],
    ids=["upper case", "last only", "reversed"],
)
def test_unusable_chat_template_is_refused(template: str):
    with pytest.raises(TemplateError, match="unchanged and in order"):
        prompt_with(template)


# --- text of callers


SPECIALS = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"]
FORGERIES = st.lists(st.sampled_from([*SPECIALS, "<|", "|>", "<", " ", "\n", "obey", "<|end|"]), max_size=12).map(
    "".join
)


@given(FORGERIES)
def test_no_text_becomes_a_special_token(tokenizer: HFTokenizer, text: str):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(range(6))
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", CANONICAL | OTHERS)
@settings(max_examples=20)
@given(forgery=FORGERIES, more=FORGERIES)
def test_a_turn_has_the_special_tokens_of_its_template_only(
    prompts: dict[str, Prompt], name: str, forgery: str, more: str
):
    prompt = prompts[name]

    def specials(ids: list[int]) -> list[int]:
        return [token for token in ids if token < 6]

    honest, forged = prompt.first_turn("a\n\nb", "c"), prompt.first_turn(f"a{forgery}\n\n{more}", {"x": forgery})
    assert specials(forged) == specials(honest)
    assert specials(prompt.next_turn(forgery)) == specials(prompt.next_turn("c"))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(tokenizer: HFTokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.sampled_from([*SPECIALS, "text", "\n"]), max_size=8))
def test_a_templates_text_splits_at_its_special_tokens(tokenizer: HFTokenizer, parts: list[str]):
    names = dict(
        zip(range(6), ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"], strict=True)
    )
    found = tokenizer.split("".join(parts))
    assert "".join(names[part] if isinstance(part, int) else part for part in found) == "".join(parts)
    assert sum(isinstance(part, int) for part in found) == sum(part in SPECIALS for part in parts)


# --- system messages and observations as text


@pytest.mark.parametrize(
    ("instructions", "goal", "text"),
    [("", None, ""), ("a", None, "a"), ("", "b", "Goal: b"), ("a", "b", "a\n\nGoal: b")],
)
def test_the_system_message(instructions: str, goal: str | None, text: str):
    assert system_text({"instructions": instructions, "goal": goal}) == text


@pytest.mark.parametrize(
    ("observation", "text"),
    [
        ("as it is\n", "as it is\n"),
        ({"pos": [1, 2], "ü": None}, '{"pos":[1,2],"ü":null}'),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ([], "[]"),
    ],
)
def test_the_text_of_an_observation(observation: Any, text: str):
    assert observation_text(observation) == text
