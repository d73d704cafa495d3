"""Raw text to token files that train_gpt2.py reads.

    python prepare_data.py                       # TinyShakespeare, GPT-2's vocabulary
    python prepare_data.py --tokenizer bytes     # the same text, byte by byte
    python prepare_data.py --input my.txt        # a text of your own, into data/my/
    python prepare_data.py --list                # corpora that are known by name

Writes DATA_DIR/CORPUS/: train.bin, val.bin and, last, metadata.json (data/README.md). Run again
after a stop, it does only what is missing.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from common.files import folder_name
from common.script import run
from common.settings import check_conflicts, check_ranges, parse_settings, print_settings
from corpus import inputs
from corpus.descriptions import describe
from corpus.shards import prepare
from corpus.tasks import engine
from corpus.tokenizer import (
    copy_vocabulary,
    fetch_vocabulary,
    get_tokenizer,
    missing_files,
    vocabularies_beside,
)
from corpus.verify import verify


@dataclass
class Config:
    corpus: str = ""  # name of the corpus; "": TinyShakespeare, or after what --input names
    input: tuple[str, ...] = ()  # files, folders, globs, DIR:SUB-CORPUS or hf:NAME[/CONFIG]
    text_field: str = ""  # field of a .jsonl or .parquet row that holds the text; "": text
    documents: Literal["", "blank-line", "file", "line"] = ""  # what ends a document of a .txt
    max_length: int = 0  # tokens that are kept of a document; 0: all
    tokenizer: str = ""  # bytes, a tiktoken encoding, a tokenizer.json or .tiktoken; "": gpt2
    train_split_ratio: float = 0.9  # share for training, where the corpus isn't split already
    seed: int = 0  # which documents go to train and which to val
    data_dir: str = "data"  # folder for prepared corpora
    engine: Literal["processes", "ray"] = "processes"  # what does the work: this machine, or Ray
    workers: int = 0  # pieces worked on at once, here at most four a core; 0: one a core
    ray_address: str = ""  # of a running Ray cluster (auto: this node's); "": starts one here
    part: str = ""  # I/N: only every N-th piece, from the I-th; whoever ends last joins them
    on_error: Literal["stop", "skip"] = "stop"  # an invalid document: stop, or skip and list it
    list: bool = False  # show the corpora that are known by name, and do nothing else
    describe: str = ""  # write a description into this folder of raw text, and do nothing else
    description: str = ""  # what the text is, for --describe
    source: str = ""  # where the text came from, for --describe
    sub_corpora: str = ""  # its folders, separated by commas, for --describe; -: it has none
    prefetch: str = ""  # download corpus and vocabulary into this folder, and do nothing else
    verify: str = ""  # check this prepared corpus against checksums and source, and nothing else


LIMITS = {"train_split_ratio": (1e-6, 1 - 1e-6), "workers": (0, 1024)}
MODES = {  # that do nothing else -> the flags that they take
    "list": (),
    "describe": ("corpus", "text_field", "description", "source", "sub_corpora"),
    "prefetch": ("corpus", "input", "text_field", "documents", "tokenizer"),
    "verify": ("data_dir",),
}
WITHOUT = {mode: Config.__annotations__.keys() - {mode, *takes} for mode, takes in MODES.items()}
NEEDS = dict.fromkeys(("description", "source", "sub_corpora"), "describe")
NEEDS["ray_address"] = "engine ray"


def main():
    config = parse_settings(Config, __doc__)
    check_ranges(config, LIMITS)
    check_conflicts(config, WITHOUT, NEEDS)
    part = re.fullmatch(r"(\d{1,6})/(\d{1,6})", config.part)
    if config.part and not (part and int(part[1]) < int(part[2])):
        raise ValueError(f"part is I/N with I from 0 to N - 1, not {config.part!r}")
    if config.list:
        return print(inputs.list_corpora())
    if config.describe:
        answers = {
            "name": config.corpus,
            "download_source": config.source,
            "description": config.description,
            "content_field": config.text_field,
            "corpuses": config.sub_corpora,
        }
        return print(f"wrote {describe(Path(config.describe), answers)}")
    data_dir = Path(config.prefetch or config.data_dir)
    vocabulary = (data_dir / "tokenizers").resolve()
    if config.prefetch:
        copy_vocabulary(config.tokenizer or "gpt2", vocabulary)  # what needn't be downloaded again
        os.environ["TIKTOKEN_CACHE_DIR"] = str(vocabulary)
    else:
        vocabularies_beside(data_dir)
    if config.verify:
        folder = data_dir / folder_name(config.verify, "--verify")
        return verify(folder)
    print_settings(config)
    named = config.corpus or config.input or config.tokenizer
    try:
        corpus, tokenizer = load(config, data_dir)
    except ConnectionError as error:
        if config.prefetch:
            missing = str(error).partition(";")[0]
            raise ConnectionError(f"{missing}; --prefetch is for where there is one") from None
        if named:  # asked for by name: no substitute
            raise
        print(
            f"No network: {error}.\nPreparing the built-in corpus instead: Python's own "
            f"documentation, byte by byte. Run this again, online, for TinyShakespeare."
        )
        config = replace(config, corpus=inputs.BUILT_IN, tokenizer="bytes")
        corpus, tokenizer = load(config, data_dir)
    if config.prefetch:
        missing = " but its --input" if config.input else ""
        return print(
            f"{data_dir} has all that {corpus.name} needs{missing}. Take it along, and there: "
            f"python prepare_data.py --data_dir {data_dir} "
            f"--corpus {corpus.name} --tokenizer {tokenizer.name}\n"
            f"train_gpt2.py and sample.py take --data_dir {data_dir}, too"
        )
    with engine(config.engine, config.workers, config.ray_address) as run_tasks:
        prepare(
            corpus, tokenizer, data_dir / corpus.name, run_tasks, config.train_split_ratio,
            config.seed, config.max_length, config.on_error, config.part,
        )  # fmt: skip


def load(config, data_dir):
    """The corpus and the tokenizer that are asked for, downloaded where they have to be."""
    name = config.corpus or (name_of(config.input) if config.input else "tinyshakespeare")
    folder = data_dir / folder_name(name, "--corpus")
    vocabulary = config.tokenizer or "gpt2"
    missing_files(vocabulary)  # a wrong name costs no download
    corpus = inputs.load_corpus(name, folder, config.input, config.documents, config.text_field)
    if config.max_length and not corpus.documents:
        raise ValueError(
            "max_length is for documents, and this is one running text: see --documents"
        )
    if config.documents and all(s.documents != config.documents for s in corpus.sources):
        raise ValueError(f"--documents has no effect on {name}: it is for .txt files of yours")
    fields = {s.field for s in corpus.sources if s.format != "text"}
    if config.text_field and config.text_field not in fields:
        raise ValueError(f"--text_field has no effect on {name}: it is for rows of files of yours")
    fetch_vocabulary(vocabulary)
    return corpus, get_tokenizer(vocabulary)


def name_of(inputs) -> str:
    """A corpus's name after its first input: my.jsonl.gz -> my, raw/*.txt -> raw, DIR:a -> DIR-a,
    hf:NAME/CONFIG -> NAME-CONFIG."""
    name = inputs[0].removeprefix("hf:")
    if name != inputs[0] and not Path(name).exists():
        name = name.replace("/", "-")
    path = Path(name)
    while re.search(r"[*?[]", path.name) and not path.exists():
        path = path.parent
    return (
        re.sub(r"\.(txt|jsonl|parquet)?(\.gz|\.zst)?$", "", path.name).replace(":", "-")
        or path.stem
    )


if __name__ == "__main__":
    run(main)
