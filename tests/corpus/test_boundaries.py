"""A running text is divided only where its parts give the token ids of the whole."""

# ruff: noqa: RUF001  (the test needs Chinese punctuation)

import io
import itertools
import os
import re

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus import boundaries
from corpus.boundaries import BOUNDARY, next_boundary, record_ends

# Patterns of tiktoken's other encodings. The tests use them with GPT-2's ranks, because the
# boundaries depend on the pattern only.
PATTERNS = {
    "cl100k": "|".join(
        [
            r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+""",
            r""" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
        ]
    ),
    "o200k": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
}  # fmt: skip
NAMES = ["gpt2", *PATTERNS]

# one character of each kind that a pattern or BOUNDARY distinguishes
KINDS_OF_CHARACTERS = "a漢L1²'/。!\u0301\u200b \t\u3000\n\r\u2028"
SCRIPTS = {
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი. ",
    "Amharic": "የሰው፡ልጅ፡ሁሉ፡ሲወለድ፡ነጻ፡ነው። ",
    "Amharic with spaces": "የሰው ልጅ ሁሉ ሲወለድ ነጻ ነው",
    "Burmese": "လူတိုင်းသည် တူညီလွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် မွေးဖွားလာသူများဖြစ်သည်။ ",
    "Khmer": "មនុស្សទាំងអស់ កើតមកមានសេរីភាព និងសមភាព។ ",
    "Cherokee": "ᏂᎦᏓ ᎠᏂᏴᏫ ᏂᎨᎫᏓᎸᎾ ᎠᎴ ᎤᏂᏠᏱ. ",
    "Tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས།",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระ และเสมอภาคกัน ",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。",
    "Chinese, blank lines": "人人生而自由。\n\n在尊严和权利上一律平等，\n\n",
    "Chinese, indented": "\u3000\u3000人人生而自由，在尊严和权利上。\n",
    "Chinese, CRLF": "人人生而自由，\r\n在尊严和权利上一律平等。\r\n",
    "Chinese verse": "床前明月光\r\n疑是地上霜\r\n",
    "Japanese": "すべての人間は、生まれながらにして自由であり、",
    "English": "Don't say we'll go; 12 o'clock's\tfine.\n\n  They're here.\r\n",
    "code": "if(a[1]){\n\treturn'x'+\"y\";\n}\n\n\n",
    "base64": "aGVsbG8gd29ybGQ1Zm9yZXZlcjEyMw",
}
HOSTILE = st.text(
    st.sampled_from(
        "aB 1'é漢字。、\u3000\xa0\u2028\u0301🙂/!_\n\r\t \n sლაየ፡ကို။មᏂ\x1c\u200b\u180e²٣་"
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def encodings():
    """The encodings by name; tests skip without GPT-2's vocabulary."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("TIKTOKEN_CACHE_DIR is not set (.ci/run sets it if the files exist)")
    gpt2 = tiktoken.get_encoding("gpt2")
    others = {
        name: tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=gpt2._mergeable_ranks, special_tokens={}
        )
        for name, pattern in PATTERNS.items()
    }
    return {"gpt2": gpt2} | others


def assert_exact(text, encode):
    """Assert that the parts before and after each boundary give the ids of the whole text.

    Returns the positions of all boundaries.
    """
    places = [match.start() for match in BOUNDARY.finditer(text)]
    if places:
        whole = encode(text)
    for place in places:
        assert encode(text[:place]) + encode(text[place:]) == whole, (text[:place], text[place:])
    return places


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, deadline=None)
@given(text=HOSTILE | st.text(max_size=60))
@example(text="a\n/b")
@example(text="x's 5'LL,don't")
def test_no_token_reaches_over_a_boundary(text, name, encodings):
    text = text.encode(errors="ignore").decode()
    assert_exact(text, encodings[name].encode_ordinary)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_reaches_over_a_boundary_among_all_kinds_of_characters(name, encodings):
    """The test tries all strings of four characters, one of each kind."""
    encode = encodings[name].encode_ordinary
    for characters in itertools.product(KINDS_OF_CHARACTERS, repeat=4):
        assert_exact("".join(characters), encode)


@pytest.mark.parametrize("name", NAMES)
def test_tiktoken_agrees_on_every_letter_and_punctuation_mark(name, encodings):
    """Each character of BOUNDARY's sets stands before and after a character of another kind."""
    encode = encodings[name].encode_ordinary
    for letter in characters(boundaries._LETTERS):
        text = f"{letter}, {letter}\n{letter}1{letter}"
        assert len(assert_exact(text, encode)) == 6, letter
    for mark in characters(boundaries._PUNCTUATION):
        assert len(assert_exact(f"漢{mark}a{mark}1{mark}", encode)) == 3, mark


def characters(members: str) -> list[str]:
    """Return the characters of a set of a regular expression."""
    pattern = re.compile(f"[{members}]")
    return [chr(i) for i in range(0x10000) if pattern.match(chr(i))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_text_of_every_script_is_divided(script, encodings):
    """A boundary lies within 100 characters, and next_boundary finds it from any byte."""
    text = SCRIPTS[script] * 20
    for encoding in encodings.values():
        places = assert_exact(text, encoding.encode_ordinary)
        steps = [end - start for start, end in itertools.pairwise([0, *places, len(text)])]
        assert max(steps) <= 100, script
    data = text.encode()
    ends = [len(text[:place].encode()) for place in places] + [len(data)]
    for start in range(0, len(data), 7):
        expected = next(end for end in ends if end > start)
        found = next_boundary(io.BytesIO(data), start, len(data))
        assert found in ends and found <= ends[min(ends.index(expected) + 1, len(ends) - 1)]
    assert record_ends(data, "") == [ends[-2]]


def test_a_boundary_is_found_beyond_the_first_window(monkeypatch):
    monkeypatch.setattr(boundaries, "WINDOW", 64)
    for length in range(1, 200):
        data = ("\u0301" * length + " x").encode()
        assert next_boundary(io.BytesIO(data), 0, len(data)) == 2 * length
    assert next_boundary(io.BytesIO(b"\xcc\x81" * 500), 0, 1000) == 1000
    assert record_ends(b"\xcc\x81" * 9000, "") == []
    assert record_ends(b"word next" + b"\xcc\x81" * 9000, "") == [4]


def test_bytes_that_are_not_utf8_do_not_move_a_boundary():
    """The reader reports invalid bytes at their true position."""
    assert record_ends(b"caf\xe9 au lait, \xff\xfe", "") == [13]
    assert next_boundary(io.BytesIO(b"\xe9\xe9\xe9\xe9\xe9 x"), 0, 7) == 5
    assert record_ends(b"one\n\xe3\x80", "") == [3]  # not 4: a space may begin there
