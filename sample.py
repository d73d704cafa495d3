"""Write text with a trained model, or score text with it.

    python sample.py --prompt "ROMEO:"                          # the newest run
    python sample.py --run out/mine --num_samples 3 --temperature 0.7
    python sample.py --init_from gpt2 --interactive             # OpenAI's weights
    echo "To be" | python sample.py --prompt -
    python sample.py --score my.txt --show                      # the loss of each token
    python sample.py --run out/mine --export mine               # for transformers

The model is that of the newest run, unless --run or --init_from names another one.
"""

import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from batches.tokens import Tokens
from common.files import atomic_write
from common.script import run_script
from common.settings import check_conflicts, check_ranges, parse_settings
from corpus.tokenizer import Tokenizer
from corpus.vocabulary import tokenizer_of
from corpus.vocabulary_files import use_prefetched_vocabularies
from dataset import TextDataset
from model import GPT
from train_gpt2 import evaluate
from training.checkpoint import best_checkpoint
from training.compute import scoring_choices
from training.device import choose_device, memory_errors
from training.distributed import Ranks
from training.huggingface import is_released, pretrained_folder
from training.models import load_model
from training.run_folder import is_run, newest_run, no_run_message, run_of
from training.run_settings import left_out_first_tokens
from training.sampling import continue_prompt, prompt_ids, until_end
from training.score_page import (
    Span,
    check_page_path,
    has_terminal_colors,
    html_page,
    spans_of,
    terminal_legend,
    terminal_text,
    visible,
)
from training.scored_text import tokenize_text
from training.scoring import (
    DocumentScores,
    Score,
    ScoringModel,
    TokenScores,
    join_scores,
)
from training.vocabulary import tokenizer_of_weights


@dataclass
class Settings:
    """Every setting is also a flag: --num_samples 3."""

    run: str = ""  # folder of the run, or one of its checkpoints; "": the run saved last
    out_dir: str = "out"  # folder of runs
    init_from: str = ""  # instead of a run: gpt2, gpt2-medium, -large, -xl, or a folder of weights
    data_dir: str = "data"  # folder in which downloaded weights and vocabularies are kept
    export: str = ""  # write the model for transformers to this folder, and no text
    score: str = ""  # file whose loss to print, and no new text; "-": standard input
    show: bool = False  # print the scored text, colored by probability, and write it as a page
    show_tokens: int = 2000  # tokens that --show shows, at most, from the first one on
    page: str = ""  # file for the page of --show; "": score.html in the run's folder, or here
    prompt: str = ""  # text to continue; "-": standard input; "": begin a document, or a line
    prompt_file: str = ""  # file to read the prompt from
    interactive: bool = False  # ask for one prompt after another; Ctrl-D ends
    max_new_tokens: int = 300  # tokens added to the prompt, at most: a document may end before
    num_samples: int = 1  # texts sampled at once
    temperature: float = 0.8  # 0: always the most likely token; 1: the model's probabilities
    top_k: int = 50  # sample among this many of the most likely tokens; 0: among all
    top_p: float = 1.0  # sample among the fewest tokens that together have this probability; 1: all
    seed: int = 0  # of the sampling: the same seed gives the same text
    device: str = "auto"  # cpu, cuda, cuda:N, mps; auto: cuda, else mps, else cpu


RANGES = {
    "max_new_tokens": (1, 2**31 - 1),
    "num_samples": (1, 10_000),
    "top_p": (1e-6, 1),
    "show_tokens": (1, 100_000),
}
SAMPLING = ("max_new_tokens", "num_samples", "temperature", "top_k", "top_p", "seed")
EXCLUDES = {
    "init_from": ("run", "out_dir"),
    "run": ("out_dir",),
    "prompt_file": ("prompt",),
    "interactive": ("prompt", "prompt_file"),
    "export": ("prompt", "prompt_file", "interactive", *SAMPLING),
    "score": ("prompt", "prompt_file", "interactive", "export", *SAMPLING),
}
REQUIRES = {"show": "score", "show_tokens": "show", "page": "show"}


@memory_errors("--num_samples")
def main() -> None:
    """Write text, score text, or export the model, as the command line says."""
    settings = parse_settings(Settings, __doc__)
    check_ranges(settings, RANGES)
    check_conflicts(settings, EXCLUDES, REQUIRES)
    prompt = read_prompt(settings)
    device = choose_device(settings.device).value
    use_prefetched_vocabularies(settings.data_dir)
    if (
        settings.init_from
        and not is_released(settings.init_from)
        and is_run(Path(settings.init_from))
    ):
        settings.run = settings.init_from
        settings.init_from = ""
    load = load_pretrained if settings.init_from else load_run
    model, tokenizer, checkpoint = load(settings, device)
    if settings.export:
        export(model, tokenizer, Path(settings.export))
        return
    if settings.score:
        score(settings, model, tokenizer, checkpoint)
        return
    metadata = checkpoint["metadata"] if checkpoint else None
    if checkpoint and left_out_first_tokens(checkpoint):  # a run that cannot begin documents
        metadata = None
    generator = torch.Generator(device).manual_seed(settings.seed)
    continue_text = functools.partial(
        print_samples, settings, model, tokenizer, metadata, generator
    )
    if settings.interactive:
        answer_prompts(continue_text)
    else:
        continue_text(prompt)


