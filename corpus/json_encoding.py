"""A tokenizer.json like GPT-2's, as an encoding of tiktoken: the same ids several times faster.

    encoding = json_encoding(tokenizers.Tokenizer.from_file("data/my/tokenizer.json"))

The structure and the merges of the file decide whether tiktoken gives the same ids for every text.
Both packages join the two neighbours with the lowest rank until no two can be joined. `tokenizers`
joins only the pairs in its list of merges; tiktoken joins any two tokens whose bytes together are a
token. This makes no difference if

- the ids of the merges grow, because the ids are tiktoken's ranks;
- each merge makes another token, so that a token has one pair;
- each token, encoded alone, is that token. Where a longer text has two neighbours whose bytes
  together are a token, they were joined from these bytes in the same order as from the token
  alone, which ends with its one pair. So these neighbours are this pair.
"""

import json
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

from common.packages import installed_version
from corpus.gpt2_encoding import BYTE_OF_LETTER

# Other versions may have other tables of Unicode, and so divide a text at other places.
# tests/corpus/test_json_encoding.py compares these for every code point.
TIKTOKEN_VERSION = "0.14.0"
TOKENIZERS_VERSION = "0.23.3"

# The structure of the file; other values of these fields may change the ids.
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": None,
    "ignore_merges": None,
}


def json_encoding(tokenizer: Any) -> tiktoken.Encoding | None:
    """Return an encoding that gives the ids of a tokenizer.json, or None if they might differ.

    White space that is too long for tiktoken (tokenizer.LONGEST_SPACE) is an exception.

    Args:
        tokenizer: A tokenizers.Tokenizer that encodes special tokens as ordinary text.
    """
    settings = json.loads(tokenizer.to_str())
    eot_token = tokenizer.token_to_id(ENDOFTEXT)
    if eot_token is None or not _is_like_gpt2(settings) or not _versions_were_compared():
        return None
    vocabulary = settings["model"]["vocab"]
    merged = ["".join(pair) for pair in settings["model"]["merges"]]
    tokens = [*BYTE_OF_LETTER, *merged]
    if not all(token in vocabulary for token in tokens) or not BYTE_OF_LETTER.keys() >= {
        *"".join(merged)
    }:
        return None
    ids_of_merged = [vocabulary[token] for token in merged]
    ranks = {bytes(map(BYTE_OF_LETTER.__getitem__, token)): vocabulary[token] for token in tokens}
    if ids_of_merged != sorted(ids_of_merged) or len({*ranks.values()}) < len(tokens):
        return None
    if any(len(tokenizer.model.tokenize(token)) > 1 for token in merged):
        return None
    return tiktoken.Encoding(
        "tokenizer.json",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: eot_token},
    )


def _is_like_gpt2(settings: dict) -> bool:
    """Return whether a tokenizer.json divides a text as GPT-2's does, and then encodes bytes."""
    pre_tokenizer = settings["pre_tokenizer"] or {}
    return (
        not settings["normalizer"]
        and all(token["special"] for token in settings["added_tokens"])
        and all(pre_tokenizer.get(name) == value for name, value in _PRE_TOKENIZER.items())
        and all((settings["model"].get(name) or None) == value for name, value in _MODEL.items())
    )


def _versions_were_compared() -> bool:
    """Return whether both packages have the versions that were compared."""
    tiktoken_version = installed_version("tiktoken")
    tokenizers_version = installed_version("tokenizers")
    return (tiktoken_version, tokenizers_version) == (TIKTOKEN_VERSION, TOKENIZERS_VERSION)
