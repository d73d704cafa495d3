r"""Whether a running text may be divided at the boundaries of boundaries.py for a tokenizer.json.

    is_divisible(json.loads(tokenizer.to_str()))       # True for the files of Llama 3 or Qwen

A tokenizer.json first takes out its added tokens, then normalizes the text between them, then
divides it into words by its pre-tokenizer, and encodes each word alone. The parts of a text give
the ids of the whole if no added token and no word spans a boundary, and normalizing does not reach
over one. Only the structure of the file decides: a file of another structure is not divisible, even
if the parts might give the same ids.
"""

import unicodedata

from corpus.boundaries import BOUNDARY

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CAPITALIZED = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

# Regular expressions that divide a text one after another, usually a single one. None makes a word
# that spans a boundary.
WORD_PATTERNS = {
    "GPT-2": (rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_SYMBOLS}|\s+(?!\S)|\s+",),
    "Llama 3": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_SPACES}",
    ),
    "Qwen2": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS}[\r\n]*|{_SPACES}",
    ),
    "Qwen3.5": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "o200k": (
        rf"{_CAPITALIZED}{_CONTRACTIONS}?|{_CAPITALS}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
        rf"|{_SYMBOLS}[\r\n/]*|{_SPACES}",
    ),
    "Tekken": (rf"{_CAPITALIZED}|{_CAPITALS}|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_SPACES}",),
    "DeepSeek V3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        rf"|{_SPACES}",
    ),
}


def is_divisible(settings: dict) -> bool:
    """Return whether the parts of a text, cut at boundaries, give the ids of the whole.

    Args:
        settings: Content of a tokenizer.json whose special tokens are encoded as ordinary text.
    """
    return (
        _keeps_boundaries(settings["normalizer"])
        and _divides_at_boundaries(settings["pre_tokenizer"])
        and all(token["special"] or _has_no_boundary(token) for token in settings["added_tokens"])
        and not settings["model"].get("dropout")  # drawn at random
    )


def _keeps_boundaries(normalizer: dict | None) -> bool:
    """Return whether a normalizer does nothing, or composes characters (NFC)."""
    return all(step["type"] == "NFC" for step in _steps(normalizer, "normalizers"))


def _divides_at_boundaries(pre_tokenizer: dict | None) -> bool:
    """Return whether a pre-tokenizer makes words that do not span a boundary, and then bytes."""
    *steps, last = _steps(pre_tokenizer, "pretokenizers") or [{"type": ""}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    patterns = tuple(_pattern(step) for step in steps if step["type"] != "Digits")
    if not patterns:
        return last.get("use_regex", True)  # the pattern of GPT-2
    return patterns in WORD_PATTERNS.values()


def _pattern(step: dict) -> str:
    """Return the regular expression whose matches are words, or "" for another kind of step."""
    ways = (("Isolated", False), ("Removed", True))  # the second removes what does not match
    if step["type"] == "Split" and (step["behavior"], step["invert"]) in ways:
        return step["pattern"].get("Regex", "")
    return ""


def _steps(part: dict | None, name: str) -> list[dict]:
    """Return the steps of a part of a tokenizer.json, which may be a sequence of steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[name] for step in _steps(inner, name)]


def _has_no_boundary(token: dict) -> bool:
    """Return whether an added token, wherever it stands, takes up no place that is a boundary."""
    if token["lstrip"] or token["rstrip"] or token["single_word"]:  # depends on what is around it
        return False
    for content in (token["content"], unicodedata.normalize("NFC", token["content"])):
        text = f"x{content}"  # a place may be a boundary because of two characters before it
        if any(1 < match.start() < len(text) for match in BOUNDARY.finditer(text)):
            return False
    return True
