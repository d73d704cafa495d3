"""Our batches in the Trainer of transformers: windows of a prepared corpus, a small GPT-2.

    pip install "transformers[torch]"
    python prepare_data.py && python examples/huggingface_trainer.py --max_steps 200

collate_huggingface makes {"input_ids", "labels"} of the windows (x, y) of a TextDataset; the model
shifts the labels. Whole documents work the same way: a DocumentDataset with
data_collator=pad_documents, or pack_documents(documents, T) with the default collator.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from common.script import run
from common.settings import parse_flags
from dataset import TextDataset, collate_huggingface, newest_corpus


@dataclass
class Config:
    corpus: str = ""  # prepared corpus; "": the one prepared last
    data_dir: str = "data"  # folder of prepared corpora
    out_dir: str = "out/huggingface"  # folder of the Trainer's checkpoints
    batch_size: int = 8  # sequences per step
    sequence_length: int = 128  # tokens per sequence
    max_steps: int = 200  # optimizer steps
    n_layer: int = 4  # blocks
    n_embd: int = 128  # channels, in heads of 32


def main():
    config = parse_flags(Config, __doc__)
    if config.corpus:
        folder = Path(config.data_dir) / config.corpus
    else:
        folder = newest_corpus(config.data_dir)
    T = config.sequence_length
    train = TextDataset(folder / "train", T, stride=T)
    val = TextDataset(folder / "val", T, stride=T)
    model_config = GPT2Config(
        vocab_size=train.vocab_size,
        n_positions=T,
        n_layer=config.n_layer,
        n_head=max(1, config.n_embd // 32),
        n_embd=config.n_embd,
    )
    arguments = TrainingArguments(
        config.out_dir,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=config.max_steps,
        logging_steps=10,
        report_to="none",
    )
    trainer = Trainer(
        GPT2LMHeadModel(model_config),
        arguments,
        data_collator=collate_huggingface,
        train_dataset=train,
        eval_dataset=val,
    )
    trainer.train()
    print(trainer.evaluate())


if __name__ == "__main__":
    run(main)
