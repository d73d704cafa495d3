"""Scored tokens to look at: colored text for a terminal, and an HTML page.

    spans = spans_of(first_id, scores, tokenizer)
    print(terminal_text(spans, has_colors=True))
    fragment = html_fragment(spans)     # needs STYLE and SCRIPT once in its page

A token's color is the level of its probability (LEVELS). Control characters of the text never reach
the terminal or the page: a visible character stands in their place.
"""

import html
import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from corpus.tokenizer import Tokenizer
from corpus.vocabulary import vocabulary_of
from training.scoring import TokenScores

LEVELS = (0.5, 0.1, 0.01, 0.001)  # probabilities; below each of them, a token has another color
LEVEL_NAMES = ("50% or more", "10% or more", "1% or more", "0.1% or more", "less")
TERMINAL_COLORS = (None, 230, 222, 215, 210)  # background of each level, of the 256 colors
GENERATOR = "sample.py --score"  # in every page of ours, which may be replaced


@dataclass(frozen=True)
class ScoredToken:
    """A token, and what the model expected in its place.

    Attributes:
        label: The token in visible characters.
        prob: Its probability.
        rank: Its rank among all ids, from 1 for the most likely one.
        alternatives: Label and probability of the most likely ids, most likely first.
    """

    label: str
    prob: float
    rank: int
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Span:
    """Whole characters of a text, and the tokens that stand for them.

    Attributes:
        text: The characters; a control character is replaced by a visible one.
        tokens: The tokens; none for the first token of the text, which nothing predicts.
        ends_document: Whether this is an end-of-text token.
    """

    text: str
    tokens: tuple[ScoredToken, ...]
    ends_document: bool = False

    @property
    def level(self) -> int:
        """Number of the color, from 0 for expected characters."""
        prob = math.prod(token.prob for token in self.tokens)
        return sum(prob < limit for limit in LEVELS)


def spans_of(first_id: int, scores: TokenScores, tokenizer: Tokenizer) -> list[Span]:
    """Return the spans of a text.

    A token that ends inside a character is in one span with the tokens that complete it.

    Args:
        first_id: The first token, which has no score.
        scores: Scores of the tokens after it, each with alternatives.
        tokenizer: The tokenizer of the model.
    """
    spans = []
    vocabulary = vocabulary_of(tokenizer)
    labels: dict[int, str] = {}

    def label_of(token: int) -> str:
        if token not in labels:
            labels[token] = label(vocabulary.get(token, b""))
        return labels[token]

    ids = [first_id, *scores.ids.tolist()]
    tokens: list[ScoredToken] = []  # since the last span
    for i, text in enumerate(tokenizer.decode_stream(ids)):
        if i > 0:
            alternatives = scores.alternatives
            expected = zip(alternatives.ids[i - 1].tolist(), alternatives.probs[i - 1].tolist())
            tokens.append(
                ScoredToken(
                    label_of(ids[i]),
                    float(alternatives.token_probs[i - 1]),
                    int(alternatives.ranks[i - 1]),
                    tuple((label_of(token), prob) for token, prob in expected),
                )
            )
        is_last = i == len(ids) - 1
        if text or is_last:  # the last token may end inside a character
            text = visible(text) or "\ufffd"
            is_end = ids[i] == tokenizer.eot_token
            spans.append(Span(text, tuple(tokens), is_end))
            tokens = []
    return spans


def visible(text: str) -> str:
    """Return a text in which visible characters stand for control characters.

    Line feeds and tabs stay. Control characters without a picture, and those that change the
    direction of the text, become U+FFFD.

    Example: an escape character and "[1m" become "␛[1m".
    """
    return "".join(map(_visible_character, text))


def visible_html(value: object) -> str:
    """Return a value as HTML text in visible characters."""
    return html.escape(visible(str(value)))


def _visible_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 32:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    if code == 127:
        return "\u2421"
    is_control = unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs")
    is_bidirectional = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return "\ufffd" if is_control or is_bidirectional else character


def label(token_bytes: bytes) -> str:
    r"""Return a token as one visible word.

    Example: b" the" -> "␣the", b"\n" -> "␊"; b"\xe4", a part of a character, -> r"\xe4".
    """
    try:
        text = visible(token_bytes.decode())
    except UnicodeDecodeError:
        return "".join(chr(byte) if 32 < byte < 127 else f"\\x{byte:02x}" for byte in token_bytes)
    return text.replace(" ", "␣").replace("\n", "␊").replace("\t", "␉") or "(nothing)"


