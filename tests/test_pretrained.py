import json

import pytest
import torch
from conftest import assert_one_line_error, make_corpus, run_script
from safetensors.torch import load_file, save_file
from test_tokenizer import HOSTILE

from checkpoint import load_checkpoint
from hugging_face import pretrained_folder
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def small(vocab_size=257) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, n_positions=24, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in model.parameters():  # GPT-2's initialisation leaves biases at 0
        torch.nn.init.normal_(p, std=0.2)
    return model


def logits(model, rows):
    with torch.no_grad():
        out = model(rows)
    return out.logits if hasattr(out, "logits") else out[0]


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers")


def test_transformers_loads_ours(tmp_path, transformers):
    """The same logits, and the same greedy text, from the text on."""
    model, tokenizer = small(), get_tokenizer("bytes")
    model.save_pretrained(tmp_path, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    theirs, found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = torch.randint(0, 257, (3, 24))
    torch.testing.assert_close(logits(theirs, rows), logits(model, rows), atol=1e-4, rtol=0)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = their_tokenizer("Once more unto", return_tensors="pt")
    text = theirs.generate(**prompt, max_new_tokens=9, do_sample=False)[0]
    ids = torch.from_numpy(tokenizer.encode("Once more unto").astype("int64"))[None]
    ours = torch.cat([ids[0], *model.generate(ids, 9, temperature=0)])
    # theirs ends with a document
    assert text.tolist() == ours.tolist()[: len(text)] and (len(text) == 23 or text[-1] == 256)
    assert their_tokenizer.decode(text) == tokenizer.decode(ours[: len(text)])


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_we_load_theirs(tmp_path, transformers, prefix):
    """Also as the hub has GPT-2: without a prefix, with buffers of the masks."""
    shape = dict(vocab_size=60, n_positions=24, n_layer=2, n_head=2, n_embd=16)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    theirs.save_pretrained(tmp_path)
    if not prefix:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
        save_file(tensors, tmp_path / "model.safetensors")
    model = GPT.from_pretrained(tmp_path).eval()
    rows = torch.randint(0, 60, (3, 24))
    torch.testing.assert_close(logits(model, rows), logits(theirs, rows), atol=1e-4, rtol=0)
    assert all(p.requires_grad for p in model.parameters())


def test_there_and_back_is_the_same_model(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert back.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, back.state_dict()[name]), name


def test_padding_of_the_vocabulary_is_cut(tmp_path, transformers):
    model = small(320)
    model.save_pretrained(tmp_path, get_tokenizer("bytes"))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    rows = torch.randint(0, 257, (3, 24))
    assert theirs.config.vocab_size == 257
    expected = logits(model, rows)[..., :257]
    torch.testing.assert_close(logits(theirs, rows), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_transformers_reads_the_same_ids(tmp_path, transformers, name, request, monkeypatch):
    if name == "gpt2":
        request.getfixturevalue("gpt2_tokenizer")
    ours = get_tokenizer(name)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HOSTILE, "a  b\n\n c \n", "trailing  ", "x" * 300, "\u00a0né 日本語 🙂\r\n\t."]:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, split_special_tokens=True) == ids, text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)
    assert theirs.eos_token_id == ours.eot_token
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "kept"))
    again = get_tokenizer(str(tmp_path / "tokenizer.json"))  # and so do we
    assert again.encode("some text").tolist() == ours.encode("some text").tolist()


def damaged(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


FAULTS = {
    "lacks": lambda t: t.pop("transformer.ln_f.bias"),
    "has an unknown": lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}),
    "is (3,), torch.float32, not (16,)": lambda t: t.update(
        {"transformer.ln_f.bias": torch.zeros(3)}
    ),
    "torch.int64": lambda t: t.update({"transformer.ln_f.bias": torch.zeros(16).long()}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_of_another_shape_are_refused(tmp_path, fault):
    small().save_pretrained(tmp_path)
    damaged(tmp_path, FAULTS[fault])
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(tmp_path)
    assert fault in str(error.value)


def test_other_models_and_damaged_files_are_refused(tmp_path):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"model_type": "llama"}, {"activation_function": "relu"}, {"n_inner": 7}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"no plain GPT-2: its {next(iter(change))}"):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": "many"}))
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04 a pickle, say")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        GPT.from_pretrained(tmp_path)


@pytest.fixture
def tuned(tmp_path):
    """weights/ of a small GPT-2, data/c of its vocabulary, and flags to go on from there."""
    small().save_pretrained(tmp_path / "weights", get_tokenizer("bytes"))
    make_corpus(tmp_path / "data" / "c", ["one for sorrow, two for mirth\n" * 60])
    flags = "--init_from weights --sequence_length 16 --batch_size 4 --dropout 0 --device cpu"
    return [*flags.split(), "--eval_every", "2", "--log_every", "1"]


def test_fine_tuning_begins_with_the_weights(tmp_path, tuned):
    result = run_script(
        "train_gpt2.py", *tuned, "--max_steps", 4, "--learning_rate", 0, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "out" / "c-pretrained-1"
    kept, first = load_checkpoint(folder / "last.pt"), small().state_dict()
    assert all(torch.equal(kept["model"][name], weight) for name, weight in first.items())
    assert kept["model_config"]["n_positions"] == 24
    result = run_script("train_gpt2.py", *tuned, "--max_steps", 8, "--stop_at", 4, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run_script("train_gpt2.py", "--resume", "out/c-pretrained-2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run_script("sample.py", "--export", "exported", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    model = GPT.from_pretrained(tmp_path / "exported")
    best = load_checkpoint(tmp_path / "out/c-pretrained-2/best.pt")["model"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, best[name])


def test_what_does_not_go_with_the_weights_is_refused(tmp_path, tuned):
    for more, words in (
        (["--sequence_length", 25], ["sequence_length (25)", "24 positions of weights"]),
        (["--n_layer", 3], ["weights has n_layer 2: leave out --n_layer"]),
        (["--size", "tiny"], ["leave out --size"]),
        (["--init_from", "nowhere"], ["nowhere is no folder with config.json", "gpt2-xl"]),
    ):
        result = run_script("train_gpt2.py", *tuned, *more, cwd=tmp_path)
        assert_one_line_error(result, *words)
    small(60).save_pretrained(tmp_path / "weights")
    result = run_script("train_gpt2.py", *tuned, cwd=tmp_path)
    assert_one_line_error(result, "c has 257 ids and weights 60")
    assert not list(tmp_path.glob("out/*"))


def test_the_hubs_weights_are_downloaded_once(tmp_path, server, monkeypatch):
    there = server.folder / "openai-community" / "gpt2" / "resolve" / "main"
    small().save_pretrained(there)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for _ in range(2):
        folder = pretrained_folder("gpt2", tmp_path / "data")
    assert folder == tmp_path / "data" / "pretrained" / "gpt2"
    names = ["config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.rsplit("/", 1)[1] for path in server.asked] == names
    weights = GPT.from_pretrained(folder).transformer.wte.weight
    assert torch.equal(weights, small().transformer.wte.weight)
