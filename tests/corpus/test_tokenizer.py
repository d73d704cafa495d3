"""Tokenizers: ids equal those of tiktoken and tokenizers, and damaged vocabularies are refused."""

import base64

import conftest
import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from batches.streaming import StreamingTextDataset
from corpus import planning
from corpus import tokenizer as tokenizer_module
from corpus.boundaries import BOUNDARY
from corpus.inputs import Corpus
from corpus.planning import plan
from corpus.sources import Source
from corpus.tokenizer import HuggingFaceTokenizer, _load, get_tokenizer
from corpus.vocabulary_files import copy_vocabulary, missing_files

HOSTILE = [
    "",
    "<|endoftext|>",
    "a<|endoftext|>b <|fim_prefix|>",
    "héllo wörld 日本語 🜨\u202e",
    "\x00 \r\n \ufeff \t\t\n\n",
    "a" * 10_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_bytes_round_trip(text):
    tokenizer = get_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_gpt2_ids_equal_tiktoken_and_contain_no_end_of_text(gpt2_tokenizer, text):
    ids = gpt2_tokenizer.encode(text)
    assert ids.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert gpt2_tokenizer.eot_token == 50256 not in ids
    assert gpt2_tokenizer.decode(ids) == text
    assert gpt2_tokenizer.vocab_size == 50257


def test_the_encoding_of_gpt2_is_that_of_tiktoken(gpt2_tokenizer):
    found = gpt2_tokenizer.encoding
    expected = tiktoken.get_encoding("gpt2")
    assert found is not expected  # loading it takes three times as long
    for attribute in ("name", "n_vocab", "_pat_str", "_special_tokens", "_mergeable_ranks"):
        assert getattr(found, attribute) == getattr(expected, attribute)


def test_decode_stream_yields_whole_characters():
    tokenizer = get_tokenizer("bytes")
    texts = list(tokenizer.decode_stream(tokenizer.encode("é日🜨x")))
    assert texts == ["", "é", "", "", "日", "", "", "", "🜨", "x"]
    unfinished = tokenizer.encode("xé")[:2]
    assert "".join(tokenizer.decode_stream(unfinished)) == "x"
    invalid = [0xE6, ord("x"), 300]  # an unfinished character, and an id without bytes
    assert "".join(tokenizer.decode_stream(invalid)) == "\ufffdx\ufffd"


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(ValueError, match=r"'gpt5'.*bytes.*gpt2"):
        get_tokenizer("gpt5")


def test_a_missing_vocabulary_is_an_error_that_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="6d1cbeee0f20b3d9449abfede4726ed8212e3aee"):
        get_tokenizer("gpt2")
    assert [path.name for _, path, _ in missing_files("gpt2")] == [
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    ]


def test_a_damaged_vocabulary_counts_as_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for _, path, _ in missing_files("gpt2"):
        path.write_text("damaged")
    with pytest.raises(FileNotFoundError, match="missing or damaged"):
        get_tokenizer("gpt2")
    assert len(list(tmp_path.iterdir())) == 2  # tiktoken would delete them


def test_an_id_outside_the_vocabulary_decodes_to_a_replacement_character(gpt2_tokenizer):
    assert gpt2_tokenizer.decode([64, 60_000, 65]) == "a\ufffdb"


def test_the_sha256_of_a_vocabulary_depends_on_ids_and_token_bytes(gpt2_tokenizer):
    assert gpt2_tokenizer.sha256 != get_tokenizer("bytes").sha256
    assert len(gpt2_tokenizer.sha256) == 64
    assert get_tokenizer("bytes").decode(np.array([104, 105, 256])) == "hi<|endoftext|>"


