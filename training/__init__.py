"""Behind train_gpt2.py and sample.py, where the training loop and the sampling are.

In the order in which a run uses them:

1. run_settings.py: flags, the settings of a resumed run, sizes; the choices for this machine.
2. device.py: device, number type, compiler, peak FLOP/s, memory.
3. distributed.py: the ranks of a run. signals.py: signals that stop it.
4. optimizer.py: Muon and AdamW.
5. checkpoint.py: what is saved and restored. huggingface.py: weights in the Hugging Face layout.
6. run_folder.py, metrics.py, report.py: what a run writes and prints.

Nothing here imports a script other than model.py.
"""
