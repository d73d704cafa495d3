"""train_gpt2.py on a real GPU: dtypes, compiling, resuming, accumulation, out of memory."""

import pytest
import torch
from conftest import TINY, losses, make_corpus

from model import GPT, GPTConfig
from training.checkpoint import last_checkpoint

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(600)]
SHAPE = {"n_embd": 64, "sequence_length": 64, "compile": "false"}  # heads of 32 channels


@pytest.fixture
def run(train, device):
    """A function run(max_steps=8, ...) that trains on the device and returns the run's folder."""

    def run(**flags):
        if "resume" not in flags:
            flags = {"max_steps": 8, "device": str(device)} | SHAPE | flags
        return train(**flags)

    return run


def assert_near(actual: dict, expected: dict, rel: float) -> None:
    assert actual.keys() == expected.keys()
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=rel), step


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_dtype_trains(run, device, dtype):
    if dtype == "float16" and device.type == "cpu":
        pytest.skip("float16 trains on CUDA alone")
    expected = losses(run(run_name="float32"))
    actual = losses(run(run_name=dtype, dtype=dtype))
    # the scaler of float16 may skip the first steps, which shifts the losses
    assert actual[1] == pytest.approx(expected[1], rel=0.01)
    assert actual[8] < actual[1]
    if dtype == "bfloat16":
        assert_near(actual, expected, 0.03)


def test_a_compiled_model_gives_the_same_losses(run, gpu):
    expected = losses(run(run_name="eager"))
    assert_near(losses(run(run_name="compiled", compile="true")), expected, 0.005)


@pytest.mark.parametrize("compile", ["false", "true"])
def test_both_document_masks_give_the_same_losses(run, device, tmp_path, compile, capsys):
    """--compile true takes flex_attention, and --compile false takes the dense mask."""
    if compile == "true" and device.type == "cpu":
        pytest.skip("flex_attention does not train on a CPU")
    texts = [f"{i} for sorrow, {i} for mirth" for i in range(300)]
    make_corpus(tmp_path / "data" / "documents", texts, documents=True)
    flags = {"corpus": "documents", "document_mask": "true"}
    dense = losses(run(run_name="dense", **flags))
    assert "a dense mask" in capsys.readouterr().out
    actual = losses(run(run_name="again", **flags, compile=compile))
    if compile == "true":
        assert "documents do not attend to each other: flex_attention" in capsys.readouterr().out
    assert_near(actual, dense, 0.01)


def test_small_heads_take_the_dense_mask(run, gpu, tmp_path, capsys):
    make_corpus(tmp_path / "data" / "documents", ["a b c", "d e f"] * 300, documents=True)
    run(corpus="documents", n_embd=16, compile="true")  # heads of 8 channels
    assert "it needs heads of at least 16 channels" in capsys.readouterr().out


def test_dropout_follows_the_seed_of_the_run(run):
    with_dropout = losses(run(run_name="dropout", dropout=0.5))
    assert with_dropout == pytest.approx(losses(run(run_name="again", dropout=0.5)), rel=1e-3)
    assert with_dropout != losses(run(run_name="none"))


def test_accumulated_micro_batches_equal_one(run):
    expected = losses(run(run_name="one"))
    assert_near(losses(run(run_name="four", micro_batch_size=1)), expected, 1e-3)


def test_init_from_starts_with_the_loss_of_the_weights(run, tmp_path):
    """save_pretrained has written the folder of the weights."""
    torch.manual_seed(0)
    GPT(GPTConfig(257, 64, n_layer=1, n_head=2, n_embd=32)).save_pretrained(tmp_path / "weights")
    names = ("batch_size", "eval_every", "log_every", "warmup_steps", "dtype")
    flags = {name: TINY[name] for name in names}
    flags |= {"init_from": tmp_path / "weights", "max_steps": 4, "sequence_length": 64}
    result = run_without_shape(run, flags)
    assert last_checkpoint(result)["model_config"]["n_embd"] == 32
    assert losses(result)[1] == pytest.approx(5.55, abs=0.3)


def run_without_shape(run, flags):
    """Run without the shape in TINY and SHAPE, because --init_from has a shape."""
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd"))
    with pytest.MonkeyPatch.context() as patch:
        for name in shape:
            patch.delitem(TINY, name)
        patch.delitem(SHAPE, "n_embd")
        return run(**flags)


def test_out_of_memory_is_an_error_that_names_two_flags(run, gpu):
    """The process may use a small part of the memory, so the real allocator fails."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.set_per_process_memory_fraction(64 * 2**20 / total, gpu)
    try:
        with pytest.raises(ValueError) as error:
            run(batch_size=64, sequence_length=512, n_embd=256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
        torch.cuda.empty_cache()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert "--micro_batch_size" in message and "--sequence_length" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_resumes_on_the_same_device(run, device, dtype):
    if dtype == "float16" and device.type == "cpu":
        pytest.skip("float16 trains on CUDA alone")
    whole = run(run_name="whole", dtype=dtype)
    part = run(run_name="part", dtype=dtype, stop_at=4)
    saved = last_checkpoint(part)
    if dtype == "float16":
        assert saved["scaler"]["scale"] > 0
    run(resume=part)
    assert_near(losses(part), losses(whole), 1e-3)
    if dtype == "float16":
        names = ("scaler", "skipped_steps")
        ends = last_checkpoint(part), last_checkpoint(whole)
        assert [ends[0][name] for name in names] == [ends[1][name] for name in names]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_resume_is_exact_with_deterministic_kernels(run, device, dtype, monkeypatch):
    """Attention uses plain matrix products, and cuBLAS has a fixed workspace."""
    if dtype == "float16" and device.type == "cpu":
        pytest.skip("float16 trains on CUDA alone")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            whole = run(run_name="whole", dtype=dtype)
            part = run(run_name="part", dtype=dtype, stop_at=4)
            run(resume=part)
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(part) == losses(whole)
    weights, expected = last_checkpoint(part)["model"], last_checkpoint(whole)["model"]
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_a_run_resumes_on_the_cpu_and_back(run, device):
    whole = run(run_name="whole", max_steps=9)
    part = run(run_name="part", max_steps=9, stop_at=3)
    run(resume=part, device="cpu", stop_at=6)
    run(resume=part, device=str(device))
    assert_near(losses(part), losses(whole), 5e-3)


def test_a_run_frees_its_memory(run, gpu):
    """A second run leaves no more memory allocated than the first run."""
    run(run_name="first")
    before = torch.cuda.memory_allocated(gpu)
    run(run_name="second")
    assert torch.cuda.memory_allocated(gpu) <= before + 2**20