def test_distilgpt2_has_the_vocabulary_of_gpt2(gpt2_tokenizer):
    other = get_tokenizer("distilgpt2")
    assert (other.name, other.sha256) == ("gpt2", gpt2_tokenizer.sha256)
    assert missing_files("distilgpt2") == []


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder of vocabularies, which does not exist yet."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_json(path, special=("<|endoftext|>",)):
    """Write a tokenizer.json, the byte-level BPE of a small text, and return the tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["one for sorrow, two for mirth " * 9, "endoftext " * 9], trainer)
    made.save(str(path))
    return made


def test_a_tokenizer_json_gives_the_ids_of_tokenizers(cache, tmp_path):
    theirs = make_json(tmp_path / "mine.json")
    ours = get_tokenizer(str(tmp_path / "mine.json"))
    assert ours.vocab_size == theirs.get_vocab_size() > 257
    assert ours.eot_token == theirs.token_to_id("<|endoftext|>")
    text = "two for sorrow, héllo 日🜨\n\x00 "
    assert ours.encode(text).tolist() == theirs.encode(text).ids
    for text in HOSTILE:
        ids = ours.encode(text)
        assert ours.decode(ids) == "".join(ours.decode_stream(ids)) == text
        assert ours.eot_token not in ids  # the literal marker is ordinary text
        if "<|" not in text:
            assert ids.tolist() == theirs.encode(text).ids
    expected = []
    for text in HOSTILE:
        expected += [*ours.encode(text).tolist(), ours.eot_token]
    assert ours.encode_documents(HOSTILE).tolist() == expected
    assert ours.encode("\ud83d\ude00 \ud83d").tolist() == ours.encode("😀 \ufffd").tolist()


TEXTS = st.text(st.sampled_from("one for'sTS 12漢字。、\u3000\xa0\u0301/!\n\r\t  "), max_size=40)


@pytest.fixture(scope="module")
def json_tokenizer(tmp_path_factory):
    """A tokenizer.json with GPT-2's pattern."""
    path = tmp_path_factory.mktemp("json") / "mine.json"
    make_json(path)
    return HuggingFaceTokenizer("mine.json", path)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS | st.text(max_size=40))
def test_a_tokenizer_json_with_gpt2s_pattern_encodes_a_text_in_parts(text, json_tokenizer):
    assert json_tokenizer.divisible
    text = text.encode(errors="ignore").decode()
    whole = json_tokenizer.encode(text).tolist()
    for place in [match.start() for match in BOUNDARY.finditer(text)]:
        parts = [json_tokenizer.encode(part) for part in (text[:place], text[place:])]
        assert np.concatenate(parts).tolist() == whole, (text[:place], text[place:])


@settings(max_examples=200, deadline=None)
@given(text=TEXTS | st.text(max_size=40))
def test_the_bytes_of_the_first_ids_are_those_of_the_tokens(text, json_tokenizer):
    """In a byte-level token each character stands for a byte."""
    text = text.encode(errors="ignore").decode()
    ids = json_tokenizer.encode(text)
    lengths = [len(json_tokenizer.tokenizer.id_to_token(i)) for i in ids]
    assert sum(lengths) == len(text.encode())
    for n in range(1, len(ids)):
        assert json_tokenizer.num_bytes_of_beginning(text, ids[:n]) == sum(lengths[:n])


def make_prefix_json(path):
    """Write a byte-level tokenizer.json that puts a space before each text."""
    tokenizers = pytest.importorskip("tokenizers")
    made = make_json(path)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    made.save(str(path))


