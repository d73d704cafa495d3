import base64

import conftest
import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from batches.streaming import StreamingTextDataset
from corpus import planning
from corpus.boundaries import BOUNDARY
from corpus.inputs import Corpus
from corpus.planning import plan
from corpus.sources import Source
from corpus.tokenizer import HuggingFaceTokenizer, copy_vocabulary, get_tokenizer, missing_files

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
def test_gpt2_ids_are_tiktokens_and_text_never_gives_an_end_of_text(gpt2_tokenizer, text):
    ids = gpt2_tokenizer.encode(text)
    assert ids.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert gpt2_tokenizer.eot_token == 50256 not in ids
    assert gpt2_tokenizer.decode(ids) == text
    assert gpt2_tokenizer.vocab_size == 50257


def test_streamed_text_is_cut_between_characters():
    tokenizer = get_tokenizer("bytes")
    pieces = list(tokenizer.decode_stream(tokenizer.encode("é日🜨x")))
    assert pieces == ["", "é", "", "", "日", "", "", "", "🜨", "x"]
    half = tokenizer.encode("xé")[:2]  # cut by the end
    assert "".join(tokenizer.decode_stream(half)) == "x"
    wrong = [0xE6, ord("x"), 300]  # an unfinished character, and an id without bytes
    assert "".join(tokenizer.decode_stream(wrong)) == "\ufffdx\ufffd"


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'gpt5'.*bytes.*gpt2"):
        get_tokenizer("gpt5")


def test_missing_vocabulary_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="6d1cbeee0f20b3d9449abfede4726ed8212e3aee"):
        get_tokenizer("gpt2")
    assert [path.name for _, path, _ in missing_files("gpt2")] == [
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    ]


