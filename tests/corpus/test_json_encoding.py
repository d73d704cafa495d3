"""Where tiktoken encodes for a tokenizer.json, its ids are those of `tokenizers` for every text."""

import json
import pydoc_data.topics
import random

import numpy as np
import pytest
from conftest import path_from_environment
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.encoders import FRAGMENTS, blocks_of_code_points, compare_documents
from corpus import json_encoding as json_encoding_module
from corpus.encoders import FAST, FAST_VERSION, choose_encoder, open_encoder
from corpus.json_encoding import json_encoding
from corpus.tokenizer import HuggingFaceTokenizer, encodable
from corpus.vocabulary_files import vocabulary_paths

tokenizers = pytest.importorskip("tokenizers")
EOT = "<|endoftext|>"
HOSTILE = ["", "\0", "\ud800x\ude00", "\ud83d\ude00", f"a {EOT}{EOT}b", "ab" * 50_000, " " * 50_000]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.characters(), max_size=30).map("".join)


def byte_level_bpe(vocabulary=None, merges=None):
    """Return a BPE with GPT-2's pattern."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.encode_special_tokens = True  # as HuggingFaceTokenizer does
    return made


def trained(texts, num_ids, special=()):
    """Return a BPE that is trained on texts. Ids of `special` come first, else the last is EOT."""
    made = byte_level_bpe()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_ids - 1,
        special_tokens=[*special],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([EOT])
    return made


def gpt2():
    """Return the BPE of GPT-2."""
    paths = vocabulary_paths("gpt2")
    vocabulary = json.loads(paths["encoder.json"].read_bytes())
    lines = paths["vocab.bpe"].read_text(encoding="utf-8").split("\n")[1:-1]
    made = byte_level_bpe(vocabulary, [tuple(line.split(" ")) for line in lines])
    made.add_special_tokens([EOT])
    return made


def assert_same_ids(ours, theirs, texts, eot_token):
    """Assert that an encoder encodes each text, alone and as a document, to the ids of theirs."""
    expected = []
    for text in texts:
        ids = theirs.encode(encodable(text)).ids
        assert ours.encode(text).tolist() == ids
        expected += [*ids, eot_token]
    assert ours.encode_documents(texts).tolist() == expected


@pytest.fixture(scope="module", params=[300, 1000, 4096, "special tokens first", "GPT-2"])
def pair(request, tmp_path_factory):
    """A tokenizer that lets tiktoken encode, and the one of `tokenizers`."""
    texts = pydoc_data.topics.topics.values()
    if request.param == "GPT-2":
        path_from_environment("TIKTOKEN_CACHE_DIR")
        theirs = gpt2()
    elif request.param == "special tokens first":
        theirs = trained(texts, 500, ["<pad>", EOT, "import"])
    else:
        theirs = trained(texts, request.param)
    path = tmp_path_factory.mktemp("json") / "mine.json"
    theirs.save(str(path))
    ours = HuggingFaceTokenizer("mine.json", path)
    assert ours.faster and ours.vocab_size == ours.faster.vocab_size
    assert ours.eot_token == ours.faster.eot_token
    return ours, theirs


def without_tokenizers(*arguments):
    raise AssertionError("tiktoken did not encode")


def test_hostile_texts_get_the_ids_of_tokenizers(pair, monkeypatch):
    ours, theirs = pair
    monkeypatch.setattr(ours, "_encode", without_tokenizers)
    texts = [*HOSTILE, *pydoc_data.topics.topics.values()]
    assert_same_ids(ours, theirs, texts, ours.eot_token)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_random_texts_get_the_ids_of_tokenizers(texts, pair):
    ours, theirs = pair
    assert_same_ids(ours, theirs, texts, ours.eot_token)


@pytest.mark.parametrize("pair", [4096], indirect=True)
def test_white_space_too_long_for_tiktoken_is_encoded_by_tokenizers(pair):
    ours, theirs = pair
    text = "a" + " " * 1_000_000 + "\n" * 20 + "b"
    expected = theirs.encode(text).ids
    assert ours.encode(text).tolist() == expected
    assert ours.encode_documents(["", text]).tolist() == [
        ours.eot_token, *expected, ours.eot_token
    ]  # fmt: skip


@pytest.mark.parametrize("pair", [4096, "special tokens first"], indirect=True)
def test_the_fast_encoder_gives_the_same_ids(pair):
    pytest.importorskip(FAST)
    ours, theirs = pair
    name, line = choose_encoder("auto", ours, 8 << 20)
    assert (name, line.split(" (")[0]) == (FAST, f"encoder: {FAST} {FAST_VERSION}")
    assert choose_encoder("auto", ours, (8 << 20) - 1)[0] != FAST
    texts = [*HOSTILE, "<pad> import", *pydoc_data.topics.topics.values()]
    assert_same_ids(open_encoder(name, ours), theirs, texts, ours.eot_token)
    assert "same ids" in compare_documents(5000, random.randrange(1_000_000), ours)
    text = "a" + " " * 1_000_000 + "\n" * 20 + "b"
    assert open_encoder(name, ours).encode(text).tolist() == theirs.encode(text).ids


# merges

WORDS = st.text("abc", min_size=1, max_size=12)


def with_merges(pairs, more=()):
    """Return a BPE with these merges, each of which makes the next id."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokens = dict.fromkeys([*sorted(letters), *("".join(pair) for pair in pairs), *more])
    made = byte_level_bpe({token: i for i, token in enumerate(tokens)}, pairs)
    made.add_special_tokens([EOT])
    return made


