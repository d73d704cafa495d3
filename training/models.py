"""Models of a run: new, from a checkpoint, or from weights to start with (--init_from)."""

from pathlib import Path
from typing import Any

import torch

from corpus.vocabulary import same_vocabulary
from model import GPT, GPTConfig
from training.checkpoint import best_checkpoint
from training.corpora import corpus_name
from training.huggingface import EMBEDDING, is_released, pretrained_folder, read_shape
from training.run_folder import is_run
from training.run_settings import SHAPE_SETTINGS, RunSettings
from training.vocabulary import check_vocabulary

VOCAB_MULTIPLE = 64  # of rows of the output layer in training: matrix products are faster


def load_model(checkpoint: dict, device: torch.device | str = "cpu") -> GPT:
    """Return the model of a checkpoint on `device`, in evaluation mode.

    Rows of the output layer beyond the corpus's vocabulary are cut off.
    """
    return _model_of(checkpoint, vocab_multiple=1).to(device).eval()


def _model_of(checkpoint: dict, **changes: Any) -> GPT:
    """Return the model of a checkpoint on the CPU, with changes to its configuration."""
    vocab_size = checkpoint["metadata"]["vocab_size"]
    config = GPTConfig(**checkpoint["model_config"] | {"vocab_size": vocab_size} | changes)
    weights = dict(checkpoint["model"])
    embedding = weights[EMBEDDING][:vocab_size]
    padding = config.padded_vocab_size - vocab_size
    weights[EMBEDDING] = torch.nn.functional.pad(embedding, (0, 0, 0, padding))
    model = GPT(config)
    model.load_state_dict(weights)
    return model


def num_positions(init_from: str, data_dir: str) -> int:
    """Return the number of positions of the weights of --init_from; nothing is downloaded.

    Args:
        init_from: One of OpenAI's models, a folder of weights, or a run.
        data_dir: Folder of prepared corpora.

    Raises:
        ValueError: The weights are damaged.
        FileNotFoundError: The weights do not exist.
    """
    if is_released(init_from):
        return 1024
    if is_run(Path(init_from)):
        return best_checkpoint(Path(init_from))["model_config"]["n_positions"]
    return read_shape(pretrained_folder(init_from, data_dir))["n_positions"]


def create_model(settings: RunSettings, metadata: dict, checkpoint: dict | None) -> GPT:
    """Create the model that a run trains, on the CPU.

    The model has the shape of the checkpoint, or the weights of --init_from, or it is new. The
    shape of the weights of --init_from is filled into the settings.

    Args:
        settings: After resolve_size.
        metadata: Metadata of the corpus.
        checkpoint: The checkpoint that the run resumes, or None.

    Raises:
        ValueError: The weights of --init_from do not fit the corpus or the settings.
        FileNotFoundError: The weights of --init_from do not exist.
        ConnectionError: The weights cannot be downloaded.
    """
    vocab_size = metadata["vocab_size"]
    T = settings.sequence_length
    if checkpoint:
        return GPT(GPTConfig(**checkpoint["model_config"] | {"dropout": settings.dropout}))
    if not settings.init_from:
        return GPT(
            GPTConfig(
                vocab_size=vocab_size,
                n_positions=T,
                n_layer=settings.n_layer,
                n_head=settings.n_head,
                n_embd=settings.n_embd,
                dropout=settings.dropout,
                vocab_multiple=VOCAB_MULTIPLE,
            )
        )
    path = Path(settings.init_from)
    folder = None
    if not is_released(settings.init_from) and is_run(path):
        start = best_checkpoint(path)
        model = _model_of(start, dropout=settings.dropout, vocab_multiple=VOCAB_MULTIPLE)
    else:
        folder = pretrained_folder(settings.init_from, settings.data_dir)
        model = GPT.from_pretrained(folder, settings.dropout, VOCAB_MULTIPLE)
    config = model.config
    if not 0 <= config.vocab_size - vocab_size < 1024:  # a difference that may be padding
        raise ValueError(
            f"{corpus_name(settings)} has {vocab_size:,} ids and {settings.init_from} has "
            f"{config.vocab_size:,}: prepare the corpus with the vocabulary of those weights"
        )
    if folder:
        check_vocabulary(settings.init_from, folder, corpus_name(settings), metadata)
    elif not same_vocabulary(start["metadata"], metadata):
        raise ValueError(
            f"{corpus_name(settings)} has another vocabulary than the corpus that "
            f"{settings.init_from} was trained on: prepare it again with --tokenizer "
            f"{start['metadata']['tokenizer']['name']}"
        )
    if config.n_positions < T:
        raise ValueError(
            f"--sequence_length {T} is longer than the {config.n_positions} positions of "
            f"{settings.init_from}: lower it"
        )
    for name in SHAPE_SETTINGS:
        value = getattr(config, name)
        if getattr(settings, name) not in (None, value):
            raise ValueError(f"{settings.init_from} has {name} {value}: leave out --{name}")
        setattr(settings, name, value)
    return model
