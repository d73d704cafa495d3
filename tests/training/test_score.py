"""sample.py --score: the loss of a text, its colors in a terminal, and its page."""

import html.parser
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_corpus, run_script

import sample
from corpus import pipeline
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.sources import Source
from corpus.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from training import score_page
from training.json_lines import read_lines
from training.score_page import Span, html_fragment, html_page, spans_of, terminal_text
from training.scoring import Alternatives, TokenScores

WORDS = [
    "one", "for", "sorrow,", "two", "for", "mirth,", "二つ", "three", "for", "a", "funeral", "and",
    "four", "for", "birth",
]  # fmt: skip
BYTES = get_tokenizer("bytes")
HOSTILE = "</script><script>alert(1)</script> \x1b[31m\x00\x9b\u202e\r & \"x\" 'y'"


def sentence(i: int) -> str:
    """Return a few words, others for each number."""
    return " ".join(WORDS[(i * i + k * i + k) % len(WORDS)] for k in range(3 + i % 9))


@pytest.fixture
def score(monkeypatch, capsys):
    """A function score(*flags, typed="") that returns the output of `python sample.py FLAGS`.

    score.loss is the loss in nats per token, with all digits.
    """

    def evaluate(*args):
        score.loss = original(*args)
        return score.loss

    def score(*flags, typed=""):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode(errors="surrogateescape")))
        )
        capsys.readouterr()
        sample.main()
        return capsys.readouterr().out

    original = sample.evaluate
    monkeypatch.setattr(sample, "evaluate", evaluate)
    return score


def prepare_blank_line_documents(folder: Path, texts: list[str], tokenizer: str) -> None:
    """Prepare a corpus from a .txt file whose documents end at blank lines."""
    folder.mkdir(parents=True)
    path = folder.parent / "source.txt"
    path.write_bytes("\n\n".join(texts).encode())
    corpus = Corpus(folder.name, {"made": "by a test"}, [Source(str(path), "text", "blank-line")])
    with open_engine("processes", workers=1) as run_tasks:
        pipeline.prepare(corpus, get_tokenizer(tokenizer), folder, run_tasks)


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@pytest.mark.parametrize("form", ["running text", "jsonl", "blank lines", "unmasked"])
def test_the_validation_text_has_the_loss_of_the_validation(
    train, tmp_path, score, request, tokenizer, form
):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_tokenizer")
    texts = [sentence(i) for i in range(300)]
    folder = tmp_path / "data" / "mine"
    if form == "running text":
        make_corpus(folder, ["\n".join(texts)], tokenizer=tokenizer)
    elif form == "blank lines":
        prepare_blank_line_documents(folder, texts, tokenizer)
    else:
        make_corpus(folder, texts, documents=True, tokenizer=tokenizer)
    flags = {"document_mask": "false"} if form == "unmasked" else {}
    run = train(corpus="mine", max_steps=8, sequence_length=18, **flags)
    (validation,) = [line for line in read_lines(run / "metrics.jsonl") if "val_loss" in line]

    metadata = json.loads((folder / "metadata.json").read_text())
    ids = np.fromfile(folder / "val.bin", metadata["dtype"])
    assert (len(ids) - 1) % 18  # the last window is an incomplete one
    ends = np.flatnonzero(ids == metadata["eot_token"]) + 1
    decode = get_tokenizer(tokenizer).decode
    if form == "running text":
        (tmp_path / "val.txt").write_text(decode(ids))
    else:
        documents = [decode(part[:-1]) for part in np.split(ids, ends)[:-1]]
        if form == "blank lines":
            (tmp_path / "val.txt").write_text("\n\n".join(documents))
        else:
            rows = [json.dumps({"text": text}) + "\n" for text in documents]
            (tmp_path / "val.jsonl").write_text("".join(rows))
    path = next(tmp_path.glob("val.*"))
    output = score("--score", path)
    assert score.loss == pytest.approx(validation["val_loss"], rel=1e-6)
    last_line = output.splitlines()[-1]
    val = metadata["splits"]["val"]
    assert last_line.endswith(
        f": {val['tokens']:,} tokens, {val['bytes']:,} bytes, {validation['val_loss']:.4f} nats "
        f"per token, {validation['val_bpb']:.4f} bits per byte"
    )

    # the documents add up to the whole
    lines = re.findall(r"document .*: (.*) tokens, (.*) bytes(?:, (.*) nats per t.*)?", output)
    assert len(lines) == val["documents"] * metadata["eot_per_document"]
    if lines:
        num_tokens = np.array([int(line[0]) for line in lines])
        assert sum(int(line[1]) for line in lines) == val["bytes"]
        assert num_tokens.tolist() == np.diff(ends, prepend=0).tolist()
        num_tokens[0] -= 1  # nothing predicts the first token
        mean = np.average([float(line[2]) for line in lines], weights=num_tokens)
        assert mean == pytest.approx(score.loss, abs=1e-4)


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """The folder of a small model in the Hugging Face layout, by bytes, with 24 positions."""
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, n_positions=24, n_layer=1, n_head=1, n_embd=8))
    torch.nn.init.normal_(model.transformer.wte.weight)  # far from uniform probabilities
    model.save_pretrained(tmp_path / "weights", get_tokenizer("bytes"))
    return tmp_path / "weights"