def make_byte_fallback_json(path):
    """Write a tokenizer.json like Llama's: a space before the text, bytes for new characters."""
    tokenizers = pytest.importorskip("tokenizers")
    ids = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "▁a": 4}
    ids |= {f"<0x{i:02X}>": 5 + i for i in range(256)}
    model = tokenizers.models.BPE(ids, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.add_special_tokens(["</s>"])
    made.save(str(path))


def make_word_json(path):
    """Write a tokenizer.json like BERT's: lower case, no accents, no white space."""
    tokenizers = pytest.importorskip("tokenizers")
    ids = {"[UNK]": 0, "[SEP]": 1, "e": 2, "##s": 3, "cafe": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[SEP]"])
    made.save(str(path))


KEPT_BYTES = {  # maker of a tokenizer.json, text, bytes of its first 1, 2, ... ids but the last
    "byte-level": (make_json, "x 漢é", [1, 2, 3, 4, 5, 6]),
    "space before the text": (make_prefix_json, "x 漢 é", [0, 1, 2, 3, 4, 5, 6, 7]),
    "byte-fallback": (make_byte_fallback_json, "a 漢aa", [1, 2, 3, 4, 5, 6]),
    "normalizing": (make_word_json, "Cafés  É xyz", [5, 6, 10]),
}


@pytest.mark.parametrize("case", KEPT_BYTES)
def test_max_length_counts_the_bytes_of_the_text_that_is_kept(cache, tmp_path, case):
    make, text, expected = KEPT_BYTES[case]
    make(tmp_path / "mine.json")
    tokenizer = get_tokenizer(str(tmp_path / "mine.json"))
    ids = tokenizer.encode(text)
    assert len(ids) == len(expected) + 1
    firsts = [ids[:n] for n in range(1, len(ids))]
    assert [tokenizer.num_bytes_of_beginning(text, first) for first in firsts] == expected
    metadata = conftest.make_corpus(
        tmp_path / "c",
        [text, "", text * 9] * 10,
        documents=True,
        tokenizer=str(tmp_path / "mine.json"),
        max_length=2,
    )
    assert metadata["dropped"] == 10 * (len(ids) + len(tokenizer.encode(text * 9)) - 4)
    assert sum(split["bytes"] for split in metadata["splits"].values()) == 20 * expected[1]


def test_a_tokenizer_json_takes_a_long_text_in_parts(json_tokenizer, monkeypatch):
    monkeypatch.setattr(json_tokenizer, "faster", None)
    text = "one for sorrow, two for mirth\n漢字。 " * 300
    whole = json_tokenizer.encode(text).tolist()
    documents = json_tokenizer.encode_documents([text, "", "one", text]).tolist()
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_AT_ONCE", 100)
    encode = json_tokenizer._encode
    lengths = []

    def encode_and_record(texts):
        lengths.append(sum(map(len, texts)))
        return encode(texts)

    monkeypatch.setattr(json_tokenizer, "_encode", encode_and_record)
    assert json_tokenizer.encode(text).tolist() == whole
    assert json_tokenizer.encode_documents([text, "", "one", text]).tolist() == documents
    assert max(lengths) < 150


def test_a_tokenizer_json_of_another_structure_refuses_a_running_text_longer_than_a_call(
    cache, tmp_path, monkeypatch
):
    """The tokenizer needs 120 bytes of memory per character of text."""
    tokenizers = pytest.importorskip("tokenizers")
    made = make_json(tmp_path / "plain.json")
    changes = {
        "prefix": lambda: setattr(
            made, "pre_tokenizer", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        ),
        "none": lambda: setattr(made, "pre_tokenizer", tokenizers.pre_tokenizers.Whitespace()),
        "normal": lambda: setattr(made, "normalizer", tokenizers.normalizers.NFKC()),
        "added": lambda: made.add_tokens(["two words"]),
    }
    monkeypatch.setattr(planning, "CHARACTERS_AT_ONCE", 5000)
    (tmp_path / "my.txt").write_text("one for sorrow\n" * 400)
    source = Source(str(tmp_path / "my.txt"))
    corpus = Corpus("my", {}, [source])
    for name, change in changes.items():
        made = tokenizers.Tokenizer.from_file(str(tmp_path / "plain.json"))
        change()
        made.save(str(tmp_path / f"{name}.json"))
        tokenizer = get_tokenizer(str(tmp_path / f"{name}.json"))
        assert not tokenizer.divisible, name
        with pytest.raises(ValueError, match=r"my\.txt is one running text of 6,000 char.*--docum"):
            plan(corpus, tokenizer, 0.9, 1 << 20, 1 << 20)
        with pytest.raises(ValueError, match=r"my\.txt is one running text of 6,000 characters"):
            StreamingTextDataset(source.path, tokenizer, 8)
        monkeypatch.setattr(planning, "CHARACTERS_AT_ONCE", 6000)
        assert len(plan(corpus, tokenizer, 0.9, 1000, 1000)) == 2  # train and val, undivided
        monkeypatch.setattr(planning, "CHARACTERS_AT_ONCE", 5000)
    assert len(plan(corpus, get_tokenizer(str(tmp_path / "plain.json")), 0.9, 1000, 1000)) > 4


def test_a_tokenizer_json_is_kept_under_its_name(cache, tmp_path):
    make_json(tmp_path / "mine.json")
    first = get_tokenizer(str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").unlink()
    assert [path.name for path in cache.iterdir()] == [first.name]
    assert missing_files(first.name) == []
    again = get_tokenizer(first.name)
    assert (again.name, again.sha256) == (first.name, first.sha256)
    assert again.encode("one for").tolist() == first.encode("one for").tolist()
    (cache / first.name).unlink()
    _load.cache_clear()  # another process has an empty cache
    with pytest.raises(FileNotFoundError, match=first.name):
        get_tokenizer(first.name)


def test_a_tokenizer_json_without_a_special_end_of_text_is_refused(cache, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = make_json(tmp_path / "mine.json", special=())
    with pytest.raises(ValueError, match="has no end-of-text token"):
        get_tokenizer(str(tmp_path / "mine.json"))
    made.add_tokens([tokenizers.AddedToken("<|endoftext|>")])
    made.save(str(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match=r"<\|endoftext\|> is not a special token"):
        get_tokenizer(str(tmp_path / "mine.json"))
    assert not cache.exists()


def tiktoken_bytes(ranks) -> bytes:
    """Return the content of a .tiktoken file; ranks: maps token bytes to an id."""
    rows = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in rows)


BYTE_RANKS = {bytes([i]): i for i in range(256)}


def test_a_tiktoken_file_gives_its_ids(cache, tmp_path):
    ranks = BYTE_RANKS | {b"on": 256, b"one": 257, b" f": 258}
    (tmp_path / "my.tiktoken").write_bytes(tiktoken_bytes(ranks))
    ours = get_tokenizer(str(tmp_path / "my.tiktoken"))
    assert (ours.vocab_size, ours.eot_token) == (260, 259)
    assert ours.encode("one for").tolist() == [257, 258, ord("o"), ord("r")]
    for text in HOSTILE:
        assert ours.decode(ours.encode(text)) == text
        assert 259 not in ours.encode(text)
    (tmp_path / "my.tiktoken").unlink()
    assert get_tokenizer(ours.name).sha256 == ours.sha256


def test_a_known_tiktoken_file_is_its_encoding_under_any_name(cache, tmp_path, monkeypatch):
    """A file of GPT-2's ranks has the sha256 of r50k_base.tiktoken."""
    monkeypatch.undo()
    conftest.path_from_environment("TIKTOKEN_CACHE_DIR")
    get_tokenizer("gpt2")
    data = tiktoken_bytes(tiktoken.get_encoding("gpt2")._mergeable_ranks)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    (tmp_path / "renamed.tiktoken").write_bytes(data)
    tokenizer = get_tokenizer(str(tmp_path / "renamed.tiktoken"))
    assert (tokenizer.name, tokenizer.vocab_size) == ("r50k_base", 50257)
    (copy,) = cache.iterdir()
    copy.write_bytes(b"damaged")  # the file repairs the copy
    assert get_tokenizer(str(tmp_path / "renamed.tiktoken")).name == "r50k_base"
    (tmp_path / "renamed.tiktoken").unlink()
    assert get_tokenizer("r50k_base").sha256 == tokenizer.sha256


DAMAGED_FILES = {  # case -> name, content, words of the error
    "not JSON": ("a.json", b"{", r"a\.json is not a tokenizer\.json"),
    "other JSON": ("a.json", b'{"model": {}}', r"a\.json is not a tokenizer\.json"),
    "not base64": (
        "a.tiktoken",
        tiktoken_bytes(BYTE_RANKS) + b"!! 256\n",
        "line 257: not a token",
    ),
    "not a rank": (
        "a.tiktoken",
        tiktoken_bytes(BYTE_RANKS) + b"YWI= x\n",
        "line 257: not a token",
    ),
    "truncated": ("a.tiktoken", tiktoken_bytes(BYTE_RANKS)[:-4], "line 256: not a token"),
    "half of the tokens": ("a.tiktoken", tiktoken_bytes(BYTE_RANKS)[:900], "line|all 256 bytes"),
    "empty": ("a.tiktoken", b"", "all 256 bytes"),
    "two equal ranks": (
        "a.tiktoken",
        tiktoken_bytes(BYTE_RANKS | {b"ab": 7}),
        "two tokens have one rank",
    ),
    "a negative rank": (
        "a.tiktoken",
        tiktoken_bytes(BYTE_RANKS | {b"ab": -7}),
        "a rank is below 0",
    ),
    "a huge rank": (
        "a.tiktoken",
        tiktoken_bytes(BYTE_RANKS | {b"ab": 1 << 40}),
        "stand for nothing",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_FILES)
def test_a_damaged_file_is_a_one_line_error_and_is_not_kept(cache, tmp_path, case):
    name, data, words = DAMAGED_FILES[case]
    if name.endswith("json"):
        pytest.importorskip("tokenizers")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words) as error:
        get_tokenizer(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert not cache.exists()


def test_a_missing_file_is_an_error_that_names_it(cache):
    for name in ("nope/x.json", "nope.tiktoken"):
        with pytest.raises(FileNotFoundError, match=name):
            get_tokenizer(name)


def test_a_damaged_vocabulary_is_not_copied(gpt2_tokenizer, tmp_path, monkeypatch):
    copy_vocabulary("distilgpt2", tmp_path / "copy")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "copy"))
    assert missing_files("gpt2") == []
    next((tmp_path / "copy").iterdir()).write_bytes(b"damaged")
    copy_vocabulary("gpt2", tmp_path / "again")
    assert len(list((tmp_path / "again").iterdir())) == 1
