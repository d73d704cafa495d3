"""The corpora that a run trains on: one, or a mixture of several (--corpus a:0.7 b:0.3).

Corpora of a mixture have one vocabulary: create_mixture_dataloaders in dataset.py checks it. All
other modules see one metadata for all of them (mixture_metadata), which is the metadata of the
corpus itself if there is only one.
"""

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from batches.mixture import MixtureBatches, proportions
from corpus.metadata import read_metadata, require_end_of_text
from corpus.vocabulary_files import restore_vocabulary
from training.run_settings import RunSettings


@dataclass(frozen=True)
class TrainingCorpus:
    """A corpus that a run trains on."""

    name: str
    folder: Path
    share: Fraction  # of the training tokens
    metadata: dict


def corpus_weights(corpus: Sequence[str]) -> dict[str, Fraction | None]:
    """Return the weight of each corpus that the setting `corpus` names, None without a weight.

    Example: ("a:0.7", "b:0.3") -> {"a": 7/10, "b": 3/10}; ("a", "b") -> {"a": None, "b": None}.

    Raises:
        ValueError: A weight is not a positive number, a corpus comes twice, only some corpora have
            a weight, or commas separate the corpora.
    """
    # not the decimal comma of "a:0,7", which _parse_weight refuses
    if any(re.search(r":.*,(?!\d+$)", text) for text in corpus):
        separated = " ".join(" ".join(corpus).replace(",", " ").split())
        raise ValueError(f"corpora are separated by spaces, not by commas: --corpus {separated}")
    weights: dict[str, Fraction | None] = {}
    for text in corpus:
        name, colon, weight = text.partition(":")
        if not name:
            raise ValueError(f"--corpus {text!r} does not name a corpus: write NAME or NAME:WEIGHT")
        name = str(Path(name))  # a and a/ are one corpus
        if name in weights:
            raise ValueError(f"--corpus names {name} twice: name it once, with the sum of weights")
        weights[name] = _parse_weight(name, weight) if colon else None
    if None in weights.values() and any(weights.values()):
        missing = [name for name, weight in weights.items() if weight is None]
        raise ValueError(
            f"--corpus gives no weight to {', '.join(missing)}: give one to each corpus "
            f"(a:0.7 b:0.3), or to none for proportions by size"
        )
    return weights


def _parse_weight(name: str, text: str) -> Fraction:
    """Return a weight as the exact number that its text is."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(
            f"the weight of the corpus {name} must be a positive number, not {text!r}: write "
            f"--corpus {name}:0.5, for example"
        )
    return Fraction(text)


def same_mixture(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether two values of the setting `corpus` name the same corpora with equal shares.

    Example: ("a:0.7", "b:0.3") and ("a:7", "b:3") do; ("b:3", "a:7") is in another order.

    Raises:
        ValueError: A value is invalid.
    """
    weights = [corpus_weights(first), corpus_weights(second)]
    if list(weights[0]) != list(weights[1]):
        return False
    if len(weights[0]) == 1:  # a weight has no effect
        return True
    if None in [*weights[0].values(), *weights[1].values()]:  # shares by size
        return weights[0] == weights[1]
    shares = [proportions([weight or 0 for weight in each.values()]) for each in weights]
    return shares[0] == shares[1]


def corpus_name(settings: RunSettings) -> str:
    """Return the name of a run's corpus, for messages and folders; of a mixture, all names.

    Example: corpus ("a:0.7", "b:0.3") -> "a+b".
    """
    return "+".join(corpus_weights(settings.corpus))


def read_corpora(settings: RunSettings) -> list[TrainingCorpus]:
    """Return the corpora that a run trains on.

    Without weights, a corpus has the share of its training tokens in those of all corpora.

    Raises:
        FileNotFoundError: A corpus does not exist; a resumed run's message names --data_dir.
        ValueError: Names or weights are invalid, or the metadata of a corpus are damaged, of
            another version, without the end of text or without a split that training needs.
    """
    weights = corpus_weights(settings.corpus)
    folders = [Path(settings.data_dir) / name for name in weights]
    metadata = [_read_corpus(folder, settings) for folder in folders]
    sizes = [each["splits"]["train"]["tokens"] for each in metadata]
    try:
        shares = proportions([weight or size for weight, size in zip(weights.values(), sizes)])
    except ValueError as error:
        raise ValueError(f"--corpus {' '.join(settings.corpus)}: {error} (NAME:WEIGHT)") from None
    return [TrainingCorpus(*values) for values in zip(weights, folders, shares, metadata)]


