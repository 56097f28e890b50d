"""Regular expressions of ECMA-262: which texts match, compared with Python's `re`, and which patterns are refused."""

import random
import re

import pytest

from service.validation.patterns import PatternRefused, matches, parse


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        (r"\.py$", ["a.py", ".py"], ["a.pyx"]),
        ("a|^b$", ["xax", "b"], ["bb"]),
        ("(^|,)x(,|$)", ["x", "a,x", "x,a"], ["ax"]),
        ("^(?!main$)(main|dev)$", ["dev"], ["main"]),
        (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", ["1.5", "-0"], ["-", "", "+."]),
        ("^(?=.*[A-Z])(?=.*[0-9])[A-Za-z0-9]{4,}$", ["abC1"], ["abc1", "aC1"]),
        ('[^"]', ["a", '"a'], ['"', ""]),
        (r"^\w\d\s$", ["a1 ", "a1\u00a0"], ["é1 ", "a٣ "]),
        ("^.$", ["é", "😀"], ["\n", "\u2028", ""]),
        (r"^[\ud83d\ude00]\u{1F600}$", ["😀😀"], ["😀"]),
        (r"^\p{Lu}\P{L}$", ["É1"], ["éa"]),
        (r"^\p{Space_Separator}\p{Control}$", ["\u2003\x1f"], ["\n ", "a\x1f"]),
        (r"^[\w-.]+@[a-\d]$", ["a-b.c@-", "_@7"], ["a,b@-", "a@b"]),
        (r"^[^\ud800-\udfff]$", ["a", "😀"], [""]),
        (r"^[\b\-\]^]+$", ["\b-]^"], ["b"]),
        ("^[^]$", ["\n"], [""]),
        ("[]", [], ["", "a"]),
        (r"^a{,2}{$", ["a{,2}{"], ["aa"]),
        (r"^\cJ\x41\0$", ["\nA\x00"], []),
        (r"a^|$b", [], ["a", "b", "ab"]),
        ("(?<year>x)", ["x"], ["y"]),
    ],
)
def test_patterns_search_as_ecma_262_does(pattern: str, matching: list[str], other: list[str]):
    assert [matches(pattern, text, searches=True) for text in matching] == [True] * len(matching)
    assert [matches(pattern, text, searches=True) for text in other] == [False] * len(other)


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        ("(?<=a)b", "lookbehind"),
        ("(?<!a)b", "negative lookbehind"),
        ("a(?=b)", "lookahead"),
        (r"(a)\1", "backreference"),
        (r"\k<a>", "backreference"),
        (r"\bx", "word boundary"),
        ("(?P<n>a)", "named group"),
        ("(?i)a", "flags"),
        ("(^a)*", "inside a repetition"),
        (r"\p{Script=Greek}", "property"),
        (r"\p{Greek}", "Unicode property"),
        (r"\a", "escape"),
        (r"\01", "octal"),
        (r"^\ud83d$", "surrogate"),
        (r"[a\ud800-\udbff][\udc00-\udfff]", "surrogate"),
        ("a{3,2}", "out of order"),
        ("a{99999}", "too large"),
        ("[b-a]", "out of order"),
        ("(", "not closed"),
        (")", "not opened"),
        ("[a", "ends within"),
        ("a\\", "ends within"),
        ("*a", "nothing to repeat"),
        ("a**", "nothing to repeat"),
        ("(" * 60 + ")" * 60, "levels deep"),
        ("a" * 5000, "characters long"),
    ],
)
def test_a_pattern_is_refused_by_the_name_of_what_is_not_supported(pattern: str, word: str):
    with pytest.raises(PatternRefused, match=word):
        parse(pattern, searches=True)


def _drawn(generator: random.Random, depth: int) -> str:
    choose = generator.choice
    match generator.randrange(9 if depth else 4):
        case 0 | 1:
            return choose(("a", "b", '"', r"\\", r"\n", ".", "[^a]", "[ab]", '[^"]', r"\d"))
        case 2:
            return "^"
        case 3:
            return "$"
        case 4 | 5:
            return _drawn(generator, depth - 1) + _drawn(generator, depth - 1)
        case 6:
            return f"(?:{_drawn(generator, depth - 1)})" + choose(("*", "?", "+", "{0,2}"))
        case _:
            return f"(?:{_drawn(generator, depth - 1)}|{_drawn(generator, depth - 1)})"


def test_random_patterns_match_as_pythons_re_says():
    generator, num_compared = random.Random(1), 0
    while num_compared < 1000:
        pattern = _drawn(generator, 4)
        text = "".join(generator.choice('ab"\\\n') for _ in range(generator.randrange(5)))
        try:
            expected = re.search(pattern.replace("$", r"\Z"), text) is not None
            assert matches(pattern, text, searches=True) == expected, (pattern, text)
        except (PatternRefused, re.error):
            continue
        num_compared += 1
