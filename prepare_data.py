"""Turn raw text into token files that train_gpt2.py reads.

    python prepare_data.py                       # TinyShakespeare, GPT-2's vocabulary
    python prepare_data.py --tokenizer bytes     # the same text, byte by byte
    python prepare_data.py --input my.txt        # a text of your own, into data/my/
    python prepare_data.py --tokenizer bpe:4096  # a vocabulary of 4,096 ids, trained on the text
    python prepare_data.py --list                # corpora that need no --input

Writes DATA_DIR/CORPUS/: train.bin, val.bin and, last, metadata.json (data/README.md). After an
interruption, the same command does the remaining work.
"""

import os

if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else numpy starts idle threads

import contextlib
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from common.files import folder_name
from common.packages import optional
from common.script import end_without_shutdown, run_script
from common.settings import check_conflicts, check_ranges, parse_settings, print_settings
from corpus.bpe import trained_tokenizer
from corpus.descriptions import describe
from corpus.engines import open_engine
from corpus.files import name_without_suffixes
from corpus.inputs import BUILT_IN, Corpus, list_corpora, load_corpus
from corpus.pipeline import prepare
from corpus.tokenizer import Tokenizer, get_tokenizer
from corpus.verify import verify
from corpus.vocabulary_files import (
    bpe_size,
    check_tokenizer_name,
    copy_vocabulary,
    fetch_vocabulary,
    use_prefetched_vocabularies,
)


@dataclass
class Settings:
    """Every setting is also a flag: --corpus wikitext-2."""

    corpus: str = ""  # name of the corpus; "": TinyShakespeare, or the name of the first --input
    input: tuple[str, ...] = ()  # files, folders, globs, DIR:SUB-CORPUS or hf:NAME[/CONFIG]
    text_field: str = ""  # field of a .jsonl or .parquet row that holds the text; "": text
    documents: Literal["", "blank-line", "file", "line"] = ""  # division of a .txt; "": none
    split_names: Literal["keep", "ignore"] = "keep"  # names such as train.txt and test/ in --input
    max_length: int = 0  # tokens kept of a document; 0: all
    tokenizer: str = ""  # bytes, bpe:N to train N ids, a name (docs/data.md), a file; "": gpt2
    train_split_ratio: float = 0.9  # share for train, if the corpus has no splits
    seed: int = 0  # decides which documents go to train and which to val
    data_dir: str = "data"  # folder for prepared corpora
    encoder: Literal["auto", "tiktoken"] = "auto"  # auto: a faster package, if its ids are the same
    engine: Literal["processes", "ray"] = "processes"  # runner of the tasks: this machine, or Ray
    workers: int = 0  # tasks at once, on this machine at most four per core; 0: one per core
    ray_address: str = ""  # HOST:PORT of a Ray cluster, or auto; "": start Ray on this machine
    part: str = ""  # I/N: only tasks I, I + N, ..., counted from 0; the part to end last joins all
    on_error: Literal["stop", "skip"] = "stop"  # an invalid document: stop, or skip and list it
    list: bool = False  # list the corpora that need no --input, and do nothing else
    describe: str = ""  # write a description into this folder of raw text, and do nothing else
    description: str = ""  # description of the text, for --describe
    source: str = ""  # origin of the text, for --describe
    sub_corpora: str = ""  # folders of --describe, separated by commas; -: none
    prefetch: str = ""  # download corpus and vocabulary into this folder, and do nothing else
    verify: str = ""  # check this prepared corpus against checksums and source, and nothing else


RANGES = {"train_split_ratio": (1e-6, 1 - 1e-6), "workers": (0, 1024)}
MODES = {  # flags that do nothing else -> flags that may be combined with them
    "list": (),
    "describe": ("corpus", "text_field", "description", "source", "sub_corpora"),
    "prefetch": ("corpus", "input", "text_field", "documents", "split_names", "tokenizer"),
    "verify": ("data_dir",),
}
EXCLUDES = {mode: Settings.__annotations__.keys() - {mode, *takes} for mode, takes in MODES.items()}
REQUIRES = dict.fromkeys(("description", "source", "sub_corpora"), "describe")
REQUIRES["split_names"] = "input"
REQUIRES["ray_address"] = "engine ray"


