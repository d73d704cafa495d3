"""The settings of a run, as the modules of this package see them."""

from typing import Any, ClassVar, Protocol

SHAPE_SETTINGS = ("n_layer", "n_head", "n_embd")  # settings that weights from elsewhere decide


class RunSettings(Protocol):
    """The types of train_gpt2.Settings once a size has filled in what no flag has set.

    In train_gpt2.Settings, a setting that depends on the size may be None. The same object is a
    RunSettings after resolve_size. Three values are known later: with --init_from, the shape is
    known after create_model; max_steps and eval_every are known after resolve_steps.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    corpus: tuple[str, ...]  # each NAME or NAME:WEIGHT
    data_dir: str
    out_dir: str
    run_name: str
    resume: str
    init_from: str
    size: str
    n_layer: int
    n_head: int
    n_embd: int
    sequence_length: int
    dropout: float
    token_noise: float
    document_mask: str
    batch_size: int
    micro_batch_size: int | None  # as asked for; ComputeChoices has the one in use
    max_steps: int
    train_flops: float | None  # None if max_steps was given
    stop_at: int | None
    eval_every: int
    checkpoint_minutes: float
    patience: int
    log_every: int
    tracker: str
    optimizer: str
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    grad_clip: float
    seed: int
    device: str
    dtype: str
    compile: str


def saved_corpus(config: dict) -> tuple[str, ...]:
    """Return the setting `corpus` of a saved run; older versions had one corpus, as a string."""
    corpus = config["corpus"]
    return (corpus,) if isinstance(corpus, str) else tuple(corpus)


def saved_choices(saved: dict) -> dict:
    """Return what a run chose for its machine: device, number type, document mask, ...

    Older versions saved no choices: the values in use are among their settings.

    Args:
        saved: A checkpoint, or the content of config.json.
    """
    return saved.get("chosen", saved.get("config", saved))


def left_out_first_tokens(saved: dict) -> bool:
    """Return whether the losses of a run leave out the first token of each document.

    Versions before "document_start" computed them so. Their losses cannot be compared with others.

    Args:
        saved: A checkpoint, or the content of config.json.
    """
    choices = saved_choices(saved)
    return choices.get("document_mask") == "true" and "document_start" not in choices