def load_run(settings: Settings, device: torch.device) -> tuple[GPT, Tokenizer, dict]:
    """Return the model with the best weights of a run, the tokenizer, and the checkpoint.

    Args:
        settings: Settings without init_from.
        device: Device of the model.

    Raises:
        FileNotFoundError: The run has no checkpoint, or the vocabulary is missing.
        ValueError: The checkpoint is damaged, or the vocabulary is another one.
    """
    settings.run = settings.run or str(newest_run(settings.out_dir))
    run_dir = Path(settings.run)
    if not is_run(run_of(run_dir)):
        raise FileNotFoundError(no_run_message(run_dir, settings.out_dir))
    checkpoint = best_checkpoint(run_dir)
    print(f"{run_dir}, step {checkpoint['step']}:", file=sys.stderr)
    tokenizer = tokenizer_of(checkpoint["metadata"], run_dir)
    return load_model(checkpoint, device), tokenizer, checkpoint


def load_pretrained(settings: Settings, device: torch.device) -> tuple[GPT, Tokenizer, None]:
    """Return a model in the Hugging Face layout and its tokenizer; there is no checkpoint.

    Args:
        settings: Settings with init_from.
        device: Device of the model.

    Raises:
        FileNotFoundError: The folder does not exist.
        ConnectionError: The weights or the vocabulary cannot be downloaded.
        ValueError: The weights are damaged, or do not fit the tokenizer.
    """
    folder = pretrained_folder(settings.init_from, settings.data_dir)
    model = GPT.from_pretrained(folder).to(device).eval()
    tokenizer = tokenizer_of_weights(settings.init_from, folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder} has {model.config.vocab_size:,} ids, fewer than the "
            f"{tokenizer.vocab_size:,} of {tokenizer.name}: put the tokenizer.json of its "
            f"vocabulary there"
        )
    return model, tokenizer, None


def read_prompt(settings: Settings) -> str:
    """Return the prompt: from a file, from standard input, or from the settings.

    Raises:
        OSError: The file cannot be read.
        ValueError: The bytes are not UTF-8.
    """
    if settings.prompt_file:
        return decode_prompt(Path(settings.prompt_file).read_bytes(), settings.prompt_file)
    if settings.prompt == "-":
        return decode_prompt(sys.stdin.buffer.read(), "standard input")
    # Python reads other bytes of a command line as surrogates
    return decode_prompt(settings.prompt.encode(errors="surrogateescape"), "--prompt")