def main() -> None:
    """Prepare a corpus, or run --list, --describe, --prefetch or --verify."""
    settings = parse_settings(Settings, __doc__)
    check_ranges(settings, RANGES)
    check_conflicts(settings, EXCLUDES, REQUIRES)
    check_part(settings.part)
    if settings.list:
        print(list_corpora())
    elif settings.describe:
        describe_folder(settings)
    elif settings.prefetch:
        prefetch(settings)
    elif settings.verify:
        use_prefetched_vocabularies(settings.data_dir)
        verify(Path(settings.data_dir) / folder_name(settings.verify, "--verify"))
    else:
        prepare_corpus(settings)


def prepare_corpus(settings: Settings) -> None:
    """Download missing files, and tokenize the corpus.

    Without a network, the built-in corpus is prepared if no corpus and no tokenizer was named.

    Raises:
        ConnectionError: A file cannot be downloaded, and a corpus or tokenizer was named.
        ValueError: A setting or a document is invalid.
        OSError: A file cannot be read or written.
    """
    data_dir = Path(settings.data_dir)
    check_folder(data_dir)
    use_prefetched_vocabularies(data_dir)
    print_settings(settings)
    try:
        corpus, tokenizer = load(settings, data_dir)
    except ConnectionError as error:
        if settings.corpus or settings.input or settings.tokenizer:
            raise  # a corpus or tokenizer that was named is never replaced
        print(
            f"No network: {error}.\nPreparing the built-in corpus instead: Python's own "
            f"documentation, byte by byte. Run this again, online, for TinyShakespeare."
        )
        settings = replace(settings, corpus=BUILT_IN, tokenizer="bytes")
        corpus, tokenizer = load(settings, data_dir)
    with open_engine(settings.engine, settings.workers, settings.ray_address) as run_tasks:
        if tokenizer is None:  # trained here, because no process may fork after its threads ran
            tokenizer = trained_tokenizer(
                settings.tokenizer,
                corpus,
                data_dir / corpus.name,
                train_split_ratio=settings.train_split_ratio,
                seed=settings.seed,
                on_error=settings.on_error,
            )
        prepare(
            corpus,
            tokenizer,
            data_dir / corpus.name,
            run_tasks,
            train_split_ratio=settings.train_split_ratio,
            seed=settings.seed,
            max_length=settings.max_length,
            on_error=settings.on_error,
            encoder=settings.encoder,
            part=settings.part,
        )


def load(settings: Settings, data_dir: Path) -> tuple[Corpus, Tokenizer | None]:
    """Return the corpus and the tokenizer that the settings name, downloaded if necessary.

    The tokenizer is None if it is to be trained on the corpus.

    Args:
        settings: Settings of the script.
        data_dir: Folder of prepared corpora.

    Raises:
        ValueError: A name is unknown, or a flag has no effect on this corpus.
        ConnectionError: A file cannot be downloaded.
    """
    name = settings.corpus or "tinyshakespeare"
    if settings.input and not settings.corpus:
        name = name_of(settings.input)
    folder = data_dir / folder_name(name, "--corpus")
    if ":" in name:
        raise ValueError(
            f"{name!r} has a colon, which train_gpt2.py takes for the beginning of a weight: "
            f"choose another --corpus NAME"
        )
    check_folder(folder)
    vocabulary = settings.tokenizer or "gpt2"
    check_tokenizer_name(vocabulary)  # an unknown name is refused before anything is downloaded
    if bpe_size(vocabulary) is not None:
        optional("tokenizers", f"--tokenizer {vocabulary}")
    corpus = load_corpus(
        name,
        folder,
        settings.input,
        settings.documents,
        settings.text_field,
        settings.split_names,
    )
    if settings.max_length and not corpus.has_documents:
        raise ValueError(
            "max_length is for documents, and this is one running text: see --documents"
        )
    if settings.documents and all(s.division != settings.documents for s in corpus.sources):
        raise ValueError(f"--documents has no effect on {name}: it is for .txt files of yours")
    fields = {s.field for s in corpus.sources if s.format != "text"}
    if settings.text_field and settings.text_field not in fields:
        raise ValueError(f"--text_field has no effect on {name}: it is for rows of files of yours")
    if bpe_size(vocabulary) is not None:
        return corpus, None
    fetch_vocabulary(vocabulary)
    return corpus, get_tokenizer(vocabulary)


