"""What the Hugging Face hub has and transformers reads: GPT-2's weights, tokenizer.json.

    folder = pretrained_folder("gpt2-medium", "data")    # downloaded, unless it is there
    model = GPT.from_pretrained(folder)

There, the blocks' matrices lie the other way round than in nn.Linear ("Conv1D"), `transformer.` may
be missing before names, and masks may lie among the weights. Pickled weights (pytorch_model.bin)
are never read: a pickle can run anything.
"""

import itertools
import json
import os
from pathlib import Path

import safetensors.torch
import torch

from common.files import atomic_write, fcntl, read_json
from corpus.download import download
from model import EMBEDDING, GPT2_SIZES, GPTConfig

FILES = ("config.json", "model.safetensors")
SHAPE = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
PLAIN = {  # what config.json may say of a GPT-2 beside its shape; first what it means by silence
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "n_inner": (None,),  # 4 * n_embd
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
MASKS = (".attn.bias", ".attn.masked_bias")


def pretrained_folder(name: str, data_dir) -> Path:
    """The folder of a GPT-2's files: `name` itself, or DATA_DIR/pretrained/NAME for one of
    OpenAI's four, which is downloaded where it isn't there. Raises FileNotFoundError for a folder
    without them, ConnectionError where they can't be had."""
    if name not in GPT2_SIZES:
        if not all((Path(name) / file).is_file() for file in FILES):
            raise FileNotFoundError(
                f"{name} is no folder with {' and '.join(FILES)}, and none of "
                f"{', '.join(GPT2_SIZES)}"
            )
        return Path(name)
    folder = Path(data_dir) / "pretrained" / name
    if all((folder / file).exists() for file in FILES):
        return folder
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        if fcntl:  # of the processes of a torchrun one downloads, and the others wait for it
            fcntl.flock(lock, fcntl.LOCK_EX)
        for file in FILES:
            if not (folder / file).exists():
                # the hub's answer names the sha256 of large files
                url = f"{hub.rstrip('/')}/openai-community/{name}/resolve/main/{file}"
                download([url], folder / file)
    return folder


def read_shape(folder: Path) -> dict[str, int]:
    """The SHAPE that folder/config.json tells. Raises FileNotFoundError, and ValueError for a
    damaged file or another kind of model."""
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: {config!r:.60} is no model's configuration")
    inner = 4 * config["n_embd"] if type(config.get("n_embd")) is int else None
    for name, known in PLAIN.items():
        found = config.get(name, known[0])
        if found not in known and (name, found) != ("n_inner", inner):
            raise ValueError(f"{folder} is no plain GPT-2: its {name} is {found!r:.60}")
    shape = {name: config.get(name) for name in SHAPE}
    try:
        GPTConfig(**shape)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return shape


def read_weights(folder: Path, shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """The weights of folder/model.safetensors, float32 on the CPU, as a model takes them whose
    state_dict has these shapes. Raises ValueError for a file that is damaged or holds others."""
    path, weights = folder / "model.safetensors", {}
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    for name, tensor in tensors.items():
        name = "transformer." + name.removeprefix("transformer.")
        if not name.endswith(MASKS):
            weights[name] = tensor.T.contiguous() if name.endswith(CONV1D) else tensor
    head = weights.pop("transformer.lm_head.weight", None)
    for name in sorted(shapes.keys() ^ weights.keys()):
        fault = "lacks" if name in shapes else "has an unknown"
        raise ValueError(f"{path} {fault} {name}: no GPT-2 of this shape")
    for name, shape in shapes.items():
        if weights[name].shape != shape or not weights[name].is_floating_point():
            found = f"{tuple(weights[name].shape)}, {weights[name].dtype}"
            raise ValueError(f"{path}: {name} is {found}, not {shape} of floats")
    if head is not None and not torch.equal(head, weights[EMBEDDING]):
        raise ValueError(f"{path}: its lm_head.weight isn't the token embedding, as GPT-2's is")
    return {name: tensor.float() for name, tensor in weights.items()}


def write_model(folder: Path, shape: dict, weights: dict, tokenizer=None) -> None:
    """The opposite of both; shape: SHAPE and dropout. config.json comes last. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (p.T if name.endswith(CONV1D) else p).detach().float().cpu().contiguous()
        for name, p in weights.items()
    }
    eot = tokenizer.eot_token if tokenizer is not None else None
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    config = {name: known[0] for name, known in PLAIN.items()}
    config |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"} | ends
    config |= {name: shape[name] for name in SHAPE}
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape["dropout"])
    # save_file's own file would be for no one else to read
    _write(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    _write(folder / "generation_config.json", json.dumps(ends, indent=2).encode())
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, model_max_length=shape["n_positions"])
    _write(folder / "config.json", json.dumps(config, indent=2).encode())


def write_tokenizer(folder: Path, tokenizer, **more) -> None:
    """tokenizer.json and tokenizer_config.json, the latter with `more`, by which transformers'
    AutoTokenizer gives the same ids. Raises OSError."""
    end = tokenizer.decode([tokenizer.eot_token])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    _write(folder / "tokenizer.json", tokenizer_json(tokenizer).encode())
    _write(folder / "tokenizer_config.json", json.dumps(config | more, indent=2).encode())


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as f:
        f.write(data)


def tokenizer_json(tokenizer) -> str:
    """A tokenizer of tokenizer.py's -> the tokenizer.json that gives the same ids."""
    if hasattr(tokenizer, "tokenizer"):
        return tokenizer.tokenizer.to_str()  # it was made of one
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    special, before = {"<|endoftext|>": tokenizer.eot_token}, [level]
    encoding = getattr(tokenizer, "encoding", None)  # tiktoken's
    if encoding is not None:
        special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
        # there, $ ends a line and {1,3}+ repeats a repetition
        pattern = encoding._pat_str.replace("$", r"\z").replace("{1,3}+", "{1,3}")
        split = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        before.insert(0, {"type": "Split", **split})
    ids = {*special.values()}
    ranks = {piece: i for i, piece in tokenizer.pieces.items() if i not in ids}
    pairs = (_last_merge(piece, ranks) for piece in sorted(ranks, key=ranks.get) if len(piece) > 1)
    model = {
        "type": "BPE",
        "vocab": {_letters(piece): i for piece, i in ranks.items()} | special,
        "merges": [[_letters(part) for part in pair] for pair in pairs if len(pair) == 2],
        "ignore_merges": encoding is not None,  # a piece that is in the vocabulary is one id
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": name, "special": True} | flags for name, i in special.items()]
    return json.dumps({
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before},
        "decoder": level,
        "model": model,
    }, ensure_ascii=False)  # fmt: skip


def _last_merge(piece: bytes, ranks) -> list[bytes]:
    """The parts that earlier merges make of a piece: two, unless no merge makes it."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ranks[piece]) for a, b in itertools.pairwise(parts)]
        if (least := min(pairs)) >= ranks[piece]:
            break
        i = pairs.index(least)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _letters(piece: bytes) -> str:
    """Bytes as the letters that GPT-2's files have for them: those that print are themselves."""
    return "".join(map(_LETTERS.__getitem__, piece))


_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_LETTERS = {byte: chr(byte) for byte in _PRINTED} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
