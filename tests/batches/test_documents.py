"""Documents: datasets, ids, positions, masks, padding and packing."""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from batches.packing import best_fit
from dataset import (
    DocumentDataset,
    document_ids,
    document_mask,
    document_positions,
    pack_documents,
    pad_documents,
)

EOT = 256


def test_ids_positions_and_mask_equal_a_loop_over_tokens():
    rows = torch.from_numpy(np.random.default_rng(0).integers(250, 258, (20, 30)))
    ids = document_ids(rows, EOT)
    positions = document_positions(ids)
    mask = document_mask(ids)
    for row, row_ids, row_positions, row_mask in zip(
        rows.tolist(), ids.tolist(), positions.tolist(), mask.tolist()
    ):
        document = 0
        position = 0
        for i, token in enumerate(row):
            if token == EOT:
                document += 1
                position = 0
            assert row_ids[i] == document
            assert row_positions[i] == position
            assert row_mask[i] == [row_ids[j] == document and j <= i for j in range(30)]
            position += 1
    assert ids.dtype == positions.dtype == torch.int64 and mask.dtype == torch.bool


def test_a_document_dataset_has_all_documents_up_to_max_length(tmp_path):
    texts = ["abc", "", "defghij", "kl"] * 25
    make_corpus(tmp_path / "c", texts, documents=True)
    for max_length in (None, 100, 4, 1):
        found = []
        num_tokens = 0
        num_kept = 0
        for name in ("train", "val"):
            documents = DocumentDataset(tmp_path / "c" / name, max_length)
            found += [documents[i].tolist() for i in range(len(documents))]
            assert [len(documents[i]) for i in range(len(documents))] == documents.lengths.tolist()
            counts = documents.count_tokens()
            assert sum(counts.values()) == len(documents.tokens)
            num_tokens += len(documents.tokens)
            num_kept += counts["trained"]
        expected = [[*text.encode(), EOT][:max_length] for text in texts]
        assert sorted(found) == sorted(expected)
        assert num_kept == sum(map(len, expected))
        assert num_tokens == sum(len(text) + 1 for text in texts)
    with pytest.raises(ValueError, match="max_length must be at least 1, not 0"):
        DocumentDataset(tmp_path / "c" / "train", 0)


def test_the_last_document_may_have_no_end():
    tokens = np.array([1, 2, EOT, EOT, 3, 4])
    documents = DocumentDataset(tokens, eot_token=EOT)
    assert [d.tolist() for d in documents] == [[1, 2, EOT], [EOT], [3, 4]]
    with pytest.raises(ValueError, match="eot_token"):
        DocumentDataset(tokens)


