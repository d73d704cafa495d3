"""Write text with a trained model.

python sample.py --prompt "ROMEO:"                          # the newest run
python sample.py --run out/mine --num_samples 3 --temperature 0.7
python sample.py --init_from gpt2 --interactive             # OpenAI's weights
echo "To be" | python sample.py --prompt -
python sample.py --run out/mine --export mine               # for transformers
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.script import run_script
from common.settings import check_conflicts, check_ranges, parse_settings
from corpus.tokenizer import Tokenizer
from corpus.vocabulary import tokenizer_of
from corpus.vocabulary_files import use_prefetched_vocabularies
from model import GPT
from training.checkpoint import best_checkpoint
from training.compute import left_out_first_tokens
from training.device import choose_device, memory_errors
from training.huggingface import is_released, pretrained_folder
from training.models import load_model
from training.run_folder import is_run, newest_run, no_run_message, run_of
from training.sampling import continue_prompt, prompt_ids, until_end
from training.vocabulary import tokenizer_of_weights


@dataclass
class Settings:
    """Every setting is also a flag: --num_samples 3."""

    run: str = ""  # folder of the run, or one of its checkpoints; "": the run saved last
    out_dir: str = "out"  # folder of runs
    init_from: str = ""  # instead of a run: gpt2, gpt2-medium, -large, -xl, or a folder of weights
    data_dir: str = "data"  # folder in which downloaded weights and vocabularies are kept
    export: str = ""  # write the model for transformers to this folder, and no text
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


RANGES = {"max_new_tokens": (1, 2**31 - 1), "num_samples": (1, 10_000), "top_p": (1e-6, 1)}
SAMPLING = ("max_new_tokens", "num_samples", "temperature", "top_k", "top_p", "seed")
EXCLUDES = {
    "init_from": ("run", "out_dir"),
    "run": ("out_dir",),
    "prompt_file": ("prompt",),
    "interactive": ("prompt", "prompt_file"),
    "export": ("prompt", "prompt_file", "interactive", *SAMPLING),
}


@memory_errors("--num_samples")
def main() -> None:
    """Write text, or export the model, as the command line says."""
    settings = parse_settings(Settings, __doc__)
    check_ranges(settings, RANGES)
    check_conflicts(settings, EXCLUDES)
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
    model, tokenizer, metadata = load(settings, device)
    if settings.export:
        export(model, tokenizer, Path(settings.export))
        return
    generator = torch.Generator(device).manual_seed(settings.seed)
    continue_text = functools.partial(
        print_samples, settings, model, tokenizer, metadata, generator
    )
    if settings.interactive:
        answer_prompts(continue_text)
    else:
        continue_text(prompt)


def load_run(settings: Settings, device: torch.device) -> tuple[GPT, Tokenizer, dict | None]:
    """Return the model with the best weights of a run, and tokenizer and metadata of its corpus.

    Args:
        settings: Settings without init_from.
        device: Device of the model.

    Raises:
        FileNotFoundError: The run has no checkpoint, or the vocabulary is missing.
        ValueError: The checkpoint is damaged, or the vocabulary is another one.
    """
    run_dir = Path(settings.run) if settings.run else newest_run(settings.out_dir)
    if not is_run(run_of(run_dir)):
        raise FileNotFoundError(no_run_message(run_dir, settings.out_dir))
    checkpoint = best_checkpoint(run_dir)
    print(f"{run_dir}, step {checkpoint['step']}:", file=sys.stderr)
    metadata = checkpoint["metadata"]
    tokenizer = tokenizer_of(metadata, run_dir)
    if left_out_first_tokens(checkpoint):  # an older run, which cannot begin documents
        metadata = None
    return load_model(checkpoint, device), tokenizer, metadata


def load_pretrained(settings: Settings, device: torch.device) -> tuple[GPT, Tokenizer, None]:
    """Return a model in the Hugging Face layout and its tokenizer; its corpus is unknown.

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
