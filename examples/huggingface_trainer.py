"""Our batches in the Trainer of transformers: a small GPT-2 on windows of a prepared corpus.

    pip install "transformers[torch]"
    python prepare_data.py && python examples/huggingface_trainer.py --max_steps 200

collate_huggingface makes {"input_ids", "labels"} from the windows (x, y) of a TextDataset. The
model shifts the labels. For whole documents, use a DocumentDataset with
data_collator=pad_documents, or pack_documents(documents, T) with the default collator.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from common.script import run_script
from common.settings import parse_settings
from dataset import TextDataset, collate_huggingface, newest_corpus


@dataclass
class Settings:
    corpus: str = ""  # prepared corpus; "": the one prepared last
    data_dir: str = "data"  # folder of prepared corpora
    out_dir: str = "out/huggingface"  # folder for the checkpoints of the Trainer
    batch_size: int = 8  # sequences per step
    sequence_length: int = 128  # tokens per sequence
    max_steps: int = 200  # optimizer steps
    n_layer: int = 4  # transformer blocks
    n_embd: int = 128  # channels, in heads of 32


def main() -> None:
    """Train a small GPT-2 of transformers and print its validation loss."""
    settings = parse_settings(Settings, __doc__)
    if settings.corpus:
        folder = Path(settings.data_dir) / settings.corpus
    else:
        folder = newest_corpus(settings.data_dir)
    T = settings.sequence_length
    train = TextDataset(folder / "train", T, stride=T)
    val = TextDataset(folder / "val", T, stride=T)
    model_config = GPT2Config(
        vocab_size=train.vocab_size,
        n_positions=T,
        n_layer=settings.n_layer,
        n_head=max(1, settings.n_embd // 32),
        n_embd=settings.n_embd,
    )
    arguments = TrainingArguments(
        settings.out_dir,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=settings.max_steps,
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
    run_script(main)