def percent(prob: float) -> str:
    """Return a probability as text: 0.412 -> "41.2%", 0.00001 -> "1 in 100,000"."""
    if prob >= 0.0001:
        return f"{100 * prob:.3g}%"
    return f"1 in {float(f'{1 / prob:.3g}'):,.0f}" if prob > 1e-15 else "almost 0"


def has_terminal_colors() -> bool:
    """Return whether standard output is a terminal that may get colors (https://no-color.org)."""
    may_color = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return may_color and sys.stdout.isatty()


def terminal_text(spans: Iterable[Span], has_colors: bool) -> str:
    """Return the text for a terminal, with a background color for each span.

    Args:
        spans: From spans_of.
        has_colors: Whether to write color codes; False: the text alone.
    """
    parts = []
    for span in spans:
        color = TERMINAL_COLORS[span.level]
        if not has_colors or color is None:
            parts.append(span.text)
        else:
            start = f"\x1b[48;5;{color}m\x1b[38;5;16m"  # on a dark and on a light terminal
            lines = span.text.split("\n")
            lines[:-1] = [f"{line}↵" for line in lines[:-1]]  # a line break has no background
            parts.append("\n".join(f"{start}{line}\x1b[0m" if line else "" for line in lines))
        if span.ends_document:
            parts.append("\n")
    return "".join(parts)


def terminal_legend() -> str:
    """Return a line that explains the colors of terminal_text."""
    parts = []
    for name, color in zip(LEVEL_NAMES, TERMINAL_COLORS):
        start = "" if color is None else f"\x1b[48;5;{color}m\x1b[38;5;16m"
        parts.append(f"{start} {name} \x1b[0m" if start else f" {name} ")
    return f"probability of a token:{' '.join(parts)}"


STYLE = """
.scored { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: 1rem/1.7 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.scored span, .score-legend span { border-radius: 3px; }
.scored b::before { content: "↵"; font-weight: normal; opacity: .6; }
.scored [data-tokens] { cursor: pointer; }
.scored .eot { font-size: .8em; border: 1px dashed; padding: 0 .3em; }
.scored .on { outline: 2px solid currentColor; outline-offset: 1px; }
.score-legend { line-height: 2; }
.score-legend span { display: inline-block; line-height: 1.5; padding: 0 .4em; }
#score-tip { position: absolute; z-index: 9; box-sizing: border-box; padding: .6em .8em;
  max-width: min(20rem, calc(100vw - 1rem)); border: 1px solid #8888; border-radius: 6px;
  box-shadow: 0 2px 12px #0004; font: .875rem/1.4 system-ui, sans-serif;
  background: #ffffff; color: #1b1b1b; }
#score-tip[hidden] { display: none; }
#score-tip table { border-collapse: collapse; margin-top: .3em; width: 100%; }
#score-tip td { padding: 0; overflow-wrap: anywhere; }
#score-tip td + td { padding-left: 1.2em; text-align: right; white-space: nowrap; }
#score-tip code { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
#score-tip .own { font-weight: bold; }
.l1 { background: #fff3b0; color: #1b1b1b; }
.l2 { background: #ffd98a; color: #1b1b1b; }
.l3 { background: #ffb37a; color: #1b1b1b; }
.l4 { background: #ff9494; color: #1b1b1b; }
@media (prefers-color-scheme: dark) {
  #score-tip { background: #24272c; color: #e8e8e8; }
  .l1 { background: #47431c; color: #f2f2f2; }
  .l2 { background: #67480f; color: #f2f2f2; }
  .l3 { background: #873a0c; color: #f2f2f2; }
  .l4 { background: #a3203a; color: #f2f2f2; }
}
"""