@torch.no_grad()
def log_probs(model: GPT, ids: list[int]) -> torch.Tensor:
    """Return the (n - 1, vocab_size) log-probabilities in the place of each token but the first."""
    T = model.config.n_positions
    rows = []
    for start in range(0, len(ids) - 1, T):
        start = min(start, max(0, len(ids) - 1 - T))  # the last window overlaps the one before
        logits, _ = model(torch.tensor([ids[start : start + T]]))
        rows.append((start, logits[0].log_softmax(-1)))
    result = torch.empty(len(ids), model.config.vocab_size)
    for start, row in reversed(rows):
        result[start : start + len(row)] = row
    return result[:-1]


def test_weights_score_a_text_in_windows_of_all_positions(weights, score, tmp_path):
    text = sentence(8) + "\n" + sentence(13)
    model = GPT.from_pretrained(weights).eval()
    ids = [*text.encode()]
    expected = log_probs(model, ids)
    loss = -expected.gather(1, torch.tensor(ids)[1:, None]).mean().item()
    (tmp_path / "a.txt").write_text(text)
    output = score("--score", "a.txt", "--init_from", weights)
    assert score.loss == pytest.approx(loss, rel=1e-5)
    bits = loss / math.log(2)
    assert output.endswith(f"{loss:.4f} nats per token, {bits:.4f} bits per byte\n")
    assert score("--score", "-", "--init_from", weights, typed=text) == output.replace(
        "a.txt", "standard input"
    )
    short = [*b"ab"]  # shorter than a window
    score("--score", "-", "--init_from", weights, typed="ab")
    assert score.loss == pytest.approx(-log_probs(model, short)[0, short[1]].item(), rel=1e-5)


def tokens_of_page(path: Path) -> list[list]:
    """Return [label, probability, rank, alternatives] of each token of a page."""
    spans = elements(path.read_text())
    return [token for _, attrs in spans for token in json.loads(attrs.get("data-tokens", "[]"))]


def elements(text: str) -> list[tuple[str, dict]]:
    """Return (tag, attributes) of each element of an HTML text."""
    found = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append((tag, dict(attrs)))
    parser.feed(text)
    return found


