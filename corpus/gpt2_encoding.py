"""GPT-2's encoding, loaded in a fraction of the time that tiktoken.get_encoding("gpt2") takes.

    gpt2_encoding(vocabulary_paths("gpt2")["vocab.bpe"]).encode("To be")    # [2514, 307]

tiktoken decodes each letter of both vocabulary files in Python, and compares the files. They were
compared before they got their checksums (vocabulary_files.py), so vocab.bpe alone is enough.
"""

from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

# The bytes in the order of their ids. GPT-2's files write a printable byte as the character of this
# number, and the others, which come last, as the characters from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = [*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE)]
_OTHER_LETTERS = {256 + i: byte for i, byte in enumerate(_BYTES[len(_PRINTABLE) :])}
BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF_LETTER |= {chr(number): byte for number, byte in _OTHER_LETTERS.items()}
_LINE_END = "\uffff"  # stands for no byte


def gpt2_encoding(path: Path) -> tiktoken.Encoding:
    """Return the encoding that tiktoken.get_encoding("gpt2") returns.

    Args:
        path: vocab.bpe of GPT-2, with the right checksum. Each line after the first one has two
            tokens, and the next id stands for both together.

    Raises:
        OSError: The file cannot be read.
    """
    lines = path.read_text(encoding="utf-8").partition("\n")[2].removesuffix("\n")
    letters = lines.replace(" ", "").replace("\n", _LINE_END)
    tokens = letters.translate(_OTHER_LETTERS).split(_LINE_END)
    ranks = {bytes([byte]): i for i, byte in enumerate(_BYTES)}
    ranks.update((token.encode("latin-1"), i) for i, token in enumerate(tokens, len(ranks)))
    eot_token = len(ranks)
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=eot_token + 1,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: eot_token},
    )
