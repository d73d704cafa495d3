"""Weights and tokenizers of Hugging Face: read, written, fine-fine_tuning_flags and downloaded."""

import hashlib
import json
import os
import random
import sys
from pathlib import Path

import pytest
import regex
import tiktoken
import tiktoken_ext.openai_public as openai_public
import torch
from conftest import assert_one_line_error, make_corpus, run_script
from processes import start_script
from safetensors.torch import load_file, save_file
from test_tokenizer import HOSTILE

import train_gpt2
from corpus.metadata import read_metadata, with_checksum
from corpus.tokenizer import HuggingFaceTokenizer, TiktokenTokenizer, get_tokenizer
from corpus.vocabulary_files import vocabulary_folder
from model import GPT, GPTConfig
from training.checkpoint import load_checkpoint
from training.huggingface import EMBEDDING, pretrained_folder, tokenizer_json, write_tokenizer
from training.models import load_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def small_model(vocab_size=257) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, n_positions=24, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in model.parameters():  # GPT-2's initialization sets biases to 0
        torch.nn.init.normal_(p, std=0.2)
    return model


def logits(model, rows):
    with torch.no_grad():
        out = model(rows)
    return out.logits if hasattr(out, "logits") else out[0]


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers")


def test_transformers_loads_our_weights_and_tokenizer(tmp_path, transformers):
    """transformers gives the same logits and the same greedy continuation of a text."""
    model, tokenizer = small_model(), get_tokenizer("bytes")
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
    # transformers stops at the end of a document
    assert text.tolist() == ours.tolist()[: len(text)]
    assert len(text) == 23 or text[-1] == 256
    assert their_tokenizer.decode(text) == tokenizer.decode(ours[: len(text)])


@pytest.mark.parametrize("as_on_the_hub", [False, True])
def test_from_pretrained_loads_the_weights_of_transformers(tmp_path, transformers, as_on_the_hub):
    """GPT-2 on the hub differs from what transformers writes.

    The names have no prefix, the file has masks and a head, the weights are in half precision, and
    config.json names the default width of the MLP.
    """
    shape = dict(vocab_size=60, n_positions=24, n_layer=2, n_head=2, n_embd=16, n_inner=64)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    if as_on_the_hub:
        theirs.half()
    theirs.save_pretrained(tmp_path)
    if as_on_the_hub:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors")
    model = GPT.from_pretrained(tmp_path).eval()
    rows = torch.randint(0, 60, (3, 24))
    torch.testing.assert_close(logits(model, rows), logits(theirs.float(), rows), atol=1e-4, rtol=0)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    ours = torch.stack(list(model.generate(rows[:, :4], 15, temperature=0)), dim=1)
    text = theirs.generate(rows[:, :4], max_new_tokens=15, do_sample=False)[:, 4:]
    assert text.tolist() == ours.tolist()


def test_a_saved_model_loads_as_the_same_model(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert back.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, back.state_dict()[name]), name


def test_a_saved_model_names_its_positions_as_openais_do(tmp_path):
    """OpenAI's config.json has the number twice. The converter of llama.cpp reads n_ctx."""
    small_model().save_pretrained(tmp_path, get_tokenizer("bytes"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 24


def test_saved_weights_have_default_permissions_and_errors_name_the_folder(tmp_path):
    small_model().save_pretrained(tmp_path)
    (tmp_path / "other").touch()
    mode = (tmp_path / "other").stat().st_mode  # the mode by umask
    assert (tmp_path / "model.safetensors").stat().st_mode == mode
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        small_model().save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="the model has 60 ids, fewer than the 257 of bytes"):
        small_model(60).save_pretrained(tmp_path / "x", get_tokenizer("bytes"))
    assert not (tmp_path / "x").exists()


def test_saved_weights_have_no_padding_of_the_vocabulary(tmp_path, transformers):
    model = small_model(320)
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
    write_tokenizer(tmp_path, ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    fast = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    for text in [*HOSTILE, "a  b\n\n c \n", "trailing  ", "x" * 300, "\u00a0né 日本語 🙂\r\n\t."]:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, split_special_tokens=True) == ids, text
        assert fast.encode(text, split_special_tokens=True) == ids, text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)
    assert theirs.eos_token_id == ours.eot_token
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "kept"))
    again = get_tokenizer(str(tmp_path / "tokenizer.json"))  # get_tokenizer reads the file, too
    assert again.encode("some text").tolist() == ours.encode("some text").tolist()