def number(text: str) -> float:
    """Return the probability that a page shows as "41.2%" or "1 in 18,900,000"."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return 1 / float(text.removeprefix("1 in ").replace(",", ""))


def test_the_page_shows_probability_rank_and_alternatives(weights, score, tmp_path):
    text = sentence(8)
    expected = log_probs(GPT.from_pretrained(weights).eval(), [*text.encode()]).exp()
    output = score("--score", "-", "--show", "--init_from", weights, typed=text)
    assert output.startswith(f"{text}\n") and "\x1b" not in output  # not a terminal
    assert "wrote score.html" in output
    tokens = tokens_of_page(tmp_path / "score.html")
    assert len(tokens) == len(text.encode()) - 1
    labels = get_tokenizer("bytes").token_bytes
    for (name, prob, rank, alternatives), row, byte in zip(tokens, expected, text.encode()[1:]):
        assert name == score_page.label(labels[byte])
        assert number(prob) == pytest.approx(row[byte].item(), rel=0.01)
        ordered = row.sort(descending=True)
        assert ordered.indices[int(rank) - 1] == byte
        found = [number(text) for _, text in alternatives]
        assert found == pytest.approx(ordered.values[:5].tolist(), rel=0.01)
        names = [score_page.label(labels[i]) for i in ordered.indices[:5].tolist()]
        assert [text for text, _ in alternatives] == names


def test_a_long_text_is_scored_whole_and_shown_in_part(weights, score, tmp_path):
    text = "abcdefghij" * 20
    flags = ["--init_from", weights, "--show", "--show_tokens"]
    output = score("--score", "-", *flags, 30, typed=text)
    assert output.startswith(text[:30] + "\n")
    assert "standard input: 200 tokens" in output and "shown: the first 30 tokens" in output
    assert len(tokens_of_page(tmp_path / "score.html")) == 29
    assert score("--score", "-", *flags, 1, typed=text).startswith("a\n")
    assert tokens_of_page(tmp_path / "score.html") == []


def fake_scores(ids: list[int], probs: list[float]) -> TokenScores:
    """Return scores of tokens whose alternatives are all id 33."""
    n = len(ids)
    token_probs = np.array(probs)
    alternatives = Alternatives(
        token_probs, np.ones(n, int), np.full((n, 5), 33), np.full((n, 5), 0.1)
    )
    return TokenScores(np.array(ids), -np.log(token_probs), alternatives)


def test_spans_are_whole_characters():
    ids = [*"a二b".encode(), 256, 0xE4]  # the last character is incomplete
    spans = spans_of(ids[0], fake_scores(ids[1:], [0.9, 0.3, 0.5, 0.9, 0.05, 0.5]), BYTES)
    assert [span.text for span in spans] == ["a", "二", "b", "<|endoftext|>", "\ufffd"]
    assert [len(span.tokens) for span in spans] == [0, 3, 1, 1, 1]
    assert [span.level for span in spans] == [0, 1, 0, 2, 0]
    assert [token.label for token in spans[1].tokens] == ["\\xe4", "\\xba", "\\x8c"]
    assert [span.ends_document for span in spans] == [False, False, False, True, False]


def hostile_spans() -> list[Span]:
    ids = [*HOSTILE.encode()]
    return spans_of(ids[0], fake_scores(ids[1:], [0.0001] * (len(ids) - 1)), BYTES)


def test_control_characters_do_not_reach_the_terminal():
    plain = terminal_text(hostile_spans(), has_colors=False)
    assert plain == "</script><script>alert(1)</script> ␛[31m␀\ufffd\ufffd␍ & \"x\" 'y'"
    colored = terminal_text(hostile_spans(), has_colors=True)
    assert re.sub(r"\x1b\[(0|48;5;\d+|38;5;\d+)m", "", colored) == plain
    assert "\x1b" in colored and not re.search(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]", colored)


def test_the_page_runs_no_script_of_the_text_and_loads_nothing():
    page = html_page(f"title {HOSTILE}", [HOSTILE], hostile_spans())
    found = elements(page)
    assert [tag for tag, _ in found].count("script") == 1
    attributes = {name for _, attrs in found for name in attrs}
    assert not attributes & {"src", "href", "onclick", "onload", "onerror"}
    assert not re.search(r"url\(|@import|https?:|[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    texts = []
    parser = html.parser.HTMLParser()
    parser.handle_data = texts.append
    parser.feed(html_fragment(hostile_spans()))
    assert "".join(texts) == terminal_text(hostile_spans(), has_colors=False)


def test_the_colors_of_the_page_have_contrast():
    """4.5 to 1 at least, as WCAG 2 asks of text, in light and in dark."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    page = html_page("title", [], [])
    pairs = re.findall(r"background: (#\w{6}); color: (#\w{6});", page)
    assert len(pairs) == 12  # four levels, the tip and the page, twice
    for pair in pairs:
        darker, lighter = sorted(map(luminance, pair))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, pair