def decode_prompt(data: bytes, name: str) -> str:
    """Return the text of UTF-8 bytes.

    Args:
        data: The bytes.
        name: Where the bytes are from, for the message.

    Raises:
        ValueError: The bytes are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: see its byte {error.start:,}") from None


def print_samples(
    settings: Settings,
    model: GPT,
    tokenizer: Tokenizer,
    metadata: dict | None,
    generator: torch.Generator,
    prompt: str,
) -> None:
    """Print one sample token by token, or several one after another.

    Args:
        settings: How to sample.
        model: In evaluation mode.
        tokenizer: The tokenizer of the model.
        metadata: Metadata of the corpus that the model was trained on, None if unknown.
        generator: Random numbers, on the device of the model.
        prompt: The text to continue.

    Raises:
        ValueError: The prompt cannot be encoded.
    """
    tokens = continue_prompt(
        model,
        prompt_ids(tokenizer, prompt, metadata),
        tokenizer.eot_token,
        max_new_tokens=settings.max_new_tokens,
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        generator=generator,
    )
    if settings.num_samples == 1:
        print(prompt, end="", flush=True)
        ids = until_end(map(int, tokens), tokenizer.eot_token)
        for text in tokenizer.decode_stream(ids):
            print(text, end="", flush=True)
        print("\n")
        return
    for sample in torch.stack(list(tokens), dim=1).tolist():
        text = "".join(tokenizer.decode_stream(until_end(sample, tokenizer.eot_token)))
        print(f"{prompt}{text}\n---")


def answer_prompts(continue_text: Callable[[str], None]) -> None:
    """Ask for prompts on standard input and continue each, until the input ends.

    Args:
        continue_text: Prints a prompt and its continuation.
    """
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
            print()
            return
        try:
            continue_text(decode_prompt(prompt.encode(errors="surrogateescape"), "the prompt"))
        except KeyboardInterrupt:  # ends this text, not the program
            print()


@memory_errors("--show_tokens, or use --device cpu")
def score(settings: Settings, model: GPT, tokenizer: Tokenizer, checkpoint: dict | None) -> None:
    """Print the loss of a text per document and in all, as validation counts it.

    Args:
        settings: Settings with score.
        model: In evaluation mode.
        tokenizer: The tokenizer of the model.
        checkpoint: Checkpoint of a run, or None for other weights.

    Raises:
        OSError: The text cannot be read, or the page cannot be written.
        ValueError: The text cannot be encoded, or has fewer than two tokens.
    """
    name = "standard input" if settings.score == "-" else visible(settings.score)
    run_dir = run_of(Path(settings.run)) if checkpoint else Path()
    page = Path(settings.page) if settings.page else run_dir / "score.html"
    if settings.show:
        check_page_path(page)
    if checkpoint:
        torch.set_float32_matmul_precision("high")  # as in training
        if left_out_first_tokens(checkpoint):
            print(
                "the version that trained this run left the first tokens of documents out of its "
                "validation; this score counts them",
                file=sys.stderr,
            )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        text = tokenize_text(settings.score, name, checkpoint, tokenizer, Path(folder))
        tokens = text.tokens
        first_id = int(tokens.read([0], 1)[0, 0])
        num_shown = min(settings.show_tokens, len(tokens)) if settings.show else 0
        documents = DocumentScores(
            tokenizer.eot_token if text.has_documents else None, text.num_bytes, print_document
        )
        documents.start(first_id)
        shown: list[TokenScores] = []

        def receive(scores: TokenScores) -> None:
            documents.add(scores)
            if len(scores.alternatives.ids) or not shown:
                shown.append(scores)

        loss = score_tokens(model, checkpoint, tokens, receive, max(0, num_shown - 1))
        total = Score(loss, len(tokens), sum(text.num_bytes))
    lines = [f"{name}: {total}"]
    if 0 < num_shown < total.num_tokens:
        lines.append(f"shown: the first {num_shown:,} tokens (--show_tokens)")
    if settings.show:
        title = f"Score by {settings.run or settings.init_from}"
        if checkpoint:
            title += f", step {checkpoint['step']}"
        spans = spans_of(first_id, join_scores(shown), tokenizer)
        show(spans, page, title, lines)
    else:
        print(*lines, sep="\n")


def show(spans: list[Span], page: Path, title: str, lines: list[str]) -> None:
    """Print a scored text, colored on a terminal, and write its page.

    Args:
        spans: The scored text.
        page: The file to write.
        title: Title of the page.
        lines: Lines about the text.

    Raises:
        OSError: The page cannot be written.
    """
    has_colors = has_terminal_colors()
    print(terminal_text(spans, has_colors))
    if has_colors:
        print(terminal_legend())
    print(*lines, sep="\n")
    with atomic_write(page) as f:
        f.write(html_page(title, lines, spans).encode())
    print(f"wrote {page}: open it in a browser")


def print_document(number: int, document: Score) -> None:
    """Print the score of a document."""
    print(f"document {number:,}: {document}")


def score_tokens(
    model: GPT,
    checkpoint: dict | None,
    tokens: Tokens,
    receive: Callable[[TokenScores], object],
    num_alternatives: int = 0,
) -> float:
    """Return the loss of tokens in nats per token, by the evaluator of validation.

    The windows are those of validation: of a run's sequence_length, or of all positions of other
    weights. Nothing predicts the first token.

    Args:
        model: The model.
        checkpoint: Checkpoint of a run, or None for other weights.
        tokens: At least two tokens, with their eot_token.
        receive: Takes the scores of one batch of tokens after another, from the second token on.
        num_alternatives: Number of tokens for which `receive` gets alternatives.
    """
    T = checkpoint["config"]["sequence_length"] if checkpoint else model.config.n_positions
    T = min(T, len(tokens) - 1)
    windows = TextDataset(tokens, T, stride=T)
    device = model.transformer.wte.weight.device
    assert tokens.eot_token is not None
    compute = scoring_choices(checkpoint, device, tokens.eot_token, len(windows), T)
    loader = DataLoader(windows, batch_size=compute.micro_batch_size)
    scoring_model = ScoringModel(model, receive, num_alternatives)
    loss = evaluate(scoring_model, loader, compute, Ranks())
    model.eval()  # evaluate leaves a model ready to be trained
    return loss


def export(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model in the Hugging Face layout.

    Args:
        model: The model to write.
        tokenizer: Its tokenizer, written too.
        folder: Folder to write; created if it does not exist.

    Raises:
        FileExistsError: The folder holds a model or a run.
        ValueError: The tokenizer has more ids than the model.
    """
    if (folder / "config.json").exists():  # a run has one, too
        raise FileExistsError(f"{folder} holds a model already: choose another folder")
    model.save_pretrained(folder, tokenizer)
    print(f"wrote {folder}/: load it with transformers' from_pretrained")


if __name__ == "__main__":
    run_script(main)
