"""For a divisible tokenizer.json, the parts of a running text give the token ids of the whole."""

import itertools
import json
import re
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_boundaries import KINDS_OF_CHARACTERS, SCRIPTS, characters

from corpus import boundaries, pipeline
from corpus import tokenizer as tokenizer_module
from corpus.boundaries import BOUNDARY
from corpus.divisible import WORD_PATTERNS, is_divisible
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.sources import Source
from corpus.tokenizer import HuggingFaceTokenizer

tokenizers = pytest.importorskip("tokenizers")

ADDED_TOKENS = ("<tool_call>", "<|fim_prefix|>", "<think>", "[UNUSED_TOKEN_1]", "|||IP|||", "    ")
SEVERAL_TIMES = ("a", "B", "1", " ", "\n", "\r\n", "'", "\u0301", "漢", "\u3000", "\xa0", "/")
FRAGMENTS = (
    "don't", "'LL", "'s", "x1y22", "\u1e9b\u0323", "\u1100\u1161", "\u0f69", "\u0958", "\u212b",
    "=\u0338", "<\u0338", "。", "、", "!", "_", ">", "|", "\u2028", "\x1c", "\u200b", "ს", "ក",
    "🙂", "<tool", "call>", "<|endoftext|>", *ADDED_TOKENS,
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(SEVERAL_TIMES) | st.sampled_from(FRAGMENTS), max_size=30).map(
    "".join
)


def split_by(*patterns, behavior="isolated", invert=False):
    """Return a pre-tokenizer that divides by patterns, then into bytes."""
    splits = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert)
        for pattern in patterns
    ]
    return tokenizers.pre_tokenizers.Sequence([*splits, byte_level(use_regex=False)])


def byte_level(use_regex=True, add_prefix_space=False):
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space, use_regex=use_regex)


def after_digits(individual_digits):
    digits = tokenizers.pre_tokenizers.Digits(individual_digits)
    return tokenizers.pre_tokenizers.Sequence([digits, byte_level()])


PRE_TOKENIZERS = {name: split_by(*patterns) for name, patterns in WORD_PATTERNS.items()} | {
    "ByteLevel": byte_level(),
    "each digit alone": after_digits(True),
    "digits alone": after_digits(False),
    "GPT-4, inverted": split_by(*WORD_PATTERNS["Llama 3"], behavior="removed", invert=True),
}


