"""The examples train, and transformers accepts our batches."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_corpus

from corpus.catalog import CATALOG
from dataset import (
    DocumentDataset,
    TextDataset,
    collate_huggingface,
    document_ids,
    pack_documents,
    pad_documents,
)

sys.path.insert(0, str(ROOT / "examples"))
pytestmark = pytest.mark.filterwarnings("ignore")  # lightning and transformers warn


@pytest.fixture
def wikitext(tmp_path) -> Path:
    """The folder data/ with 30 short articles in place of the download of WikiText-2."""
    folder = tmp_path / "data" / "wikitext-2"
    folder.mkdir(parents=True)
    for number, source in enumerate(CATALOG["wikitext-2"].sources):
        articles = (f" = Article {number}.{i} = \n \n Some words. \n \n" for i in range(30))
        (folder / source.path).write_text("".join(articles))
    return tmp_path / "data"


@pytest.mark.parametrize("packing", [False, True])
def test_the_lightning_example_learns(wikitext, packing):
    L = pytest.importorskip("lightning", reason="needs lightning")
    pytest.importorskip("transformers", reason="needs transformers")
    from lightning_datamodule import LitGPT2, LLMDataModule

    data = LLMDataModule(
        tokenizer="bytes", batch_size=4, max_length=48, packing=packing, data_dir=wikitext
    )
    model = LitGPT2(257, n_positions=48, n_layer=1, n_head=2, n_embd=16)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data)
    train = data.splits["train"]
    assert isinstance(train, DocumentDataset) != packing
    assert trainer.global_step == 2 * (len(train) // 4)
    assert trainer.callback_metrics["val_loss"] < 5.55  # ln(257): the model has learned something
    (tested,) = trainer.test(model, data, verbose=False)
    assert 0 < tested["test_loss"] < 5.55
    batch = next(iter(data.train_dataloader()))
    if packing:
        assert batch.keys() == {"input_ids", "labels", "position_ids", "document_ids"}
        assert batch["input_ids"].shape == (4, 48)
    else:
        assert batch.keys() == {"input_ids", "labels", "attention_mask"}
        assert (batch["input_ids"] == 256).sum() == 4  # one end of text per document
        assert batch["input_ids"].shape[1] < 48  # the longest of the batch, not max_length


def test_the_losses_of_the_lightning_example_are_means_over_tokens(tmp_path):
    """The mean over documents, or over batches, would depend on the size of the batches."""
    L = pytest.importorskip("lightning", reason="needs lightning")
    pytest.importorskip("transformers", reason="needs transformers")
    from lightning_datamodule import LitGPT2

    texts = ["a", "bc" * 20, "d", "efgh" * 5] * 10
    make_corpus(tmp_path / "c", texts, documents=True)
    documents = DocumentDataset(tmp_path / "c" / "train")
    torch.manual_seed(0)
    model = LitGPT2(257, n_positions=48, n_layer=1, n_head=2, n_embd=16)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        expected = model.loss(pad_documents([documents[i] for i in range(len(documents))]))
    for batch_size in (1, 3):
        loader = torch.utils.data.DataLoader(documents, batch_size, collate_fn=pad_documents)
        (validated,) = trainer.validate(model, loader, verbose=False)
        (tested,) = trainer.test(model, loader, verbose=False)
        assert validated["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert tested["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_lightning_example_decays_no_weights():
    """AdamW's default would also decay norms, biases and embeddings."""
    pytest.importorskip("lightning", reason="needs lightning")
    pytest.importorskip("transformers", reason="needs transformers")
    from lightning_datamodule import LitGPT2

    optimizer = LitGPT2(257, n_layer=1, n_head=1, n_embd=8).configure_optimizers()
    assert [param_group["weight_decay"] for param_group in optimizer.param_groups] == [0]


def test_the_huggingface_trainer_example_learns(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate")
    import huggingface_trainer

    make_corpus(tmp_path / "data" / "c", ["one for sorrow, two for mirth\n" * 100])
    monkeypatch.chdir(tmp_path)
    flags = ["--max_steps", "12", "--sequence_length", "16", "--n_layer", "1", "--n_embd", "32"]
    monkeypatch.setattr(sys, "argv", ["huggingface_trainer.py", *flags])
    trained = []
    monkeypatch.setattr("builtins.print", lambda *values: trained.append(values[0]))
    huggingface_trainer.main()
    assert trained[-1]["eval_loss"] < 5.5  # ln(257) is 5.55


def test_transformers_keeps_packed_documents_separate(tmp_path):
    """A document has the same logits in a packed row as in a row by itself."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    make_corpus(tmp_path / "c", ["abc", "defgh", "ijklmnop"] * 10, documents=True)
    documents = DocumentDataset(tmp_path / "c" / "train")
    row = pack_documents(documents, 32)[0]
    torch.manual_seed(0)
    shape = dict(n_positions=32, n_layer=2, n_head=2, n_embd=16)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=257, **shape)).eval()
    with torch.no_grad():
        packed = model(
            input_ids=row["input_ids"][None],
            position_ids=row["position_ids"][None],
            use_cache=False,  # with a cache, transformers treats the row as one document
        ).logits[0]
        for number in range(int(row["document_ids"].max()) + 1):
            members = row["document_ids"] == number
            alone = model(input_ids=row["input_ids"][members][None]).logits[0]
            torch.testing.assert_close(packed[members], alone, atol=1e-5, rtol=0)


def test_transformers_computes_the_expected_loss_from_our_labels(tmp_path):
    """transformers shifts the labels: the loss is the mean over next tokens inside documents."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    make_corpus(tmp_path / "c", ["abc", "defgh", "ij"] * 10, documents=True)
    documents = DocumentDataset(tmp_path / "c" / "train")
    shape = dict(n_positions=32, n_layer=1, n_head=1, n_embd=8)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=257, **shape)).eval()
    batch = [documents[i] for i in range(4)]
    nats = 0
    with torch.no_grad():
        loss = model(**pad_documents(batch, pad_token=256)).loss
        for ids in batch:
            logits = model(ids[None]).logits[0, :-1]
            nats += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    torch.testing.assert_close(loss, nats / sum(len(ids) - 1 for ids in batch))
    windows = TextDataset(tmp_path / "c" / "train", 16)
    batch = collate_huggingface([windows[3], windows[4]])
    assert document_ids(batch["labels"], 256).max() > 0
    with torch.no_grad():
        loss = model(**batch).loss
        logits = model(batch["input_ids"]).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()
        )
    torch.testing.assert_close(loss, expected)