@st.composite
def merge_lists(draw):
    """Merges of any earlier tokens, whether or not a training could learn them."""
    tokens = ["a", "b", "c"]
    pairs = []
    for _ in range(draw(st.integers(0, 8))):
        merge = draw(st.tuples(st.sampled_from(tokens), st.sampled_from(tokens)))
        if merge not in pairs:
            pairs.append(merge)
            tokens.append("".join(merge))
    return pairs


@settings(max_examples=200, deadline=None)
@given(merges=merge_lists(), words=st.lists(WORDS, min_size=1, max_size=30))
def test_any_merges_give_the_same_ids_or_are_refused(merges, words):
    theirs = with_merges(merges)
    encoding = json_encoding(theirs)
    for word in words if encoding else []:
        assert encoding.encode_ordinary(word) == theirs.encode(word).ids


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.lists(WORDS, max_size=30).map(" ".join), max_size=5))
def test_a_trained_vocabulary_is_accepted_and_gives_the_same_ids(texts):
    theirs = trained(texts, 300)
    encoding = json_encoding(theirs)
    for word in [*texts, "".join(texts)]:
        assert encoding.encode_ordinary(word) == theirs.encode(word).ids


@pytest.mark.parametrize(
    "merges",
    [
        [("b", "c"), ("a", "b"), ("ab", "c")],  # abc becomes a and bc
        [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")],  # two pairs for abc
    ],
    ids=["unreachable", "two pairs"],
)
def test_merges_that_tiktoken_would_apply_otherwise_are_refused(merges):
    assert json_encoding(with_merges(merges[:2]))
    assert json_encoding(with_merges(merges)) is None


# structures

REFUSED = {  # a structure -> function that makes it of an accepted tokenizer
    "a prefix space": lambda made: setattr(
        made, "pre_tokenizer", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "no pattern": lambda made: setattr(
        made, "pre_tokenizer", tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    ),
    "no pre-tokenizer": lambda made: setattr(made, "pre_tokenizer", None),
    "digits apart": lambda made: setattr(
        made,
        "pre_tokenizer",
        tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.Digits(True), made.pre_tokenizer]
        ),
    ),
    "a normalizer": lambda made: setattr(made, "normalizer", tokenizers.normalizers.NFC()),
    "an added token": lambda made: made.add_tokens(["one"]),
    "dropout": lambda made: setattr(made.model, "dropout", 0.1),
    "an unknown token": lambda made: setattr(made.model, "unk_token", EOT),
    "a prefix": lambda made: setattr(made.model, "continuing_subword_prefix", "##"),
    "a suffix": lambda made: setattr(made.model, "end_of_word_suffix", "_"),
    "byte fallback": lambda made: setattr(made.model, "byte_fallback", True),
    "whole words": lambda made: setattr(made.model, "ignore_merges", True),
    "another model": lambda made: setattr(made, "model", tokenizers.models.WordLevel({"a": 0})),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_structure_is_left_to_tokenizers(case):
    made = with_merges([("o", "n"), ("on", "e")])
    assert json_encoding(made)
    REFUSED[case](made)
    assert json_encoding(made) is None


def test_another_vocabulary_is_left_to_tokenizers():
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*letters, "on", "one"])}
    cases = {
        "accepted": ids,
        "a byte is missing": {token: i for token, i in ids.items() if token != "z"},
        "ids in another order": ids | {"on": 257, "one": 256},
    }
    found = {}
    for case, vocabulary in cases.items():
        made = byte_level_bpe(vocabulary, [("o", "n"), ("on", "e")])
        made.add_special_tokens([EOT])
        found[case] = json_encoding(made) is not None
    assert found == {case: case == "accepted" for case in cases}
    without_eot = byte_level_bpe(ids, [("o", "n"), ("on", "e")])
    assert json_encoding(without_eot) is None


def test_tokens_that_no_merge_makes_are_never_ids():
    theirs = with_merges([("o", "n")], ["one", "漢"])
    encoding = json_encoding(theirs)
    for text in "one 漢", "ne":
        ids = theirs.encode(text).ids
        assert np.array_equal(encoding.encode_to_numpy(text), ids)


# versions


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_packages_divide_a_text_alike_at_every_code_point():
    """Any two neighbouring bytes, one of them in "a1. \\n'", have a merge that a division stops."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [pair for i in "a1.\u0120\u010a'" for j in letters for pair in ((i, j), (j, i))]
    theirs = with_merges([*dict.fromkeys(pairs)])
    encoding = json_encoding(theirs)
    for code_points in blocks_of_code_points():
        texts = ["a@a1@1a.@. @ a\n@\n'@'s@'".replace("@", chr(c)) for c in code_points]
        expected = [encoding.encode_ordinary(text) for text in texts]
        found = [each.ids for each in theirs.encode_batch_fast(texts)]
        assert found == expected, hex(code_points[0])


def test_other_versions_are_left_to_tokenizers(monkeypatch):
    """They may know other letters."""
    made = with_merges([("o", "n")])
    for name in ("TIKTOKEN_VERSION", "TOKENIZERS_VERSION"):
        assert json_encoding(made)
        monkeypatch.setattr(json_encoding_module, name, "9.9")
        assert json_encoding(made) is None
        monkeypatch.undo()
