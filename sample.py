"""Writes text with a trained model.

python sample.py --prompt "ROMEO:"                          # the newest run
python sample.py --run out/mine --num_samples 3 --temperature 0.7
python sample.py --init_from gpt2 --interactive             # OpenAI's weights, prompt by prompt
echo "To be" | python sample.py --prompt -
python sample.py --run out/mine --export mine               # for transformers
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common.script import run
from common.settings import check_conflicts, check_ranges, parse_settings
from corpus.tokenizer import (
    HuggingFaceTokenizer,
    fetch_vocabulary,
    get_tokenizer,
    vocabularies_beside,
)
from model import GPT
from training.checkpoint import best_checkpoint, load_model
from training.device import choose_device, memory_errors
from training.huggingface import pretrained_folder
from training.run_folder import newest_run


@dataclass
class Settings:
    run: str = ""  # folder of the run; "": the one saved last
    out_dir: str = "out"  # folder of runs
    init_from: str = ""  # no run, but gpt2, gpt2-medium, -large, -xl, or a folder with weights
    data_dir: str = "data"  # folder in which those, and vocabularies, are kept
    export: str = ""  # write the model, for transformers, to this folder, and no text
    prompt: str = "\n"  # text to go on from; "-": standard input; "": as a document begins
    prompt_file: str = ""  # file to read the prompt from
    interactive: bool = False  # ask for one prompt after another; Ctrl-D ends
    max_new_tokens: int = 300  # tokens that are added to the prompt
    num_samples: int = 1  # texts that are made at once
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model's own probabilities
    top_k: int = 50  # choose among so many of the likeliest tokens; 0: among all
    top_p: float = 1.0  # choose among the likeliest tokens that hold this share of the probability
    seed: int = 0  # of the choices: the same seed gives the same text
    device: str = "auto"  # cpu, cuda, mps; auto: cuda when there, else cpu


LIMITS = {"max_new_tokens": (1, 2**31 - 1), "num_samples": (1, 10_000), "top_p": (1e-6, 1)}
SAMPLING = ("max_new_tokens", "num_samples", "temperature", "top_k", "top_p", "seed")
WITHOUT = {
    "init_from": ("run", "out_dir"),
    "run": ("out_dir",),
    "prompt_file": ("prompt",),
    "interactive": ("prompt", "prompt_file"),
    "export": ("prompt", "prompt_file", "interactive", *SAMPLING),
}


@memory_errors("--num_samples")
def main():
    settings = parse_settings(Settings, __doc__)
    check_ranges(settings, LIMITS)
    check_conflicts(settings, WITHOUT)
    prompt = read_prompt(settings)
    model, tokenizer = load(settings)
    if settings.export:
        if (Path(settings.export) / "config.json").exists():  # a run has one, too
            raise FileExistsError(f"{settings.export} holds a model already: choose another folder")
        model.save_pretrained(settings.export, tokenizer)
        return print(f"wrote {settings.export}/: transformers' from_pretrained reads it")
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    if not settings.interactive:
        return write(settings, model, tokenizer, generator, prompt)
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
            return print()
        try:
            write(settings, model, tokenizer, generator, prompt)
        except KeyboardInterrupt:  # of this text, not of the loop
            print()


def load(settings):
    """The model, ready to generate, and its tokenizer."""
    settings.device = choose_device(settings.device).value
    vocabularies_beside(settings.data_dir)
    if settings.init_from:
        folder = pretrained_folder(settings.init_from, settings.data_dir)
        model = GPT.from_pretrained(folder).to(settings.device).eval()
        if (folder / "tokenizer.json").exists():
            tokenizer = HuggingFaceTokenizer(folder.name, folder / "tokenizer.json")
        else:  # as where OpenAI's weights were downloaded to
            fetch_vocabulary("gpt2")
            tokenizer = get_tokenizer("gpt2")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{folder} has {model.config.vocab_size:,} ids, too few for {tokenizer.name}'s "
                f"{tokenizer.vocab_size:,}: put the tokenizer.json of its vocabulary there"
            )
        return model, tokenizer
    folder = Path(settings.run) if settings.run else newest_run(settings.out_dir)
    checkpoint = best_checkpoint(folder)
    print(f"{folder}, step {checkpoint['step']}:", file=sys.stderr)
    tokenizer = get_tokenizer(checkpoint["metadata"]["tokenizer"]["name"])
    return load_model(checkpoint, settings.device), tokenizer


def read_prompt(settings) -> str:
    """Raises OSError, or ValueError for bytes that are no text."""
    if settings.prompt_file:
        data = Path(settings.prompt_file).read_bytes()
    elif settings.prompt == "-":
        data = sys.stdin.buffer.read()
    else:
        return settings.prompt
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = settings.prompt_file or "standard input"
        raise ValueError(f"{where} is no UTF-8 text: see its byte {error.start:,}") from None


def write(settings, model, tokenizer, generator, prompt) -> None:
    """Prints samples: one while it is made, several one below the other."""
    # nothing to go on from: begin as a document begins, after an end of text
    ids = tokenizer.encode(prompt).astype("int64") if prompt else [tokenizer.eot_token]
    ids = torch.as_tensor(ids, device=settings.device).expand(settings.num_samples, -1)  # (B, T)
    new = model.generate(
        ids,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        generator,
    )
    if settings.num_samples == 1:
        print(prompt, end="", flush=True)
        for text in tokenizer.decode_stream(token.item() for token in new):
            print(text, end="", flush=True)
        return print("\n")
    for sample in torch.stack(list(new), dim=1).tolist():
        print(f"{prompt}{''.join(tokenizer.decode_stream(sample))}\n---")


if __name__ == "__main__":
    run(main)