def prefetch(settings: Settings) -> None:
    """Download corpus and vocabulary into a folder, for a machine without a network.

    Raises:
        ConnectionError: A file cannot be downloaded.
        ValueError: A setting is invalid.
        OSError: A file cannot be read or written.
    """
    data_dir = Path(settings.prefetch)
    check_folder(data_dir)
    vocabulary = (data_dir / "tokenizers").resolve()
    copy_vocabulary(settings.tokenizer or "gpt2", vocabulary)  # the files that this machine has
    os.environ["TIKTOKEN_CACHE_DIR"] = str(vocabulary)
    print_settings(settings)
    try:
        corpus, tokenizer = load(settings, data_dir)
    except ConnectionError as error:
        reason = str(error).partition(";")[0]
        raise ConnectionError(
            f"{reason}; --prefetch needs a network{describe_rest(data_dir)}"
        ) from None
    exception = ", except its --input" if settings.input else ""
    flags = ["--data_dir", str(data_dir), "--corpus", corpus.name]
    if settings.input:
        flags += ["--input", *settings.input]
    for name in ("text_field", "documents", "split_names"):
        if getattr(settings, name) != getattr(Settings, name):
            flags += [f"--{name}", getattr(settings, name)]
    flags += ["--tokenizer", tokenizer.name if tokenizer else settings.tokenizer]
    print(
        f"{data_dir} has everything that {corpus.name} needs{exception}. Copy it to the other "
        f"machine and run there: python prepare_data.py {shlex.join(flags)}\n"
        f"train_gpt2.py and sample.py take {shlex.join(flags[:2])}, too"
    )


def describe_rest(data_dir: Path) -> str:
    """Return what a failed --prefetch has left in its folder, for the error message.

    Removes the folders that are empty.
    """
    paths = sorted(data_dir.rglob("*"), reverse=True)  # a folder after its files
    for path in [*paths, data_dir]:
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
    files = [str(path.relative_to(data_dir)) for path in reversed(paths) if path.is_file()]
    if not files:
        return ""
    more = f" and {len(files) - 3:,} more files" if len(files) > 3 else ""
    return f". {data_dir} is incomplete: it has only {', '.join(files[:3])}{more}"


def describe_folder(settings: Settings) -> None:
    """Write a description into a folder of raw text, and ask for values that no flag gives.

    Raises:
        ValueError: The folder or a sub-corpus does not exist, or standard input ends early.
        FileExistsError: The folder has a description.
    """
    answers = {
        "name": settings.corpus,
        "download_source": settings.source,
        "description": settings.description,
        "content_field": settings.text_field,
        "corpuses": settings.sub_corpora,
    }
    print(f"wrote {describe(Path(settings.describe), answers)}")


def check_folder(folder: Path) -> None:
    """Check that a path can be a folder for output.

    Raises:
        ValueError: The path is a file, or a link that leads nowhere.
    """
    if folder.is_symlink() and not folder.exists():
        raise ValueError(
            f"{folder} is a link to {os.readlink(folder)}, which does not exist: create that "
            f"folder, or remove the link"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: choose another name, or move the file")


def check_part(part: str) -> None:
    """Check the value of --part.

    Raises:
        ValueError: The value is neither "" nor I/N with 0 <= I < N.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    if part and not (match and int(match[1]) < int(match[2])):
        raise ValueError(f"--part is I/N with I from 0 to N - 1, not {part!r}")


def name_of(inputs: tuple[str, ...]) -> str:
    """Return the name that a corpus gets from its first input.

    Example: my.jsonl.gz gives my, raw/*.txt gives raw, DIR:a gives DIR-a, and hf:NAME/CONFIG gives
    NAME-CONFIG.
    """
    name = inputs[0].removeprefix("hf:")
    if name != inputs[0] and not Path(name).exists():
        name = name.replace("/", "-")
    path = Path(name)
    while re.search(r"[*?[]", path.name) and not path.exists():
        path = path.parent
    return name_without_suffixes(path).replace(":", "-") or path.stem


if __name__ == "__main__":
    end_without_shutdown()  # a shutdown frees the vocabulary piece by piece, for 0.1 s
    run_script(main)