_random = random.Random(0)
TEXTS = [
    *HOSTILE,
    "don't  WE'LL 1234567 \n\n  x \x85y\u3000z  ",
    "xyz xyz",
    *("".join(_random.choices("ab'sdtl 12\n\t\ré日!?./", k=60)) for _ in range(300)),
]


def test_gpt2s_merges_and_ids_equal_openais_files(gpt2_tokenizer):
    """tiktoken keeps OpenAI's two files under these names."""
    model = json.loads(tokenizer_json(gpt2_tokenizer))["model"]
    folder = vocabulary_folder()
    bpe = (folder / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").read_text(encoding="utf-8")
    assert [" ".join(pair) for pair in model["merges"]] == bpe.split("\n")[1:-1]
    ids = (folder / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6").read_text(encoding="utf-8")
    assert model["vocab"] == json.loads(ids)


def test_a_vocabulary_with_unused_ids_and_unreachable_tokens_is_written(tmp_path):
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"ab": 256, b"  ": 257, b"tab": 258, b"xyz": 260, "日".encode(): 261}
    specials = {"<|endoftext|>": 263, "<|fim_prefix|>": 264}
    encoding = tiktoken.Encoding(
        "made", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=specials
    )
    ours = TiktokenTokenizer("made", encoding)
    assert ours.encode("xyz xyz").tolist() == [
        260,
        32,
        *b"xyz",
    ]  # tiktoken finds the token only as a whole word
    write_tokenizer(tmp_path, ours)
    theirs = HuggingFaceTokenizer("theirs", tmp_path / "tokenizer.json")
    assert (theirs.vocab_size, theirs.eot_token) == (265, 263)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text).tolist() == ids, text
        assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_a_written_pattern_divides_a_text_as_tiktoken_does(name, monkeypatch):
    """The test needs the patterns only, not the vocabularies."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    pattern = openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    encoding = tiktoken.Encoding(
        "made",
        pat_str=pattern,
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    written = json.loads(tokenizer_json(TiktokenTokenizer("made", encoding)))["pre_tokenizer"]
    expression = written["pretokenizers"][0]["pattern"]["Regex"]
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    for text in TEXTS:
        assert [part for part, _ in split.pre_tokenize_str(text)] == regex.findall(pattern, text)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


FAULTS = {
    "lacks": lambda t: t.pop("transformer.ln_f.bias"),
    "has an unknown": lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}),
    "is (3,), torch.float32, not (16,)": lambda t: t.update(
        {"transformer.ln_f.bias": torch.zeros(3)}
    ),
    "lacks transformer.wte.weight": lambda t: t.pop("transformer.wte.weight"),
    "lm_head.weight differs from the token embedding": lambda t: t.update(
        {"lm_head.weight": torch.zeros(257, 16)}
    ),
    "torch.int64": lambda t: t.update({"transformer.ln_f.bias": torch.zeros(16).long()}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_of_another_shape_are_refused(tmp_path, fault):
    small_model().save_pretrained(tmp_path)
    change_weights(tmp_path, FAULTS[fault])
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(tmp_path)
    assert fault in str(error.value)


def test_other_models_and_damaged_files_are_refused(tmp_path):
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"model_type": "llama"}, {"activation_function": "relu"}, {"n_inner": 7}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"is not a plain GPT-2: its {next(iter(change))}"):
            GPT.from_pretrained(tmp_path)
    for text in (json.dumps(config | {"n_embd": "many"}), '{"n_embd":', "3", "\ufffd", "{}"):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"config.json is damaged"):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    for data in (b"\x80\x04 a pickle", whole[:-1], b""):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither a folder with config.json and model.safetensor"
    ):
        pretrained_folder(str(tmp_path), tmp_path)


def test_tied_weights_may_be_saved_under_the_name_of_the_output_layer(tmp_path):
    """safetensors.torch.save_model keeps the first name of a tensor that has two."""
    small_model().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda t: t.update({"lm_head.weight": t.pop(EMBEDDING)}))
    found = GPT.from_pretrained(tmp_path).state_dict()
    for name, weight in small_model().state_dict().items():
        assert torch.equal(found[name], weight)


def test_a_pointer_of_git_lfs_is_refused_with_the_remedy(tmp_path):
    small_model().save_pretrained(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"pointer of Git LFS, .*: run git lfs pull in"):
        GPT.from_pretrained(tmp_path)


def test_sharded_weights_equal_those_of_one_file(tmp_path):
    small_model().save_pretrained(tmp_path)
    expected = GPT.from_pretrained(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        shard = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(shard, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert pretrained_folder(str(tmp_path), tmp_path) == tmp_path
    assert pretrained_folder(str(index), tmp_path) == tmp_path  # a file stands for its folder
    found = GPT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1.safetensors does not exist, and .*json"):
        GPT.from_pretrained(tmp_path)
    for damaged in ("[]", "{}", '{"weight_map": {"a": "../model-0.safetensors"}}'):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"index.json is damaged"):
            GPT.from_pretrained(tmp_path)


def test_pickled_weights_are_refused_with_a_command_that_converts_them(tmp_path):
    folder = tmp_path / "pickled"
    small_model().save_pretrained(folder)
    expected = GPT.from_pretrained(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # one tensor with two names
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has pickled weights, which can run any code") as error:
        pretrained_folder(str(folder), tmp_path)
    _, command = str(error.value).split("convert them with python -c ")
    exec(command.strip('"'))
    found = GPT.from_pretrained(pretrained_folder(str(folder), tmp_path)).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("name", ["out/rhyme-tiny-1", "out/rhyme-tiny-1/best.pt"])
def test_a_run_gives_weights_to_start_from(train, name):
    first = train(max_steps=4)
    second = train(init_from=name, run_name="second", learning_rate=1e-30, dropout=0.5, max_steps=2)
    assert load_checkpoint(second / "last.pt")["model_config"]["dropout"] == 0.5
    expected = load_model(load_checkpoint(first / "best.pt")).state_dict()
    weights = load_model(load_checkpoint(second / "last.pt")).state_dict()
    assert weights[EMBEDDING].shape == (257, 16)  # training has 320 rows
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    make_corpus(Path("data/words"), ["one for sorrow\n" * 300], tokenizer="bytes")
    metadata = read_metadata("data/words")
    metadata["tokenizer"]["sha256"] = "another"
    Path("data/words/metadata.json").write_text(json.dumps(with_checksum(metadata)))
    with pytest.raises(ValueError, match="words has another vocabulary than the corpus that out/"):
        train(init_from=name, corpus="words", run_name="third", max_steps=2)


@pytest.fixture
def fine_tuning_flags(tmp_path):
    """Flags for fine-tuning of the folder weights/ on the corpus data/c."""
    small_model().save_pretrained(tmp_path / "weights", get_tokenizer("bytes"))
    make_corpus(tmp_path / "data" / "c", ["one for sorrow, two for mirth\n" * 60])
    flags = "--init_from weights --batch_size 4 --dropout 0 --device cpu"
    return [*flags.split(), "--eval_every", "2", "--log_every", "1"]


def test_fine_tuning_starts_from_the_weights(tmp_path, fine_tuning_flags):
    result = run_script(
        "train_gpt2.py", *fine_tuning_flags, "--max_steps", 4, "--learning_rate", 0, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "out" / "c-pretrained-1"
    checkpoint = load_checkpoint(folder / "last.pt")
    weights = load_model(checkpoint).state_dict()
    for name, weight in small_model().state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert checkpoint["model_config"]["n_positions"] == 24
    assert checkpoint["config"]["sequence_length"] == 24  # the default: 256, or all positions
    result = run_script(
        "train_gpt2.py", *fine_tuning_flags, "--max_steps", 8, "--stop_at", 4, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    result = run_script("train_gpt2.py", "--resume", "out/c-pretrained-2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run_script("sample.py", "--export", "exported", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    model = GPT.from_pretrained(tmp_path / "exported")
    best = load_model(load_checkpoint(tmp_path / "out/c-pretrained-2/best.pt")).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, best[name])


def test_settings_that_contradict_the_weights_are_an_error(
    tmp_path, fine_tuning_flags, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    def error_of(*more):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *fine_tuning_flags, *more])
        with pytest.raises((ValueError, OSError)) as error:
            train_gpt2.main()
        return str(error.value)

    error = error_of("--sequence_length", "25")
    assert "--sequence_length 25" in error and "24 positions of weights" in error
    assert "weights has n_layer 2: leave out --n_layer" in error_of("--n_layer", "3")
    assert "leave out --size" in error_of("--size", "tiny")
    assert "add --init_from" in error_of("--size", "pretrained", "--init_from", "")
    error = error_of("--init_from", "nowhere")
    assert "nowhere is neither a folder with config.json" in error and "gpt2-xl" in error
    small_model(60).save_pretrained(tmp_path / "weights")
    assert "c has 257 ids and weights has 60" in error_of()
    assert not list(tmp_path.glob("out/*"))
    assert_one_line_error(
        run_script("train_gpt2.py", *fine_tuning_flags, cwd=tmp_path), "c has 257 ids"
    )


@pytest.fixture
def hub(server, monkeypatch):
    """The folder of a small model that the local server serves as GPT-2 on the hub."""
    folder = server.folder / "openai-community" / "gpt2" / "resolve" / "main"
    small_model().save_pretrained(folder)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return folder


def test_several_processes_download_the_weights_of_the_hub_once(tmp_path, server, hub):
    """Two processes start at once, as under torchrun, and a third one follows."""
    script = tmp_path / "fetch.py"
    script.write_text(
        "from training.huggingface import pretrained_folder\n"
        "print(pretrained_folder('gpt2', 'data'))"
    )
    processes = []
    for name in ("one", "other"):
        streams = tmp_path / name
        streams.mkdir()
        processes.append((start_script(script, cwd=tmp_path, streams=streams), streams / "out.txt"))
    for process, out in processes:
        process.join()
        assert out.read_text() == f"{Path('data', 'pretrained', 'gpt2')}\n"
    folder = pretrained_folder("gpt2", tmp_path / "data")
    assert folder == tmp_path / "data" / "pretrained" / "gpt2"
    names = ["config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.rsplit("/", 1)[1] for path in server.requested_paths] == names
    weights = GPT.from_pretrained(folder).transformer.wte.weight
    assert torch.equal(weights, small_model().transformer.wte.weight)


def test_openais_weights_have_the_name_of_the_hub_and_a_folder_none_of_theirs(
    tmp_path, server, hub, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert pretrained_folder("openai-community/gpt2", "data") == Path("data/pretrained/gpt2")
    small_model(60).save_pretrained(Path("gpt2"))
    with pytest.raises(ValueError, match=r"there is a folder gpt2, too: write ./gpt2"):
        pretrained_folder("gpt2", "data")
    assert pretrained_folder("./gpt2", "data") == Path("gpt2")
    assert pretrained_folder("openai-community/gpt2", "data") == Path("data/pretrained/gpt2")


def test_a_download_is_checked_against_the_sha256_of_the_hub(tmp_path, server, hub, monkeypatch):
    """The answer that redirects to the file contains the sha256."""
    sha256 = hashlib.sha256((hub / "model.safetensors").read_bytes()).hexdigest()
    (server.folder / "cdn").mkdir()
    (hub / "model.safetensors").rename(server.folder / "cdn" / "blob")
    whole = server.RequestHandlerClass.func.do_GET

    def redirect(handler):
        if not handler.path.endswith("model.safetensors"):
            return whole(handler)
        handler.send_response(302)
        handler.send_header("Location", f"{server.url}/cdn/blob")
        handler.send_header("X-Linked-Etag", f'"{sha256}"')
        handler.end_headers()

    monkeypatch.setattr(server.RequestHandlerClass.func, "do_GET", redirect)
    GPT.from_pretrained(pretrained_folder("gpt2", tmp_path / "whole"))
    with open(server.folder / "cdn" / "blob", "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"!")
    with pytest.raises(ConnectionError, match=f"sha256 .*, not {sha256[:16]}"):
        pretrained_folder("gpt2", tmp_path / "damaged")
    assert not list((tmp_path / "damaged").rglob("model*"))
