"""GPT-2's weights and vocabulary in the layout of Hugging Face.

    folder = pretrained_folder("gpt2-medium", "data")    # downloaded, unless it is there
    model = GPT.from_pretrained(folder)

In that layout the matrices of the blocks are transposed ("Conv1D"), names may lack `transformer.`,
and causal masks may lie among the weights. Pickled weights (pytorch_model.bin) are never read: a
pickle can run any code.
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from common.files import atomic_write, exclusive_lock, read_json
from corpus.download import download

RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's four models
FILES = ("config.json", "model.safetensors")
SHAPE = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
EMBEDDING = "transformer.wte.weight"
SUPPORTED = {  # what config.json may say of a GPT-2 beside its shape; first the default
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


def pretrained_folder(name: str, data_dir: str | Path) -> Path:
    """Return the folder that holds a GPT-2's config.json and model.safetensors.

    Args:
        name: The folder itself, or one of OpenAI's four models, which is downloaded once to
            DATA_DIR/pretrained/NAME (from HF_ENDPOINT, where a mirror is set).
        data_dir: Folder of prepared corpora.

    Raises:
        FileNotFoundError: `name` is neither a model of OpenAI's nor such a folder.
        ConnectionError: A file cannot be downloaded.
    """
    if name not in RELEASED:
        if not all((Path(name) / file).is_file() for file in FILES):
            raise FileNotFoundError(
                f"{name} is neither a folder with {' and '.join(FILES)} nor one of "
                f"{', '.join(RELEASED)}"
            )
        return Path(name)
    folder = Path(data_dir) / "pretrained" / name
    if all((folder / file).exists() for file in FILES):
        return folder
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    folder.mkdir(parents=True, exist_ok=True)
    # one of the processes of a torchrun downloads, and the others wait for it
    with exclusive_lock(folder.with_suffix(".lock"), wait=True):
        for file in FILES:
            if not (folder / file).exists():
                # the hub's answer names the sha256 of large files
                url = f"{hub.rstrip('/')}/openai-community/{name}/resolve/main/{file}"
                download([url], folder / file)
    return folder


def read_shape(folder: Path) -> dict[str, int]:
    """Return vocab_size, n_positions, n_layer, n_head and n_embd from folder/config.json.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or describes another kind of model.
    """
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it does not hold a model configuration")
    n_embd = config.get("n_embd")
    inner = 4 * n_embd if isinstance(n_embd, int) else None
    for name, supported in SUPPORTED.items():
        value = config.get(name, supported[0])
        if value not in supported and (name, value) != ("n_inner", inner):
            raise ValueError(f"{folder} is not a plain GPT-2: its {name} is {value!r:.60}")
    shape: dict[str, int] = {}
    for name in SHAPE:
        value = config.get(name)
        limit = 1000 if name == "n_layer" else 1 << 20
        if type(value) is not int or not 1 <= value <= limit:
            raise ValueError(f"{path} is damaged: its {name} is {value!r:.60}")
        shape[name] = value
    if shape["n_embd"] % shape["n_head"]:
        raise ValueError(f"{path} is damaged: n_embd is not a multiple of n_head")
    return shape


def read_weights(folder: Path, shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """Return the weights of folder/model.safetensors under the names of model.GPT.

    Args:
        folder: In the Hugging Face layout.
        shapes: Name -> shape of every weight that the model has.

    Returns:
        float32 tensors on the CPU.

    Raises:
        ValueError: The file is damaged, or holds other weights.
    """
    path = folder / "model.safetensors"
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    weights = {}
    for name, tensor in tensors.items():
        name = "transformer." + name.removeprefix("transformer.")
        if not name.endswith(MASKS):
            weights[name] = tensor.T.contiguous() if name.endswith(CONV1D) else tensor
    head = weights.pop("transformer.lm_head.weight", None)
    for name in sorted(shapes.keys() ^ weights.keys()):
        fault = "lacks" if name in shapes else "has an unknown"
        raise ValueError(f"{path} {fault} {name}: it does not fit config.json")
    for name, shape in shapes.items():
        if weights[name].shape != shape or not weights[name].is_floating_point():
            found = f"{tuple(weights[name].shape)}, {weights[name].dtype}"
            raise ValueError(f"{path}: {name} is {found}, not {shape} of floats")
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f"{path}: {name} has NaN or infinite values")
    if head is not None and not torch.equal(head, weights[EMBEDDING]):
        raise ValueError(f"{path}: lm_head.weight differs from the token embedding: not a GPT-2")
    return {name: tensor.float() for name, tensor in weights.items()}


def write_model(folder: Path, shape: dict, weights: dict, tokenizer=None) -> None:
    """Write a model in the Hugging Face layout; config.json last, when all else is there.

    Args:
        folder: Created if it does not exist.
        shape: The fields of SHAPE, and dropout.
        weights: As GPT.state_dict() names them.
        tokenizer: Of corpus.tokenizer, written too.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (p.T if name.endswith(CONV1D) else p).detach().float().cpu().contiguous()
        for name, p in weights.items()
    }
    eot = tokenizer.eot_token if tokenizer is not None else None
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    config: dict[str, Any] = {name: supported[0] for name, supported in SUPPORTED.items()}
    config |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"} | ends
    config |= {name: shape[name] for name in SHAPE}
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape["dropout"])
    # not save_file: its file can be read by its owner alone
    _write(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    _write(folder / "generation_config.json", json.dumps(ends, indent=2).encode())
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, model_max_length=shape["n_positions"])
    _write(folder / "config.json", json.dumps(config, indent=2).encode())


def write_tokenizer(folder: Path, tokenizer, **more) -> None:
    """Write tokenizer.json and tokenizer_config.json; AutoTokenizer then gives the same ids.

    Args:
        folder: Where to write.
        tokenizer: Of corpus.tokenizer.
        **more: Further fields of tokenizer_config.json.

    Raises:
        OSError: The folder cannot be written.
    """
    end = tokenizer.decode([tokenizer.eot_token])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    _write(folder / "tokenizer.json", tokenizer_json(tokenizer).encode())
    _write(folder / "tokenizer_config.json", json.dumps(config | more, indent=2).encode())


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as f:
        f.write(data)


def tokenizer_json(tokenizer) -> str:
    """Return the text of a tokenizer.json that gives the same ids as `tokenizer`."""
    if hasattr(tokenizer, "tokenizer"):
        return tokenizer.tokenizer.to_str()  # it came from a tokenizer.json
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    special, before = {"<|endoftext|>": tokenizer.eot_token}, [level]
    encoding = getattr(tokenizer, "encoding", None)  # tiktoken's
    if encoding is not None:
        special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
        # in that syntax $ ends a line and {1,3}+ repeats a repetition
        pattern = encoding._pat_str.replace("$", r"\z").replace("{1,3}+", "{1,3}")
        split = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        before.insert(0, {"type": "Split", **split})
    ids = {*special.values()}
    ranks = {piece: i for i, piece in tokenizer.token_bytes.items() if i not in ids}
    pairs = (
        _last_merge(piece, ranks)
        for piece in sorted(ranks, key=ranks.__getitem__)
        if len(piece) > 1
    )
    model = {
        "type": "BPE",
        "vocab": {_letters(piece): i for piece, i in ranks.items()} | special,
        "merges": [[_letters(part) for part in pair] for pair in pairs if len(pair) == 2],
        "ignore_merges": encoding is not None,  # token bytes in the vocabulary are one id
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
