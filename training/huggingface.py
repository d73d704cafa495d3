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

from common.files import atomic_write, folder_name, read_json
from corpus.download import download
from corpus.tokenizer import HuggingFaceTokenizer, Tokenizer
from corpus.vocabulary import LETTERS

RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's four models
HUB_OWNER = "openai-community/"  # may precede these names, as on the hub
FILES = ("config.json", "model.safetensors")
INDEX = "model.safetensors.index.json"  # instead of model.safetensors, if there are several files
SHAPE_FIELDS = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
EMBEDDING = "transformer.wte.weight"
SUPPORTED = {  # values that config.json may have beside the shape; first the default
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
GIT_LFS = b"version https://git-lfs"  # where a repository was cloned without its large files


def is_released(name: str) -> bool:
    """Return whether a name is that of one of OpenAI's models: gpt2 or openai-community/gpt2."""
    return name.removeprefix(HUB_OWNER) in RELEASED


def pretrained_folder(name: str, data_dir: str | Path) -> Path:
    """Return the folder that holds a GPT-2's config.json and model.safetensors.

    Args:
        name: The folder itself or a file in it, or one of OpenAI's four models. A model is
            downloaded once to DATA_DIR/pretrained/NAME, from the mirror HF_ENDPOINT if that
            variable is set.
        data_dir: Folder of prepared corpora.

    Raises:
        FileNotFoundError: `name` is neither one of the four models nor such a folder.
        ValueError: The folder has pickled weights; the message has the command that converts them.
            Or a folder has the name of one of OpenAI's models.
        ConnectionError: A file cannot be downloaded.
    """
    if not is_released(name):
        return _weights_folder(Path(name))
    model_files = ("config.json", "best.pt", "last.pt")
    if name in RELEASED and any((Path(name) / file).exists() for file in model_files):
        raise ValueError(
            f"{name} is the name of OpenAI's weights, and there is a folder {name}, too: write "
            f"./{name} for the folder, or {HUB_OWNER}{name} for OpenAI's"
        )
    name = name.removeprefix(HUB_OWNER)
    folder = Path(data_dir) / "pretrained" / name
    if all((folder / file).exists() for file in FILES):
        return folder
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    for file in FILES:
        # one of the processes of a torchrun downloads the file, and the others wait for it
        url = f"{hub.rstrip('/')}/{HUB_OWNER}{name}/resolve/main/{file}"
        download([url], folder / file)  # the hub sends the sha256 of large files
    return folder


def _weights_folder(path: Path) -> Path:
    """Return the folder of weights that a user names by the folder or by a file in it."""
    folder = path.parent if path.is_file() else path
    has_weights = any((folder / file).is_file() for file in ("model.safetensors", INDEX))
    if has_weights and (folder / "config.json").is_file():
        return folder
    if not has_weights and any(folder.glob("pytorch_model*.bin")):
        pattern = str(folder / "pytorch_model*.bin")
        raise ValueError(
            f"{folder} has pickled weights, which can run any code when they are read: convert "
            f'them with python -c "import glob, torch; from safetensors.torch import save_file; '
            f"save_file({{name: w.contiguous().clone() for file in glob.glob({pattern!r}) for "
            f"name, w in torch.load(file, map_location='cpu', weights_only=True).items()}}, "
            f'{str(folder / "model.safetensors")!r})"'
        )
    raise FileNotFoundError(
        f"{path} is neither a folder with {' and '.join(FILES)}, nor a run, nor one of "
        f"{', '.join(RELEASED)}"
    )


def read_shape(folder: Path) -> dict[str, int]:
    """Return vocab_size, n_positions, n_layer, n_head and n_embd from folder/config.json.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or describes another kind of model.
    """
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it does not hold a model configuration")
    n_embd = config.get("n_embd")
    default_n_inner = 4 * n_embd if isinstance(n_embd, int) else None
    for name, supported in SUPPORTED.items():
        value = config.get(name, supported[0])
        if value not in supported and (name, value) != ("n_inner", default_n_inner):
            raise ValueError(f"{folder} is not a plain GPT-2: its {name} is {value!r:.60}")
    shape: dict[str, int] = {}
    for name in SHAPE_FIELDS:
        value = config.get(name)
        limit = 1000 if name == "n_layer" else 1 << 20
        if type(value) is not int or not 1 <= value <= limit:
            raise ValueError(f"{path} is damaged: its {name} is {value!r:.60}")
        shape[name] = value
    if shape["n_embd"] % shape["n_head"]:
        raise ValueError(f"{path} is damaged: n_embd is not a multiple of n_head")
    return shape


def read_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the weights of folder/model.safetensors under the names of model.GPT.

    The weights may also lie in several files, which model.safetensors.index.json names.

    Args:
        folder: Folder in the Hugging Face layout.
        shapes: Name -> shape of every weight of the model.

    Returns:
        float32 tensors on the CPU.

    Raises:
        ValueError: The file is damaged, or holds other weights.
    """
    path = folder / "model.safetensors"
    files = [path]
    if not path.exists() and (folder / INDEX).exists():
        path = folder / INDEX
        files = _files_of_index(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= safetensors.torch.load_file(file)
        except safetensors.SafetensorError as error:
            if file.read_bytes()[: len(GIT_LFS)] == GIT_LFS:
                raise ValueError(
                    f"{file} is a pointer of Git LFS, not the weights: run git lfs pull in {folder}"
                ) from None
            raise ValueError(f"{file} is damaged: {error}") from None
    weights = {}
    for name, tensor in tensors.items():
        name = "transformer." + name.removeprefix("transformer.")
        if not name.endswith(MASKS):
            weights[name] = tensor.T.contiguous() if name.endswith(CONV1D) else tensor
    head = weights.pop("transformer.lm_head.weight", None)
    if head is not None:  # safetensors saves one of two tied tensors, under either name
        weights.setdefault(EMBEDDING, head)
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


def _files_of_index(path: Path) -> list[Path]:
    """Return the files that a model.safetensors.index.json names."""
    index = read_json(path)
    try:
        names = sorted(set(index["weight_map"].values()))
        files = [path.parent / folder_name(name, "") for name in names]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path} is damaged: it does not name the files of weights") from None
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, and {path} names it: copy it there")
    return files


def write_model(
    folder: Path,
    shape: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model in the Hugging Face layout, config.json last.

    Args:
        folder: Folder to write; created if it does not exist.
        shape: Values of SHAPE_FIELDS, and of dropout.
        weights: Weights under the names of GPT.state_dict().
        tokenizer: Tokenizer to write, too.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (p.T if name.endswith(CONV1D) else p).detach().float().cpu().contiguous()
        for name, p in weights.items()
    }
    eot_token = tokenizer.eot_token if tokenizer is not None else None
    eot_config = {"bos_token_id": eot_token, "eos_token_id": eot_token}
    config: dict[str, Any] = {name: supported[0] for name, supported in SUPPORTED.items()}
    config |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"} | eot_config
    config |= {name: shape[name] for name in SHAPE_FIELDS}
    config["n_ctx"] = shape["n_positions"]  # as OpenAI's files have it, for llama.cpp
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape["dropout"])
    # not save_file, whose file can be read by its owner alone
    _write(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    _write(folder / "generation_config.json", json.dumps(eot_config, indent=2).encode())
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, model_max_length=shape["n_positions"])
    _write(folder / "config.json", json.dumps(config, indent=2).encode())


def write_tokenizer(folder: Path, tokenizer: Tokenizer, **more: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json; AutoTokenizer then gives the same ids.

    Args:
        folder: Folder to write, which exists.
        tokenizer: Tokenizer to write.
        **more: Further fields of tokenizer_config.json.

    Raises:
        OSError: The folder cannot be written.
    """
    eot_name = tokenizer.decode([tokenizer.eot_token])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot_name,
        "eos_token": eot_name,
    }
    _write(folder / "tokenizer.json", tokenizer_json(tokenizer).encode())
    _write(folder / "tokenizer_config.json", json.dumps(config | more, indent=2).encode())


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as f:
        f.write(data)


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the text of a tokenizer.json that gives the same ids as `tokenizer`."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.tokenizer.to_str()
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    special = {"<|endoftext|>": tokenizer.eot_token}
    pretokenizers: list[dict] = [byte_level]
    encoding = getattr(tokenizer, "encoding", None)  # tiktoken's
    if encoding is not None:
        special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
        # in the syntax of tokenizer.json $ ends a line and {1,3}+ repeats a repetition
        pattern = encoding._pat_str.replace("$", r"\z").replace("{1,3}+", "{1,3}")
        split = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        pretokenizers = [split, byte_level]
    special_ids = set(special.values())
    ids = {
        token_bytes: i for i, token_bytes in tokenizer.token_bytes.items() if i not in special_ids
    }
    merges = []
    for token_bytes in sorted(ids, key=ids.__getitem__):
        merged = _last_merge(token_bytes, ids)
        if len(merged) == 2:
            merges.append([_letters(token) for token in merged])
    model = {
        "type": "BPE",
        "vocab": {_letters(token_bytes): i for token_bytes, i in ids.items()} | special,
        "merges": merges,
        "ignore_merges": encoding is not None,  # token bytes in the vocabulary are one id
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": name, "special": True} | flags
        for name, i in sorted(special.items(), key=lambda item: item[1])
    ]
    config = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers},
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(config, ensure_ascii=False)


def _last_merge(token_bytes: bytes, ids: dict[bytes, int]) -> list[bytes]:
    """Return the two tokens whose merge gives a token; another number if no merge gives it.

    Example: token_bytes=b"abc", ids={b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"abc": 4} ->
    [b"ab", b"c"].
    """
    tokens = [bytes([byte]) for byte in token_bytes]
    token_id = ids[token_bytes]
    while len(tokens) > 2:
        pair_ids = [
            ids.get(first + second, token_id) for first, second in itertools.pairwise(tokens)
        ]
        lowest = min(pair_ids)
        if lowest >= token_id:
            break
        i = pair_ids.index(lowest)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens


def _letters(token_bytes: bytes) -> str:
    """Return bytes in the letters of GPT-2's files: printable bytes stand for themselves."""
    return "".join(map(LETTERS.__getitem__, token_bytes))
