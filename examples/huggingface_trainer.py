"""Our batches in the transformers Trainer: windows of a prepared corpus, a small GPT-2.

    pip install "transformers[torch]"
    python prepare_data.py && python examples/huggingface_trainer.py --max_steps 200

TextDataset(..., item="huggingface") gives {"input_ids", "labels"}, both the same: the model shifts.
DocumentDataset with data_collator=pad_documents, and pack_documents, go the same way.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from common.script import run
from common.settings import parse_settings
from dataset import TextDataset, newest_corpus


@dataclass
class Settings:
    corpus: str = ""  # prepared corpus; "": the one prepared last
    data_dir: str = "data"  # folder of prepared corpora
    out_dir: str = "out/huggingface"  # for the Trainer's checkpoints
    batch_size: int = 8  # windows a step
    sequence_length: int = 128  # tokens a window
    max_steps: int = 200  # optimizer steps
    n_layer: int = 4  # blocks
    n_embd: int = 128  # channels, in heads of 32


def main():
    config = parse_settings(Settings, __doc__)
    folder = (
        Path(config.data_dir) / config.corpus if config.corpus else newest_corpus(config.data_dir)
    )
    T = config.sequence_length
    train, val = (TextDataset(folder / name, T, T, item="huggingface") for name in ("train", "val"))
    shape = dict(n_layer=config.n_layer, n_head=max(1, config.n_embd // 32), n_embd=config.n_embd)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=train.vocab_size, n_positions=T, **shape))
    arguments = TrainingArguments(
        config.out_dir, max_steps=config.max_steps, per_device_train_batch_size=config.batch_size,
        learning_rate=1e-3, eval_strategy="steps", eval_steps=config.max_steps, logging_steps=10,
        report_to="none",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, default_data_collator, train_dataset=train, eval_dataset=val
    )
    trainer.train()
    print(trainer.evaluate())


if __name__ == "__main__":
    run(main)
