"""Catalog: corpora that can be downloaded, with addresses, sizes, checksums and licences."""

import re
from dataclasses import dataclass

from corpus.sources import Source


@dataclass(frozen=True)
class DownloadFile:
    """A file on the network.

    Attributes:
        urls: Addresses of the file, in the order in which they are tried.
        size: Size in bytes, or None if the catalog does not have it.
        sha256: Checksum, or "" if the Hugging Face hub names it during the download.
        members: Pairs (pattern of member names, name of the file that the members are written to);
            none if the file is not an archive.
    """

    urls: tuple[str, ...]
    size: int | None = None
    sha256: str = ""
    members: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class CatalogEntry:
    """A corpus on the network.

    Attributes:
        downloads: Files to download.
        sources: Sources of the corpus, with paths relative to the folder of the corpus.
        licence: Licence of the text.
        home: Address of the page that describes the corpus.
        size: Size of all downloads as text, where `downloads` lacks the sizes in bytes.
    """

    downloads: tuple[DownloadFile, ...]
    sources: tuple[Source, ...]
    licence: str
    home: str
    size: str = ""


def _hub(path: str) -> tuple[str, str]:
    """Return the addresses of a file on the Hugging Face hub and on its mirror."""
    return f"https://huggingface.co/{path}", f"https://hf-mirror.com/{path}"


def _wikitext(name, size, sha256, mirror) -> CatalogEntry:
    """Return the entry of a WikiText corpus, a .zip file with one member per split."""
    names = {"train": "wiki.train.raw", "val": "wiki.valid.raw", "test": "wiki.test.raw"}
    return CatalogEntry(
        (
            DownloadFile(
                (f"https://wikitext.smerity.com/{name}-raw-v1.zip", *_hub(mirror)),
                size,
                sha256,
                tuple((rf"{name}-raw/{re.escape(member)}", member) for member in names.values()),
            ),
        ),
        tuple(Source(path, division="article", split=split) for split, path in names.items()),
        "CC BY-SA 3.0",
        "https://huggingface.co/datasets/Salesforce/wikitext",
    )


_REVISION = "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
_FINEWEB = "datasets/HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
CATALOG = {
    "tinyshakespeare": CatalogEntry(
        (
            DownloadFile(
                (
                    f"https://raw.githubusercontent.com/karpathy/char-rnn/{_REVISION}/data/tinyshakespeare/input.txt",
                    f"https://cdn.jsdelivr.net/gh/karpathy/char-rnn@{_REVISION}/data/tinyshakespeare/input.txt",
                    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
                ),
                1_115_394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
        (Source("input.txt"),),
        "public domain",
        "https://github.com/karpathy/char-rnn",
    ),
    "wikitext-2": _wikitext(
        "wikitext-2",
        4_721_645,
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
        "datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
    ),
    "wikitext-103": _wikitext(
        "wikitext-103",
        191_984_949,
        "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
        "datasets/mattdangerw/wikitext-103-raw/resolve/3555105b17ae31cc619a136fac72dbe2865c3738/wikitext-103-raw-v1.zip",
    ),
    "imdb": CatalogEntry(
        (
            DownloadFile(
                (
                    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                    "https://dataset.bj.bcebos.com/imdb/aclImdb_v1.tar.gz",
                ),
                84_125_825,
                "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
                (
                    (r"aclImdb/train/(?:pos|neg)/\d+_\d+\.txt", "train.jsonl"),
                    (r"aclImdb/train/unsup/\d+_\d+\.txt", "unlabelled.jsonl"),
                    (r"aclImdb/test/(?:pos|neg)/\d+_\d+\.txt", "test.jsonl"),
                ),
            ),
        ),
        (
            Source("train.jsonl", "jsonl"),  # divided into train and val, as the unlabelled are
            Source("unlabelled.jsonl", "jsonl"),
            Source("test.jsonl", "jsonl", split="test"),
        ),
        "not stated; cite Maas et al. 2011",
        "https://ai.stanford.edu/~amaas/data/sentiment/",
    ),
    "fineweb-edu-10BT": CatalogEntry(
        tuple(
            DownloadFile(_hub(f"{_FINEWEB}/sample/10BT/{i:03}_00000.parquet")) for i in range(14)
        ),
        tuple(Source(f"{i:03}_00000.parquet", "parquet") for i in range(14)),
        "ODC-By 1.0",
        "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu",
        "28.5 GB",
    ),
}  # fmt: skip
