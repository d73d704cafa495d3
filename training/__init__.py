"""Behind train_gpt2.py, sample.py and compare.py, where the training loop and the sampling are.

In the order in which a run uses them:

1. run_settings.py: the types of the settings. flags.py: where the settings come from. corpora.py:
   the corpora that the settings name, alone or in a mixture.
2. distributed.py: the ranks of a run. run_folder.py: the run's folder, and its lock.
3. device.py: device, number type, compiler, peak FLOP/s, memory. compute.py: the choices for this
   machine.
4. checkpoint.py: what is saved and restored. models.py: models, new or from weights.
   huggingface.py: weights in the Hugging Face layout. vocabulary.py: whether weights have
   the vocabulary of a corpus.
5. optimizer.py: Muon and AdamW. signals.py: signals that stop a run.
6. metrics.py, report.py: what a run writes and prints. sampling.py: text that continues a prompt.
   json_lines.py: metrics.jsonl and samples.jsonl. trackers.py: TensorBoard, trackio, wandb.
7. scored_text.py: the text to score. scoring.py: the loss of each token. score_page.py: the same as
   colored text and as a page. validation_text.py: which text a run is validated on, and scores of
   its beginning.
8. runs.py: runs as their small files describe them. plots.py: pictures. report_page.py:
   report.html.

Nothing here imports a script other than model.py.
"""