def test_a_damaged_vocabulary_is_as_good_as_none(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for _, path, _ in missing_files("gpt2"):
        path.write_text("damaged")
    with pytest.raises(FileNotFoundError, match="missing or damaged"):
        get_tokenizer("gpt2")
    assert len(list(tmp_path.iterdir())) == 2  # tiktoken would have deleted them


def test_ids_that_mean_nothing(gpt2_tokenizer):
    assert gpt2_tokenizer.decode([64, 60_000, 65]) == "a\ufffdb"


def test_vocabulary_hash_is_of_ids_and_bytes(gpt2_tokenizer):
    assert gpt2_tokenizer.sha256 != get_tokenizer("bytes").sha256
    assert len(gpt2_tokenizer.sha256) == 64
    assert get_tokenizer("bytes").decode(np.array([104, 105, 256])) == "hi<|endoftext|>"


def test_distilgpt2_is_gpt2(gpt2_tokenizer):
    other = get_tokenizer("distilgpt2")
    assert (other.name, other.sha256) == ("gpt2", gpt2_tokenizer.sha256)
    assert missing_files("distilgpt2") == []


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The folder of vocabularies, empty."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def make_json(path, special=("<|endoftext|>",)):
    """A tokenizer.json: byte-level BPE of a small text."""
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


def test_a_tokenizer_json(kept, tmp_path):
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
        expected = theirs.encode(text.replace("<|", "< |")).ids
        assert ("<|" in text) or ids.tolist() == expected
    batch = ours.encode_documents(HOSTILE)
    ends = np.array([ours.eot_token], np.uint32)
    assert batch.tolist() == [i for t in HOSTILE for p in (ours.encode(t), ends) for i in p]
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


def test_a_tokenizer_json_with_another_pattern_takes_no_long_running_text(
    kept, tmp_path, monkeypatch
):
    """It needs 120 bytes of memory per byte of text."""
    tokenizers = pytest.importorskip("tokenizers")
    made = make_json(tmp_path / "plain.json")
    changes = {
        "prefix": lambda: setattr(
            made, "pre_tokenizer", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        ),
        "none": lambda: setattr(made, "pre_tokenizer", tokenizers.pre_tokenizers.Whitespace()),
        "normal": lambda: setattr(made, "normalizer", tokenizers.normalizers.NFC()),
        "added": lambda: made.add_tokens(["two words"]),
    }
    monkeypatch.setattr(planning, "LONGEST_UNDIVIDED", 5000)
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
        monkeypatch.setattr(planning, "LONGEST_UNDIVIDED", 6000)
        assert len(plan(corpus, tokenizer, 0.9, 1000, 1000)) == 2  # train and val, undivided
        monkeypatch.setattr(planning, "LONGEST_UNDIVIDED", 5000)
    assert len(plan(corpus, get_tokenizer(str(tmp_path / "plain.json")), 0.9, 1000, 1000)) > 4


def test_a_tokenizer_json_is_found_later_by_its_name(kept, tmp_path):
    make_json(tmp_path / "mine.json")
    first = get_tokenizer(str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").unlink()
    assert [path.name for path in kept.iterdir()] == [first.name]
    assert missing_files(first.name) == []
    again = get_tokenizer(first.name)
    assert (again.name, again.sha256) == (first.name, first.sha256)
    assert again.encode("one for").tolist() == first.encode("one for").tolist()
    (kept / first.name).unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        get_tokenizer(first.name)


def test_a_tokenizer_json_whose_end_of_text_may_come_from_text(kept, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = make_json(tmp_path / "mine.json", special=())
    with pytest.raises(ValueError, match="has no end-of-text token"):
        get_tokenizer(str(tmp_path / "mine.json"))
    made.add_tokens([tokenizers.AddedToken("<|endoftext|>")])
    made.save(str(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match=r"<\|endoftext\|> is not a special token"):
        get_tokenizer(str(tmp_path / "mine.json"))
    assert not kept.exists()


def tiktoken_file(ranks) -> bytes:
    rows = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for piece, rank in rows)


BYTES = {bytes([i]): i for i in range(256)}


def test_a_tiktoken_file(kept, tmp_path):
    ranks = BYTES | {b"on": 256, b"one": 257, b" f": 258}
    (tmp_path / "my.tiktoken").write_bytes(tiktoken_file(ranks))
    ours = get_tokenizer(str(tmp_path / "my.tiktoken"))
    assert (ours.vocab_size, ours.eot_token) == (260, 259)
    assert ours.encode("one for").tolist() == [257, 258, ord("o"), ord("r")]
    for text in HOSTILE:
        assert ours.decode(ours.encode(text)) == text
        assert 259 not in ours.encode(text)
    (tmp_path / "my.tiktoken").unlink()
    assert get_tokenizer(ours.name).sha256 == ours.sha256


def test_a_known_tiktoken_file_is_that_encoding(kept, tmp_path, monkeypatch):
    """r50k_base.tiktoken made again from GPT-2's ranks has its sha256."""
    monkeypatch.undo()
    _ = conftest.path_from_environment("TIKTOKEN_CACHE_DIR")
    get_tokenizer("gpt2")
    data = tiktoken_file(tiktoken.get_encoding("gpt2")._mergeable_ranks)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(kept))
    (tmp_path / "renamed.tiktoken").write_bytes(data)
    tokenizer = get_tokenizer(str(tmp_path / "renamed.tiktoken"))
    assert (tokenizer.name, tokenizer.vocab_size) == ("r50k_base", 50257)
    (copy,) = kept.iterdir()
    copy.write_bytes(b"damaged")  # mended by the file
    assert get_tokenizer(str(tmp_path / "renamed.tiktoken")).name == "r50k_base"
    (tmp_path / "renamed.tiktoken").unlink()
    assert get_tokenizer("r50k_base").sha256 == tokenizer.sha256


DAMAGED = {
    "no JSON": ("a.json", b"{", r"a\.json is not a tokenizer\.json"),
    "other JSON": ("a.json", b'{"model": {}}', r"a\.json is not a tokenizer\.json"),
    "no base64": ("a.tiktoken", tiktoken_file(BYTES) + b"!! 256\n", "line 257: not a token"),
    "no rank": ("a.tiktoken", tiktoken_file(BYTES) + b"YWI= x\n", "line 257: not a token"),
    "cut off": ("a.tiktoken", tiktoken_file(BYTES)[:-4], "line 256: not a token"),
    "half of it": ("a.tiktoken", tiktoken_file(BYTES)[:900], "line|all 256 bytes"),
    "empty": ("a.tiktoken", b"", "all 256 bytes"),
    "one rank twice": ("a.tiktoken", tiktoken_file(BYTES | {b"ab": 7}), "two tokens have one rank"),
    "below 0": ("a.tiktoken", tiktoken_file(BYTES | {b"ab": -7}), "a rank is below 0"),
    "beyond all": (
        "a.tiktoken",
        tiktoken_file(BYTES | {b"ab": 1 << 40}),
        "stand for nothing",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_line_and_is_not_kept(kept, tmp_path, case):
    name, data, words = DAMAGED[case]
    if name.endswith("json"):
        pytest.importorskip("tokenizers")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words) as error:
        get_tokenizer(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert not kept.exists()


def test_a_file_that_is_not_there(kept):
    for name in ("nope/x.json", "nope.tiktoken"):
        with pytest.raises(FileNotFoundError, match=name):
            get_tokenizer(name)


def test_vocabularies_are_copied_once_they_are_whole(gpt2_tokenizer, tmp_path, monkeypatch):
    copy_vocabulary("distilgpt2", tmp_path / "copy")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "copy"))
    assert missing_files("gpt2") == []
    next((tmp_path / "copy").iterdir()).write_bytes(b"damaged")
    copy_vocabulary("gpt2", tmp_path / "again")
    assert len(list((tmp_path / "again").iterdir())) == 1
