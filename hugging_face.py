"""What the Hugging Face hub has and transformers reads: GPT-2's weights, tokenizer.json.

folder = pretrained_folder("gpt2-medium", "data")    # downloaded, unless it is there
"""

import itertools
import json
import os
from pathlib import Path

from download import download
from model import GPT2_SIZES

FILES = ("config.json", "model.safetensors")


def pretrained_folder(name: str, data_dir) -> Path:
    """The folder of a GPT-2's files: `name` itself, or DATA_DIR/pretrained/NAME for one of
    OpenAI's four, which is downloaded where it isn't there. Raises FileNotFoundError for a folder
    without them, ConnectionError where they can't be had."""
    if name not in GPT2_SIZES:
        if not all((Path(name) / file).is_file() for file in FILES):
            raise FileNotFoundError(
                f"{name} is no folder with {' and '.join(FILES)}, and none of "
                f"{', '.join(GPT2_SIZES)}"
            )
        return Path(name)
    folder = Path(data_dir) / "pretrained" / name
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    for file in FILES:
        if not (folder / file).exists():
            # the hub's answer names the sha256 of large files
            url = f"{hub.rstrip('/')}/openai-community/{name}/resolve/main/{file}"
            download([url], folder / file)
    return folder


def tokenizer_json(tokenizer) -> str:
    """A tokenizer of tokenizer.py's -> the tokenizer.json that gives the same ids."""
    if hasattr(tokenizer, "tokenizer"):
        return tokenizer.tokenizer.to_str()  # it was made of one
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    special, before = {"<|endoftext|>": tokenizer.eot_token}, [level]
    encoding = getattr(tokenizer, "encoding", None)  # tiktoken's
    if encoding is not None:
        special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
        # there, $ ends a line and {1,3}+ repeats a repetition
        pattern = encoding._pat_str.replace("$", r"\z").replace("{1,3}+", "{1,3}")
        split = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        before.insert(0, {"type": "Split", **split})
    ids = {*special.values()}
    ranks = {piece: i for i, piece in tokenizer.pieces.items() if i not in ids}
    pairs = (_last_merge(piece, ranks) for piece in sorted(ranks, key=ranks.get) if len(piece) > 1)
    model = {
        "type": "BPE",
        "vocab": {_letters(piece): i for piece, i in ranks.items()} | special,
        "merges": [[_letters(part) for part in pair] for pair in pairs if len(pair) == 2],
        "ignore_merges": encoding is not None,  # a piece that is in the vocabulary is one id
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": name, "special": True} | flags for name, i in special.items()]
    return json.dumps({
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before},
        "decoder": level,
        "model": model,
    }, ensure_ascii=False)  # fmt: skip


def _last_merge(piece: bytes, ranks) -> list[bytes]:
    """The parts that earlier merges make of a piece: two, unless no merge makes it."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ranks[piece]) for a, b in itertools.pairwise(parts)]
        if (least := min(pairs)) >= ranks[piece]:
            break
        i = pairs.index(least)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _letters(piece: bytes) -> str:
    """Bytes as the letters that GPT-2's files have for them: those that print are themselves."""
    return "".join(map(_LETTERS.__getitem__, piece))


_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_LETTERS = {byte: chr(byte) for byte in _PRINTED} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
