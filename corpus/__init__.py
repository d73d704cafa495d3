"""Behind prepare_data.py: raw text to token files.

In the order of a corpus's way:

1. inputs.py: a corpus as a list of sources. catalog.py: corpora that can be downloaded;
   download.py, archives.py: their files; files.py, folders.py, split_names.py, hub.py,
   descriptions.py: values of --input.
2. sources.py: an input file, or a chunk of it. opening.py: its uncompressed bytes, and what is not
   text; boundaries.py: places at which a text may be divided; reader.py, tables.py: chunks to
   documents. fast_json.py: a faster package for plain lines of JSON.
3. tokenizer.py: text to token ids and back. divisible.py: whether a tokenizer.json lets a running
   text be divided. vocabulary_files.py: the files of vocabularies on this machine;
   gpt2_encoding.py: GPT-2's, loaded fast; json_encoding.py: a tokenizer.json for tiktoken.
   vocabulary.py: the bytes that an id stands for. encoders.py: a faster package with the same
   ids. bpe.py: a vocabulary trained on the corpus.
4. pipeline.py: all steps, in order. existing.py: what data/NAME/ holds before; planning.py:
   sources to chunks and tasks; tasks.py: what one worker does; engines.py: processes or Ray;
   shards.py: the files of all tasks to shards.
5. metadata.py, token_files.py: what data/NAME/ holds afterwards. verify.py: whether a prepared
   corpus is as it should be.

What gives a document its split: split_names.py, for files whose names say it; planning.py, for a
running text; assign_split in tasks.py, for all other documents, by a hash.

Nothing here imports batches/, training/ or a script.
"""
