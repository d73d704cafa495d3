r"""Boundaries: the places at which a document ends, or a running text may be divided.

    record_ends(b"one\ntwo\nthr", "line")      # [4, 8]

A record is the bytes of one document. It ends at a line feed, a blank line, or before a title. A
running text has no documents, but it may be divided at every place that no token can span: then
both sides, tokenized separately, give the token ids of the whole text.
"""

import codecs
import re
from typing import BinaryIO

TAIL = 1 << 12  # bytes; almost every text has a boundary in so many
WINDOW = 1 << 16  # bytes searched at once
OVERLAP = 16  # bytes: more than the three characters that decide whether there is a boundary

RECORD_END = {  # a document ends after each match
    "line": re.compile(rb"\n"),
    "blank-line": re.compile(rb"\n[ \t\r\f\v]*\n"),
    "article": re.compile(rb"\n[ \t\r\f\v]*\n(?= = [^=\s][^\n]* = \r?\n)"),  # WikiText's title
}

# The patterns of tiktoken (GPT-2, cl100k, o200k) and of corpus/divisible.py match a text from left
# to right and never look back. Text from the end of a match on therefore gives the same matches
# alone as in the whole text. So a place is a boundary if, in every pattern,
#   - no match spans the place, and
#   - the text before the place gives the same matches without the characters after the place.
# The sets below are explicit, because Python, tiktoken and tokenizers may have different versions
# of Unicode. The sets need not be complete: a place that they leave out is not used. Their
# characters do not change in normalization form C, alone or beside the characters around a
# boundary, so a text may be normalized before or after it is divided.
_SPACES = (  # white space to Python or to tiktoken
    " \t\n\v\f\r\x1c-\x1f\x85\xa0\u1680\u180e\u2000-\u200b\u2028\u2029\u202f\u205f\u3000"
)
_LETTERS = (  # \p{L} in every version, and unchanged by NFC
    "A-Za-z"
    "\xc0-\xd6\xd8-\xf6\xf8-\u01bf"  # Latin with accents
    "\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f\u10d0-\u10f0"  # Greek, Cyrillic, Georgian
    "\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u1200-\u1206"  # Hebrew, Arabic, Ethiopic
    "\u1208-\u1246\u1260-\u1286\u1290-\u12ae\u12c8-\u12ce\u12d8-\u12ee\u1320-\u1340"
    "\u0905-\u0939\u0e01-\u0e30"  # Devanagari, Thai
    "\u0f49-\u0f4c\u0f4e-\u0f51\u0f53-\u0f56\u0f58-\u0f5b\u0f5d-\u0f68"  # Tibetan
    "\u1000-\u1021\u1780-\u17b3\u13a0-\u13f4"  # Burmese, Khmer, Cherokee
    "\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"  # Japanese, Chinese, Korean
)
_PUNCTUATION = (  # neither white space, letter, mark nor number, and not the ASCII apostrophe
    # nor one with which a name like <tool_call> or <|im_end|> continues: _ | > ] }
    "!-&(-/:-=?@\\[\\\\^`{~"
    "\u055a-\u055f\u060c\u061b\u061f\u0964\u0965\u0e5a\u0e5b"
    "\u0f0b-\u0f12\u104a-\u104f\u1361-\u1368\u17d4-\u17d6\u17d8-\u17da"
    "\u2010-\u2027\u2030-\u203e\u3001-\u3003\u3008-\u3011\u3014-\u301b"
    "\uff01-\uff06\uff08-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b\uff5d-\uff65"
)
BOUNDARY = re.compile(
    # A non-space, then white space that is not a line break: no match has white space after
    # another character, except that cl100k and o200k let line breaks follow punctuation.
    rf"(?<=[^{_SPACES}])(?=[ \t\xa0\u3000])"
    # A letter, then a line break, a digit or punctuation; a digit, then one of those or a letter.
    # Not the apostrophe, with which o200k continues a word (don't). Chinese has only these places.
    rf"|(?<=[{_LETTERS}])(?=[\r\n0-9{_PUNCTUATION}])"
    rf"|(?<=[0-9])(?=[\r\n{_LETTERS}{_PUNCTUATION}])"
    # A lone line feed between non-spaces, after it; o200k lets "/" follow a line break.
    rf"|(?<=[^{_SPACES}]\n)(?=[^{_SPACES}/])"
)


def record_ends(data: bytes, division: str) -> list[int]:
    """Return the ends of the complete records in some bytes of a text.

    A running text gives one record, which ends at the last boundary.

    Args:
        data: UTF-8 bytes from the beginning of a record on; the last record may be incomplete.
        division: How the text is divided into records, one of DIVISIONS in sources.py.

    Returns:
        Offsets in ascending order; none if `data` may hold no complete record.
    """
    if division in RECORD_END:
        return [match.end() for match in RECORD_END[division].finditer(data)]
    if division == "":
        end = _last_boundary(data)
        return [end] if end else []
    return []


def next_boundary(file: BinaryIO, start: int, stop: int) -> int:
    """Return the first boundary of a running text after byte `start`.

    Args:
        file: A seekable binary file.
        start: Byte to search from; boundaries beside the character at `start` may be left out.
        stop: End of the text, in bytes.

    Returns:
        The offset of the boundary in bytes, or `stop` if there is no boundary before `stop`.

    Raises:
        OSError: The file cannot be read.
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
    """Return the offset of the last boundary in `data`, or 0 if there is none."""
    for size in (TAIL, len(data)):
        start = max(0, len(data) - size)
        text, skipped = _decode(data[start:])
        places = [match.start() for match in BOUNDARY.finditer(text)]
        if places:
            return start + skipped + _num_bytes(text[: places[-1]])
    return 0


def _decode(data: bytes) -> tuple[str, int]:
    """Return the complete characters of `data`, and the number of bytes before the first one.

    Bytes that are not UTF-8 become lone surrogates, which the reader reports.
    """
    skipped = 0
    while skipped < min(3, len(data)) and data[skipped] & 0xC0 == 0x80:
        skipped += 1  # such a byte continues a character that began before `data`
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    return decoder.decode(data[skipped:]), skipped


def _num_bytes(text: str) -> int:
    """Return the number of bytes that `_decode` made `text` of."""
    return len(text.encode("utf-8", "surrogateescape"))
