"""Raw text to token files that train_gpt2.py reads.

    python prepare_data.py                       # TinyShakespeare, GPT-2's vocabulary
    python prepare_data.py --tokenizer bytes     # the same text, byte by byte
    python prepare_data.py --input my.txt        # a text of your own, into data/my/

Writes DATA_DIR/CORPUS/: train.bin, val.bin and, last, metadata.json (data/README.md).
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import corpora
from common import atomic_write, folder_name, parse_flags, print_flags, run
from tokenizer import get_tokenizer, missing_files


@dataclass
class Config:
    corpus: str = ""  # name of the corpus; "": TinyShakespeare, or the name of the --input file
    input: str = ""  # path of a UTF-8 text file, in place of the download
    tokenizer: str = ""  # gpt2, bytes, or another tiktoken encoding; "": gpt2
    train_split_ratio: float = 0.9  # share of the text for training, by characters (or documents)
    seed: int = 0  # of the split, where the corpus has documents
    data_dir: str = "data"  # folder for prepared corpora


def main():
    config = parse_flags(Config, __doc__)
    if not 0 < config.train_split_ratio < 1:
        raise ValueError(
            f"train_split_ratio must lie between 0 and 1, not {config.train_split_ratio}"
        )
    print_flags(config)
    try:
        corpus, tokenizer = load(config)
    except ConnectionError as error:
        if config.corpus or config.input or config.tokenizer:  # asked for by name: no substitute
            raise
        print(
            f"No network: {error}.\nPreparing the built-in corpus instead: Python's own "
            f"documentation, byte by byte. Run this again, online, for TinyShakespeare."
        )
        config.corpus, config.tokenizer = corpora.BUILT_IN, "bytes"
        corpus, tokenizer = load(config)
    folder = Path(config.data_dir) / corpus.name
    prepare(corpus, tokenizer, folder, config.train_split_ratio, config.seed)


def load(config):
    """The corpus and the tokenizer that are asked for, downloaded where they have to be."""
    name = config.corpus or (Path(config.input).stem if config.input else "tinyshakespeare")
    file = Path(config.input) if config.input else None
    folder = Path(config.data_dir) / folder_name(name, "--corpus")
    missing = missing_files(config.tokenizer or "gpt2")  # first: a wrong name costs no download
    corpus = corpora.load_corpus(name, folder, file)
    for url, path, sha256 in missing:
        try:
            corpora.download([url], path, sha256=sha256)
        except ConnectionError as error:
            raise ConnectionError(
                f"{error}; try again later, choose --tokenizer bytes, or set TIKTOKEN_CACHE_DIR to "
                f"a folder that has {path.name}"
            ) from None
    return corpus, get_tokenizer(config.tokenizer or "gpt2")


def prepare(corpus, tokenizer, folder: Path, train_split_ratio: float, seed: int) -> dict:
    """Writes the split and tokenized corpus into `folder`; returns its metadata.

    Raises ValueError where a split would be empty.
    """
    start = time.perf_counter()
    split = split_documents if corpus.documents else split_text
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    files, splits = {}, {}
    for name, texts in split(corpus.texts, train_split_ratio, seed).items():
        ids = encode(texts, tokenizer, corpus.documents)
        if len(ids) == 0:
            raise ValueError(f"{corpus.name} has too little text: nothing is left for {name}")
        if ids.max() >= tokenizer.vocab_size:  # before narrowing: 65,536 would become 0
            raise ValueError(f"{tokenizer.name} gave the id {ids.max()}, beyond its own vocabulary")
        data = files[f"{name}.bin"] = ids.astype(dtype).tobytes()
        sha256 = hashlib.sha256(data).hexdigest()
        splits[name] = {
            "files": [{"name": f"{name}.bin", "tokens": len(ids), "sha256": sha256}],
            "tokens": len(ids),
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
        }
    metadata = {
        "format_version": 1,
        "corpus": corpus.name,
        "source": corpus.source,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "vocab_size": tokenizer.vocab_size,
        "eot_token": tokenizer.eot_token,
        "eot_per_document": corpus.documents,
        "dtype": dtype.name,
        "train_split_ratio": train_split_ratio,
        "seed": seed,
        "splits": splits,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").unlink(missing_ok=True)  # until all is there, nothing is
    for name, data in files.items():
        with atomic_write(folder / name) as f:
            f.write(data)
    with atomic_write(folder / "metadata.json") as f:
        f.write(json.dumps(metadata, indent=2).encode() + b"\n")
    for name, total in splits.items():
        print(f"{name:5} {total['tokens']:>12,} tokens  {total['bytes']:>12,} bytes of text")
    print(f"{folder}: done in {time.perf_counter() - start:.1f} s. Next: python train_gpt2.py")
    return metadata


def encode(texts, tokenizer, documents: bool) -> np.ndarray:
    """Texts -> (n,) uint32 ids; where they are documents, each ends with an end of text."""
    end = np.array([tokenizer.eot_token] if documents else [], dtype=np.uint32)
    return np.concatenate(
        [part for text in texts for part in (tokenizer.encode(text), end)] or [end]
    )


def split_text(texts, train_split_ratio, seed) -> dict[str, list[str]]:
    """A running text is cut once, by character."""
    (text,) = texts
    cut = int(len(text) * train_split_ratio)
    return {"train": [text[:cut]], "val": [text[cut:]]}


def split_documents(texts, train_split_ratio, seed) -> dict[str, list[str]]:
    """Each document goes to one side by a hash of the seed and its place: order, workers and what
    else is in the corpus make no difference."""
    splits = {"train": [], "val": []}
    for position, text in enumerate(texts):
        digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "little") / 2**64
        splits["train" if share < train_split_ratio else "val"].append(text)
    return splits


if __name__ == "__main__":
    run(main)
