"""Behind dataset.py: from the .bin files of a prepared corpus to batches.

In reading order:

1. tokens.py: the files of a split as one memory-mapped sequence.
2. order.py: the shuffled order and the batch samplers.
3. ../dataset.py: TextDataset, which makes windows (x, y) of tokens, and the data loaders.
4. mixture.py: several corpora in fixed proportions.
5. noise.py, collate.py: windows with token noise, as Hugging Face dicts, with document masks.
6. documents.py: whole documents, padding; document ids, positions and masks of a row.
7. packing.py: whole documents in rows of one length.
8. block_mask.py: the mask of flex_attention between documents.
9. streaming.py: raw text to windows, without preparing it.
10. preview.py: what `python dataset.py NAME` prints.

No module of this package imports dataset.py, training/ or model.py.
"""