@pytest.mark.parametrize(
    "environment, is_terminal, expected",
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm"}, False, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colors_are_for_terminals_that_may_have_them(
    monkeypatch, environment, is_terminal, expected
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert score_page.has_terminal_colors() == expected


def test_a_page_replaces_pages_only(weights, score, tmp_path):
    flags = ["--score", "-", "--show", "--init_from", weights]
    for text in ("ab", "cd"):  # the second page replaces the first
        score(*flags, typed=text)
        assert tokens_of_page(tmp_path / "score.html")[0][0] == text[1]
    for page in ("mine.html", "weights"):
        (tmp_path / "mine.html").write_text("my own")
        with pytest.raises(FileExistsError, match=f"{page} exists.*choose another --page"):
            score(*flags, "--page", page, typed="ab")
    assert (tmp_path / "mine.html").read_text() == "my own"
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        score(*flags, "--page", "nowhere/score.html", typed="ab")


def test_the_page_of_a_run_lies_in_its_folder(train, score, tmp_path):
    run = train(max_steps=8)
    for name in (run, run / "last.pt"):
        output = score("--score", "-", "--show", "--run", name, typed="one for sorrow")
        assert f"wrote {run / 'score.html'}" in output


WRONG = {  # case -> flags, content of the file, words of the error
    "missing": (["nowhere.txt"], None, "nowhere.txt: no such file"),
    "empty": (["a.txt"], b"", "a.txt has no text: there is nothing to score"),
    "one token": (["a.txt"], b"a", "a.txt has one token"),
    "latin1": (["a.txt"], b"ab\ncaf\xe9", "a.txt, line 2: not UTF-8"),
    "binary": (["a.bin"], b"\x7fELF\x01\x01\x00", "a.bin: .* a program, not text"),
    "other bytes": (["a.bin"], b"ab\xff\xfe\x00\x01" * 9, "binary data, not text"),
    "documents": (["a.jsonl"], b'{"text": "one"}', "trained on a running text, which has none"),
    "standard input": (["-"], None, "^standard input, line 1: not UTF-8"),
    "temperature": (["a.txt", "--temperature", "1"], b"ab", "--temperature has no effect beside"),
    "prompt": (["a.txt", "--prompt", "b"], b"ab", "--prompt has no effect beside --score"),
    "export": (["a.txt", "--export", "b"], b"ab", "--export has no effect beside --score"),
    "tokens": (["a.txt", "--show_tokens", "9"], b"ab", "no effect without --show"),
    "page": (["a.txt", "--page", "b.html"], b"ab", "no effect without --show"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run on a running text."""
    folder = tmp_path_factory.mktemp("trained")
    make_corpus(folder / "data" / "rhyme", ["one for sorrow\n" * 99])
    flags = "--n_layer 1 --n_head 1 --n_embd 8 --sequence_length 8 --max_steps 2 --device cpu"
    result = run_script("train_gpt2.py", *flags.split(), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_wrong_texts_and_flags_are_an_error(trained, monkeypatch, score, case):
    flags, content, words = WRONG[case]
    monkeypatch.chdir(trained)
    if content is not None:
        Path(flags[0]).write_bytes(content)
    typed = "ab\udcff" if case == "standard input" else ""
    with pytest.raises((ValueError, OSError), match=words):
        score("--score", *flags, typed=typed)


def test_show_needs_score(trained, monkeypatch, score):
    monkeypatch.chdir(trained)
    with pytest.raises(ValueError, match="--show has no effect without --score"):
        score("--show")


def test_a_binary_file_is_a_one_line_error(trained):
    (trained / "noise").write_bytes(bytes(range(256)))
    result = run_script("sample.py", "--score", "noise", cwd=trained)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: noise, line 2: not UTF-8")


def test_a_text_that_the_vocabulary_cannot_encode(train, tmp_path, score, gpt2_tokenizer):
    make_corpus(tmp_path / "data" / "words", [sentence(i) for i in range(200)], tokenizer="gpt2")
    train(corpus="words", max_steps=8)
    (tmp_path / "space.txt").write_text("one\n" + " " * 1_000_001 + "two")
    with pytest.raises(ValueError, match=r"space\.txt, line .*: gpt2 cannot encode a run of"):
        score("--score", "space.txt")