SCRIPT = """
(() => {
  const tip = document.createElement("div");
  tip.id = "score-tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  document.body.append(tip);
  let current = null;

  const add = (parent, name, text, className) => {
    const element = document.createElement(name);
    element.textContent = text;
    if (className) element.className = className;
    parent.append(element);
    return element;
  };
  const hide = () => {
    if (current) current.classList.remove("on");
    current = null;
    tip.hidden = true;
  };
  const show = (span) => {
    hide();
    current = span;
    span.classList.add("on");
    tip.replaceChildren();
    for (const [label, prob, rank, alternatives] of JSON.parse(span.dataset.tokens)) {
      const line = add(tip, "div", "");
      add(line, "code", label, "own");
      line.append(` ${prob}, rank ${rank}`);
      const table = add(tip, "table", "");
      for (const [other, otherProb] of alternatives) {
        const row = add(table, "tr", "", other === label ? "own" : "");
        add(add(row, "td", ""), "code", other);
        add(row, "td", otherProb);
      }
    }
    tip.hidden = false;
    const box = span.getClientRects()[0];
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(box.left, width - tip.offsetWidth - 8));
    const below = box.bottom + 8;
    const fits = below + tip.offsetHeight < window.innerHeight || box.top < tip.offsetHeight + 8;
    const top = fits ? below : box.top - tip.offsetHeight - 8;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${top + window.scrollY}px`;
  };
  const tokenAt = (event) => event.target.closest?.(".scored [data-tokens]");

  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    const span = tokenAt(event);
    if (span) show(span); else hide();
  });
  document.addEventListener("click", (event) => {
    const span = tokenAt(event);
    if (span) show(span); else hide();
  });
  document.addEventListener("keydown", (event) => {
    const text = event.target.closest?.(".scored");
    if (event.key === "Escape") hide();
    if (!text || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const spans = [...text.querySelectorAll("[data-tokens]")];
    const step = event.key === "ArrowRight" ? 1 : -1;
    const next = spans[spans.indexOf(current) + step] ?? spans[0];
    show(next);
    next.scrollIntoView({ block: "nearest" });
    event.preventDefault();
  });
})();
"""


def html_fragment(spans: Iterable[Span]) -> str:
    """Return the text as an HTML element, whose page has STYLE and SCRIPT once.

    Args:
        spans: From spans_of.
    """
    parts = ['<div class="scored" tabindex="0" role="group" aria-label="scored text">']
    for span in spans:
        # a mark before each line break, because a line break alone cannot be pointed at
        text = html.escape(span.text).replace("\n", "<b></b>\n")
        if not span.tokens:
            parts.append(f"<span>{text}</span>")
        else:
            tokens = [
                (
                    token.label,
                    percent(token.prob),
                    f"{token.rank:,}",
                    [(other, percent(prob)) for other, prob in token.alternatives],
                )
                for token in span.tokens
            ]
            data = html.escape(json.dumps(tokens, ensure_ascii=False, separators=(",", ":")))
            eot = " eot" if span.ends_document else ""
            parts.append(f'<span class="l{span.level}{eot}" data-tokens="{data}">{text}</span>')
        if span.ends_document:
            parts.append("\n")
    return "".join([*parts, "</div>"])


def html_legend() -> str:
    """Return an HTML element that explains the colors of html_fragment."""
    parts = [f'<span class="l{i}">{name}</span>' for i, name in enumerate(LEVEL_NAMES)]
    return f'<p class="score-legend">Probability of a token: {" ".join(parts)}</p>'


def check_page_path(path: Path) -> None:
    """Check that a page can be written to a path, and that it replaces no other file.

    Raises:
        FileExistsError: The file exists, and is not a page of html_page.
        FileNotFoundError: The folder does not exist.
        OSError: The file cannot be read.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: choose another --page")
    if not path.exists():
        return
    if path.is_dir() or GENERATOR.encode() not in path.open("rb").read(1000):
        raise FileExistsError(f"{path} exists, and --show did not write it: choose another --page")


def html_page(title: str, lines: Iterable[str], spans: Iterable[Span]) -> str:
    """Return the page of a scored text.

    Args:
        title: Title of the page.
        lines: Lines above the text.
        spans: From spans_of.
    """
    paragraphs = "\n".join(f"<p>{visible_html(line)}</p>" for line in lines)
    body = f"""{paragraphs}
{html_legend()}
<p>Point at a token, or tap it, for its probability, its rank and the five most likely tokens in its
place. With the keyboard: Tab to the text, then the arrow keys.</p>
{html_fragment(spans)}"""
    return html_document(title, GENERATOR, body)


def html_document(title: str, generator: str, body: str, style: str = "") -> str:
    """Return a self-contained page with STYLE and SCRIPT: nothing is loaded from elsewhere.

    Args:
        title: Title and heading of the page, as text.
        generator: The command that writes the page.
        body: HTML after the heading.
        style: CSS of the body, beside STYLE.
    """
    title = visible_html(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{generator}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ max-width: 50rem; margin: 0 auto; padding: 1rem; background: #ffffff; color: #1b1b1b;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #16181c; color: #e8e8e8; }} }}
h1 {{ font-size: 1.4rem; }}
{style}{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""