def make_tokenizer(pre_tokenizer, normalizer=None, added_tokens=()):
    """Return a small byte-level BPE with this structure."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "don't x1y22 <tool_call> 漢字。\n\n a/b!  \u212b " * 9
    made.train_from_iterator([text, "a 1\n" * 9], trainer)
    if normalizer:
        made.normalizer = normalizer
    made.add_tokens([*added_tokens])
    made.encode_special_tokens = True  # as HuggingFaceTokenizer does
    return made


def pieces(made, text):
    """Return the words of a text and the ids of the whole text."""
    normalized = made.normalizer.normalize_str(text) if made.normalizer else text
    words = [word for word, _ in made.pre_tokenizer.pre_tokenize_str(normalized)]
    return words, made.encode(text, add_special_tokens=False).ids


def assert_exact(made, text):
    """Assert that the parts before and after each boundary give words and ids of the whole.

    An added token makes a word of its own, which only the ids know.
    """
    whole_words, whole_ids = pieces(made, text)
    for match in BOUNDARY.finditer(text):
        place = match.start()
        words, ids = pieces(made, text[:place])
        more_words, more_ids = pieces(made, text[place:])
        assert ids + more_ids == whole_ids, (text[:place], text[place:])
        assert words + more_words == whole_words, (text[:place], text[place:])


def structure(made):
    return json.loads(made.to_str())


@pytest.fixture(scope="module")
def made_tokenizers():
    """Each known pre-tokenizer alone, and with NFC and added tokens."""
    found = {}
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        nfc = tokenizers.normalizers.NFC()
        found[name] = make_tokenizer(pre_tokenizer)
        found[name, "NFC"] = make_tokenizer(pre_tokenizer, nfc, ADDED_TOKENS)
    return found


@pytest.mark.parametrize("more", [None, "NFC"])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS | st.text(max_size=40))
@example(text="a\n/b x's 5'LL,don't <tool_call> 12a")
def test_parts_give_the_ids_of_the_whole(text, name, more, made_tokenizers):
    made = made_tokenizers[(name, more) if more else name]
    assert is_divisible(structure(made))
    assert_exact(made, text.encode(errors="ignore").decode())


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_no_word_spans_a_boundary_among_all_kinds_of_characters(name):
    """The test tries all strings of four characters, one of each kind, also after NFC."""
    divide = PRE_TOKENIZERS[name].pre_tokenize_str
    for kinds in itertools.product(KINDS_OF_CHARACTERS, repeat=4):
        text = "".join(kinds)
        places = [match.start() for match in BOUNDARY.finditer(text)]
        if places:
            whole = [word for word, _ in divide(text)]
        for place in places:
            parts = [divide(part) for part in (text[:place], text[place:])]
            assert [word for part in parts for word, _ in part] == whole, text


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_tokenizers_agrees_on_every_letter_and_punctuation_mark(name):
    made = make_tokenizer(PRE_TOKENIZERS[name])
    for letter in characters(boundaries._LETTERS)[::53]:  # test_boundaries.py takes all
        assert_exact(made, f"{letter}, {letter}\n{letter}1{letter}")
    for mark in characters(boundaries._PUNCTUATION):
        assert_exact(made, f"漢{mark}a{mark}1{mark}")


def test_normalizing_does_not_reach_over_a_boundary():
    """The characters that make a boundary stay as they are, and nothing else becomes a space."""
    spaces = re.compile(f"[{boundaries._SPACES}]")
    code_points = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    composing = {chr(i) for i in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}  # Hangul
    for character in code_points:
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            composing.add(chr(int(parts[1], 16)))  # combines with a character before it
    members = boundaries._LETTERS + boundaries._PUNCTUATION + "0-9" + boundaries._SPACES
    for character in characters(members):
        normalized = unicodedata.normalize("NFC", character)
        assert normalized == character or (spaces.match(character) and spaces.match(normalized))
        assert not unicodedata.combining(character) and character not in composing
    for character in code_points:
        if not spaces.match(character):
            assert not spaces.search(unicodedata.normalize("NFC", character)), ascii(character)


REFUSED = {  # a structure -> function that makes it of a divisible tokenizer
    "a prefix space": lambda made: setattr(made, "pre_tokenizer", byte_level(True, True)),
    "no pattern": lambda made: setattr(made, "pre_tokenizer", byte_level(use_regex=False)),
    "digits only": lambda made: setattr(
        made,
        "pre_tokenizer",
        tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.Digits(True), byte_level(use_regex=False)]
        ),
    ),
    "another pattern": lambda made: setattr(made, "pre_tokenizer", split_by(r"\p{L}+|\s+")),
    "a part of DeepSeek's patterns": lambda made: setattr(
        made, "pre_tokenizer", split_by(WORD_PATTERNS["DeepSeek V3"][-1])
    ),
    "spaces merged": lambda made: setattr(
        made, "pre_tokenizer", split_by(*WORD_PATTERNS["Qwen2"], behavior="merged_with_next")
    ),
    "no bytes": lambda made: setattr(made, "pre_tokenizer", tokenizers.pre_tokenizers.Whitespace()),
    "SentencePiece": lambda made: setattr(
        made, "pre_tokenizer", tokenizers.pre_tokenizers.Metaspace()
    ),
    "another normalizer": lambda made: setattr(
        made,
        "normalizer",
        tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFC(), tokenizers.normalizers.Strip()]
        ),
    ),
    "an added token of two words": lambda made: made.add_tokens(["two words"]),
    "an added token with a boundary after its first character": lambda made: made.add_tokens(
        ["\nab"]
    ),
    "an added token with the space before it": lambda made: made.add_tokens(
        [tokenizers.AddedToken("<x>", lstrip=True)]
    ),
    "an added token with the space after it": lambda made: made.add_tokens(
        [tokenizers.AddedToken("<x>", rstrip=True)]
    ),
    "an added token between spaces": lambda made: made.add_tokens(
        [tokenizers.AddedToken("<x>", single_word=True)]
    ),
    "dropout": lambda made: setattr(made.model, "dropout", 0.1),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_structure_is_not_divisible(case):
    made = make_tokenizer(byte_level())
    assert is_divisible(structure(made))
    REFUSED[case](made)
    assert not is_divisible(structure(made))


def test_special_tokens_are_ordinary_text_and_may_hold_a_boundary():
    made = make_tokenizer(split_by(*WORD_PATTERNS["Llama 3"]))
    made.add_special_tokens(["<|two words|>", tokenizers.AddedToken("<mask>", lstrip=True)])
    assert is_divisible(structure(made))
    assert_exact(made, "one <|two words|> three <mask>\n<mask>")


@pytest.mark.parametrize("name", ["Llama 3", "Qwen2", "o200k", "DeepSeek V3"])
def test_a_running_text_of_many_scripts_gets_the_ids_of_one_call(name, tmp_path, monkeypatch):
    """No call takes more than the text between two boundaries above the limit."""
    made = make_tokenizer(PRE_TOKENIZERS[name], tokenizers.normalizers.NFC(), ADDED_TOKENS)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer("mine", tmp_path / "tokenizer.json")
    text = "".join(script * 3 + "<tool_call> e\u0301 " for script in SCRIPTS.values()) * 4
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    expected = made.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_AT_ONCE", 200)
    monkeypatch.setattr(pipeline, "TASK_BYTES", (1500, 1500))
    monkeypatch.setattr("corpus.tasks.get_tokenizer", lambda name: tokenizer)
    encode = tokenizer._encode
    lengths = []

    def encode_and_record(texts):
        lengths.append(sum(map(len, texts)))
        return encode(texts)

    monkeypatch.setattr(tokenizer, "_encode", encode_and_record)
    source = Source(str(tmp_path / "my.txt"), split="train")
    val = Source(str(tmp_path / "my.txt"), split="val")
    with open_engine("processes", 1) as run_tasks:
        pipeline.prepare(Corpus("my", {}, [source, val]), tokenizer, tmp_path / "my", run_tasks)
    for split in "train", "val":
        found = np.fromfile(tmp_path / "my" / f"{split}.bin", "<u2")
        assert found.tolist() == expected
    assert len(lengths) > 20 and max(lengths) < 400