def _read_corpus(folder: Path, settings: RunSettings) -> dict:
    """Return the metadata of one corpus."""
    try:
        metadata = read_metadata(folder)
    except FileNotFoundError:
        if settings.resume in ("", "auto"):
            raise
        raise FileNotFoundError(
            f"{settings.resume} was trained on the corpus {folder.name}, and {folder} does "
            f"not exist: name the folder that holds {folder.name} with --data_dir"
        ) from None
    require_end_of_text(metadata, folder)
    with contextlib.suppress(OSError):  # the samples of the run need it, training does not
        tokenizer = metadata["tokenizer"]
        restore_vocabulary(tokenizer["name"], tokenizer["sha256"], folder)
    for split in ("train", "val"):
        if split not in metadata["splits"]:
            raise ValueError(
                f"{folder} has no split {split!r}, only {', '.join(metadata['splits'])}: prepare "
                f"it again with text for {split}"
            )
    return metadata


def mixture_metadata(corpora: list[TrainingCorpus]) -> dict:
    """Return one metadata for all corpora of a run, which its checkpoints keep.

    - The metadata of a single corpus are its own.
    - Those of a mixture have the vocabulary that the corpora share, and the splits of all corpora
      as "NAME/SPLIT". A mixture has documents if one of its corpora has.
    """
    first = corpora[0].metadata
    if len(corpora) == 1:
        return first
    return {
        "tokenizer": first["tokenizer"],
        "vocab_size": first["vocab_size"],
        "eot_token": first["eot_token"],
        "eot_per_document": any(corpus.metadata["eot_per_document"] for corpus in corpora),
        "splits": {
            f"{corpus.name}/{split}": counts
            for corpus in corpora
            for split, counts in corpus.metadata["splits"].items()
        },
    }


def validation_metrics(corpora: list[TrainingCorpus], losses: list[float]) -> dict[str, float]:
    """Return val_loss and val_bpb, and for a mixture also those of each corpus by itself.

    Of N tokens of a mixture, a corpus with the share w has w N, with w N x loss nats and
    w N x bytes per token. Sums over the corpora, divided by N, give

        val_loss = sum of w x loss
        val_bpb  = val_loss / ln 2 / (sum of w x bytes per token)

    Args:
        corpora: The corpora of the run.
        losses: The validation loss of each corpus, nats per token.

    Returns:
        Name in metrics.jsonl -> value: "val_loss" (nats per token) and "val_bpb" (bits per byte)
        of the mixture; then "val_loss/NAME" and "val_bpb/NAME" for each corpus of several.
    """
    bytes_per_token = []
    for corpus in corpora:
        counts = corpus.metadata["splits"]["val"]
        bytes_per_token.append(counts["bytes"] / counts["tokens"])
    shares = [float(corpus.share) for corpus in corpora]
    loss = math.fsum(share * each for share, each in zip(shares, losses))
    mean_bytes = math.fsum(share * each for share, each in zip(shares, bytes_per_token))
    values = {"val_loss": loss, "val_bpb": bits_per_byte(loss, mean_bytes)}
    if len(corpora) > 1:
        for corpus, own_loss, own_bytes in zip(corpora, losses, bytes_per_token):
            values[f"val_loss/{corpus.name}"] = own_loss
            values[f"val_bpb/{corpus.name}"] = bits_per_byte(own_loss, own_bytes)
    return values


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Return the loss in bits per byte of text, which compares across vocabularies.

    Args:
        nats_per_token: Mean loss of the predicted tokens.
        bytes_per_token: UTF-8 bytes of the whole text, over all its tokens.
    """
    return nats_per_token / math.log(2) / bytes_per_token


def epochs_line(corpora: list[TrainingCorpus], order: MixtureBatches, num_sequences: int) -> str:
    """Return how often a run reads each corpus, and the shares of a mixture, as one line.

    Args:
        corpora: The corpora of the run.
        order: The sampler of their sequences.
        num_sequences: Sequences of the whole run.
    """
    epochs_of_corpora = order.order.epochs(num_sequences)
    if len(corpora) == 1:
        return f"corpus: {corpora[0].name}, read {epochs_of_corpora[0]:.2f} times"
    parts = []
    for corpus, epochs in zip(corpora, epochs_of_corpora):
        parts.append(f"{corpus.name} {float(corpus.share):.2%}, read {epochs:.2f} times")
    return f"mixture: {'; '.join(parts)}"
