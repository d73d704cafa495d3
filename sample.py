"""Writes text with a trained model.

python sample.py --prompt "ROMEO:"                          # the newest run
python sample.py --run out/mine --num_samples 3 --temperature 0.7
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import best_checkpoint, load_model, newest_run
from common import parse_flags, run
from device import choose_device
from tokenizer import get_tokenizer


@dataclass
class Config:
    run: str = ""  # folder of the run; "": the newest
    out_dir: str = "out"  # folder of runs
    prompt: str = "\n"  # text to go on from
    max_new_tokens: int = 300  # tokens a sample
    num_samples: int = 1  # samples, one after the other
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model's own probabilities
    top_k: int = 50  # choose among that many likeliest tokens; 0: all
    top_p: float = 1.0  # choose among the likeliest tokens that hold this much probability
    seed: int = 0  # of the choices
    device: str = "auto"  # cpu, cuda, mps; auto: cuda when there, else cpu


def main():
    config = parse_flags(Config, __doc__)
    if config.temperature < 0 or not 0 < config.top_p <= 1 or config.top_k < 0:
        raise ValueError(
            f"temperature ({config.temperature}) and top_k ({config.top_k}) start at 0, and top_p "
            f"({config.top_p}) lies above 0 and up to 1"
        )
    device = choose_device(config.device)
    folder = Path(config.run) if config.run else newest_run(config.out_dir)
    checkpoint = best_checkpoint(folder)
    model = load_model(checkpoint, device)
    tokenizer = get_tokenizer(checkpoint["metadata"]["tokenizer"]["name"])
    print(f"{folder}, step {checkpoint['step']}:", file=sys.stderr)
    generator = torch.Generator(device).manual_seed(config.seed)
    # nothing to go on from: begin as a document begins, after an end of text
    prompt = (
        tokenizer.encode(config.prompt).astype("int64") if config.prompt else [tokenizer.eot_token]
    )
    prompt = torch.as_tensor(prompt, device=device)[None]  # (1, T)
    for _ in range(config.num_samples):
        new = model.generate(
            prompt,
            config.max_new_tokens,
            config.temperature,
            config.top_k,
            config.top_p,
            generator,
        )
        print(config.prompt, end="", flush=True)
        for text in tokenizer.decode_stream(token.item() for token in new):
            print(text, end="", flush=True)
        print("\n" if config.num_samples == 1 else "\n---")


if __name__ == "__main__":
    run(main)
