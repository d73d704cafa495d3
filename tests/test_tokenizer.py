import numpy as np
import pytest
import tiktoken

from tokenizer import get_tokenizer, missing_files

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
    assert pieces == ["", "é", "", "", "日", "", "", "", "🜨", "x", ""]
    half = tokenizer.encode("é")[:1]  # cut by the end: shown as what it is
    assert "".join(tokenizer.decode_stream(half)) == "\ufffd"


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
