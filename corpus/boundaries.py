r"""Boundaries: where a text ends one document and begins the next, or may be divided.

    record_ends(b"one\ntwo\nthr", "line")      # [4, 8]

The documents of a text end at line feeds, blank lines or titles. A running text has no documents,
but it may be divided where no token can lie on both sides, so that the token ids of the parts are
the token ids of the whole.
"""

import codecs
import re
from typing import BinaryIO

TAIL = 1 << 12  # bytes in which almost every text has a boundary
WINDOW = 1 << 16  # bytes searched at once
OVERLAP = 16  # bytes: more than the three characters that tell a boundary

RECORD_END = {  # a document ends after each match
    "line": re.compile(rb"\n"),
    "blank-line": re.compile(rb"\n[ \t\r\f\v]*\n"),
    "article": re.compile(rb"\n[ \t\r\f\v]*\n(?= = [^=\s][^\n]* = \r?\n)"),  # WikiText's title
}

# tiktoken's patterns (GPT-2, cl100k, o200k) match a text from left to right and look back at
# nothing. A part that begins where a match ends therefore gives the matches that follow there in
# the whole. So a place is a boundary if, in every pattern,
#   - no match reaches over it, and
#   - the part before it gives the same matches without the characters after it.
# The sets below are explicit, because Python and tiktoken may know different versions of Unicode.
# They need not be complete: a place that is left out is not used.
_SPACES = (  # white space to Python or to tiktoken
    " \t\n\v\f\r\x1c-\x1f\x85\xa0\u1680\u180e\u2000-\u200b\u2028\u2029\u202f\u205f\u3000"
)
_LETTERS = (  # \p{L} in every version
    "A-Za-z"
    "\xc0-\xd6\xd8-\xf6\xf8-\u01bf"  # Latin with accents
    "\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f\u10d0-\u10f0"  # Greek, Cyrillic, Georgian
    "\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u1200-\u1206"  # Hebrew, Arabic, Ethiopic
    "\u1208-\u1246\u1260-\u1286\u1290-\u12ae\u12c8-\u12ce\u12d8-\u12ee\u1320-\u1340"
    "\u0905-\u0939\u0e01-\u0e30\u0f49-\u0f69"  # Devanagari, Thai, Tibetan
    "\u1000-\u1021\u1780-\u17b3\u13a0-\u13f4"  # Burmese, Khmer, Cherokee
    "\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"  # Japanese, Chinese, Korean
)
_PUNCTUATION = (  # neither white space, letter, mark nor number, and not the ASCII apostrophe
    "!-&(-/:-@\\[-`{-~"
    "\u055a-\u055f\u060c\u061b\u061f\u0964\u0965\u0e5a\u0e5b"
    "\u0f0b-\u0f12\u104a-\u104f\u1361-\u1368\u17d4-\u17d6\u17d8-\u17da"
    "\u2010-\u2027\u2030-\u203e\u3001-\u3003\u3008-\u3011\u3014-\u301b"
    "\uff01-\uff06\uff08-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
BOUNDARY = re.compile(
    # A non-space, then white space that is not a line break: no match has white space after
    # another character, except that cl100k and o200k let line breaks follow punctuation.
    rf"(?<=[^{_SPACES}])(?=[ \t\xa0\u3000])"
    # A letter, then a line break, a digit or punctuation; a digit, then one of those or a letter.
    # Not the apostrophe, with which o200k continues a word (don't). Chinese has these places only.
    rf"|(?<=[{_LETTERS}])(?=[\r\n0-9{_PUNCTUATION}])"
    rf"|(?<=[0-9])(?=[\r\n{_LETTERS}{_PUNCTUATION}])"
    # A lone line feed between non-spaces, after it; o200k lets "/" follow a line break.
    rf"|(?<=[^{_SPACES}]\n)(?=[^{_SPACES}/])"
)


def record_ends(data: bytes, division: str) -> list[int]:
    """Return the ends of the records in the first bytes of a text.

    A running text is one record, up to the last place where it may be divided.

    Args:
        data: UTF-8 bytes that begin where a record begins; the last record may be incomplete.
        division: How the text is divided into records, one of DIVISIONS in sources.py.

    Returns:
        Offsets in ascending order; none if no record is known to be complete.
    """
    if division in RECORD_END:
        return [match.end() for match in RECORD_END[division].finditer(data)]
    if division == "":
        end = _last_boundary(data)
        return [end] if end else []
    return []


def next_boundary(file: BinaryIO, start: int, stop: int) -> int:
    """Return the first place after byte `start` where a running text may be divided.

    Args:
        file: a seekable binary file.
        start: byte to search from; a place beside the character there may be left out.
        stop: end of the text, in bytes.

    Returns:
        The offset in bytes, or `stop` if there is no such place before it.
    """
    position = start
    while position < stop:
        file.seek(position)
        data = file.read(min(WINDOW, stop - position))
        text, skipped = _decode(data)
        if match := BOUNDARY.search(text):
            return position + skipped + _num_bytes(text[: match.start()])
        if len(data) < WINDOW:
            break
        position += WINDOW - OVERLAP
    return stop


def _last_boundary(data: bytes) -> int:
    """Return the last place in `data` where a running text may be divided, or 0."""
    for size in (TAIL, len(data)):
        start = max(0, len(data) - size)
        text, skipped = _decode(data[start:])
        places = [match.start() for match in BOUNDARY.finditer(text)]
        if places:
            return start + skipped + _num_bytes(text[: places[-1]])
    return 0


def _decode(data: bytes) -> tuple[str, int]:
    """Return the whole characters of `data`, and how many bytes come before the first one.

    Bytes that are not UTF-8 become lone surrogates: the reader reports them.
    """
    skipped = 0
    while skipped < min(3, len(data)) and data[skipped] & 0xC0 == 0x80:
        skipped += 1  # the end of a character
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    return decoder.decode(data[skipped:]), skipped


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))