def test_views_divide_the_documents_of_a_split(tmp_path):
    make_corpus(tmp_path / "c", ["abc", "de", "fghij"] * 40, documents=True)
    whole = DocumentDataset(tmp_path / "c" / "train", 4)
    for size, count in ((0.25, -(-len(whole) // 4)), (10, 10)):
        first, last = whole.split(size)
        assert len(last) == count and len(first) + len(last) == len(whole)
        both = itertools.chain(first, last)
        assert all(torch.equal(a, b) for a, b in itertools.zip_longest(both, whole))
    with pytest.raises(ValueError, match="can't be split by"):
        whole.split(len(whole))


def test_padding_keeps_every_end_of_text_as_a_label():
    """Labels come from lengths, so the end-of-text token may also be the padding."""
    documents = [torch.tensor(ids) for ids in ([5, 6, 7, EOT], [8, EOT], [EOT])]
    batch = pad_documents(documents, pad_token=EOT)
    assert batch["input_ids"].tolist() == [[5, 6, 7, EOT], [8, EOT, EOT, EOT], [EOT] * 4]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [5, 6, 7, EOT], [8, EOT, -100, -100], [EOT, -100, -100, -100]
    ]  # fmt: skip
    assert (batch["labels"] == EOT).sum(1).tolist() == [1, 1, 1]
    assert all(rows.dtype == torch.int64 for rows in batch.values())


def test_a_padded_batch_is_as_long_as_its_longest_document(tmp_path):
    make_corpus(tmp_path / "c", ["abc"] * 50, documents=True)
    documents = DocumentDataset(tmp_path / "c" / "train", max_length=1024)
    batch = next(iter(DataLoader(documents, batch_size=4, collate_fn=pad_documents)))
    assert batch["input_ids"].shape == (4, 4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 16))
def test_packing_keeps_every_token(lengths, T):
    documents = [torch.arange(n) + 100 * i for i, n in enumerate(lengths, 1)]
    packed = pack_documents(documents, T)
    rows = [packed[i] for i in range(len(packed))]
    counts = packed.count_tokens()
    assert counts["trained"] + counts["cut"] == sum(lengths)
    assert counts["trained"] + counts["padded"] == len(packed) * T
    found = [i for row in rows for i in row["input_ids"][row["document_ids"] >= 0].tolist()]
    assert sorted(found) == sorted(i for document in documents for i in document.tolist())
    for row in rows:
        for number in row["document_ids"].unique():
            members = row["document_ids"] == number
            ids = row["input_ids"][members]
            labels = row["labels"][members]
            assert row["position_ids"][members].tolist() == list(range(len(ids)))
            if number == -1:
                assert (labels == -100).all() and (ids == 0).all() and members[-1]
                continue
            assert labels.tolist() == [-100, *ids[1:].tolist()]
            assert (ids.diff() == 1).all()  # the tokens belong to one document
            whole = len(documents[int(ids[0]) // 100 - 1])
            assert len(ids) == whole if whole <= T else len(ids) in (T, whole % T)


def test_best_fit_equals_an_example_by_hand():
    """Lengths 5 5 4 3 3 2 fill rows of 8 as 5 + 3, 5 + 3, 4 + 2."""
    assert best_fit(np.array([3, 5, 2, 4, 5, 3]), 8).tolist() == [1, 0, 2, 2, 1, 0]
    assert best_fit(np.array([], np.int64), 8).tolist() == []
    # 6 leaves space for 4 and 7 leaves space for 3, so 3 goes to the row of 7
    assert best_fit(np.array([6, 7, 3]), 10).tolist() == [1, 0, 0]


def test_packed_rows_of_a_corpus_have_the_shape_of_a_batch(tmp_path):
    make_corpus(tmp_path / "c", ["abc", "defgh", "i" * 30] * 30, documents=True)
    documents = DocumentDataset(tmp_path / "c" / "train", max_length=20)
    packed = pack_documents(documents, 16)
    counts = packed.count_tokens()
    assert counts["trained"] + counts["cut"] == len(documents.tokens)
    assert counts["cut"] == documents.count_tokens()["cut"] > 0
    batch = next(iter(DataLoader(packed, batch_size=4)))
    assert {name: rows.shape for name, rows in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels", "document_ids"), (4, 16)
    )
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_the_docstring_examples_of_rows():
    row = torch.tensor([5, 6, EOT, 7, EOT, 8])
    doc_ids = document_ids(row, EOT)
    assert doc_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert document_positions(doc_ids).tolist() == [0, 1, 0, 1, 0, 1]
    assert document_mask(torch.tensor([0, 0, 1])).int().tolist() == [
        [1, 0, 0], [1, 1, 0], [0, 0, 1]
    ]  # fmt: skip
    documents = [torch.tensor([5, 6, EOT]), torch.tensor([7, EOT])]
    packed = pack_documents(documents, 6)[0]
    assert packed["input_ids"].tolist() == [5, 6, EOT, 7, EOT, 0]
    assert packed["document_ids"].tolist() == [0, 0, 0, 1, 1, -1]
    assert packed["position_ids"].tolist() == [0, 1, 2, 0, 1, 0]
    assert packed["labels"].tolist() == [-100, 6, EOT, -100, EOT, -100]


def test_documents_can_begin_with_an_end_of_text():
    """Then the first token of each document is a label, too."""
    row = [5, 6, EOT, 7, EOT]
    documents = DocumentDataset(row, eot_token=EOT, begin_with_eot=True)
    assert [document.tolist() for document in documents] == [[EOT, 5, 6, EOT], [EOT, 7, EOT]]
    assert documents.lengths.tolist() == [4, 3]
    assert documents.count_tokens() == {"trained": 5, "cut": 0}
    assert [part[0].tolist() for part in documents.split(1)] == [[EOT, 5, 6, EOT], [EOT, 7, EOT]]
    rows = pack_documents(documents, 8)
    assert rows[0]["input_ids"].tolist() == [EOT, 5, 6, EOT, EOT, 7, EOT, 0]
    assert rows[0]["labels"].tolist() == [-100, 5, 6, EOT, -100, 7, EOT, -100]
    assert rows.count_tokens() == {"trained": 5, "padded": 1, "cut": 0}
    cut = DocumentDataset(row, max_length=2, eot_token=EOT, begin_with_eot=True)
    assert [document.tolist() for document in cut] == [[EOT, 5], [EOT, 7]]
    assert cut.count_tokens() == {"trained": 2, "cut": 3}
    with pytest.raises(ValueError, match="max_length must be at least 2, not 1"):
        DocumentDataset(row, max_length=1, eot_token=EOT, begin_with_eot=True)


def test_wrong_arguments_are_errors(tmp_path):
    make_corpus(tmp_path / "c", ["one running text, " * 100])
    with pytest.raises(ValueError, match=r"one running text without documents.*TextDataset"):
        DocumentDataset(tmp_path / "c" / "train", 512)
    with pytest.raises(ValueError, match="c is a corpus: choose one of its splits"):
        DocumentDataset(tmp_path / "c")
    with pytest.raises(ValueError, match="is empty"):
        DocumentDataset([], eot_token=EOT)
    documents = DocumentDataset(np.array([1, EOT, 2, EOT]), eot_token=EOT)
    for size in (1.0, 0, -1, True, 1.5):
        with pytest.raises(ValueError, match=f"can't be split by {size}: give a share"):
            documents.split(size)
    with pytest.raises(IndexError, match="document 2 is out of range: the array has 2"):
        documents[2]
    with pytest.raises(ValueError, match="no documents to pad"):
        pad_documents([])
    with pytest.raises(ValueError, match="sequence_length must be at least 1, not 0"):
        pack_documents(documents, 0)
