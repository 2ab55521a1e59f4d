"""folder.py - model folders as they lie on disks and hubs: found or fetched, read strictly, saved.

A folder is read as transformers reads it, or refused by a line that says what is wrong with it: another kind
of weights, the pointers that a clone without git-lfs leaves, an adapter, a tensor that is missing or left
over. What is saved opens in other tools. What differs from the paper: nothing; it does not say.

    python folder.py DIR       prints the configuration and the parameter count, once every weight has loaded
"""

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import Config
from lora import ADAPTER, adapted_layers
from model import Decoder
from run import UserError, main, naming, rank, read_json, sync, write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "vocab.json", "merges.txt")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors",
               "model.safetensors.index.json", *TOKENIZER_FILES)
# Weights in files that are not read: other formats, other names.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # the types of weights that are read
POINTER = b"version https://git-lfs.github.com/spec/"  # how the file begins that stands for a large one


# ------------------------------------------------------------------------- finding

def find(name: str | Path) -> Path:
    """The folder of a model: a local one as it is, or a hub id ("owner/name"), downloaded.

    "tiny" is the embedded model, assets/tiny.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"model {str(name)!r}: there is no such user's folder") from None
    if str(name) and path.is_dir():
        return path
    if str(name) == "tiny":
        return Path(__file__).parent / "assets" / "tiny"
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~") or path.exists():
        raise UserError(f"model {str(name)!r} is neither a folder nor a hub id (owner/name)")
    return download(str(name), MODEL_FILES)


def weight_times(model: str) -> list[str]:
    """When a model's weights were written: another model may come to stand in the same folder."""
    return [str(file.stat().st_mtime_ns) for file in sorted(find(model).glob("*.safetensors"))]


def download(name: str, patterns: tuple[str, ...], kind: str = "model") -> Path:
    """The folder of a hub repository's files that match the patterns; kind is model or dataset."""
    huggingface_hub.logging.set_verbosity_error()  # else it tells of each attempt
    hooks = huggingface_hub.get_session().event_hooks
    huggingface_hub.get_session().event_hooks = hooks | dict(request=[*hooks["request"], limit_time])
    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type=kind, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise UserError(f"{name} is gated: accept its licence on the hub and set HF_TOKEN") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{kind} {name!r} is neither a folder nor a repository on the hub: check the name, "
                        "and set HF_TOKEN if it is private") from None
    except (HTTPError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None and not isinstance(e, ConnectionError):
            raise  # the disk, not the hub
        raise UserError(f"{name} is not a folder here, and the hub cannot be reached ({type(e).__name__}): "
                        "name a folder, or try again online") from None


def limit_time(request) -> None:
    """Give a hub request that has no time limit (the very first one has none) that of a download."""
    seconds = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {kind: limit or seconds for kind, limit in limits.items()}


# ------------------------------------------------------------------------- reading

def refuse_pointer(file: Path) -> None:
    """UserError where a file is not what its name says but the pointer to it that git-lfs keeps in git."""
    with open(file, "rb") as f:
        if f.read(len(POINTER)) == POINTER:
            raise UserError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in that "
                            "folder, or download the model again")


def read_object(file: Path) -> dict:
    """The JSON object in a file of a model folder; UserError where it is missing or anything else."""
    if file.is_file():
        refuse_pointer(file)
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {type(value).__name__}, not a JSON object")
    return value


def read_config(folder: Path) -> Config:
    """The configuration of a model folder. UserError where there is none, or none that this decoder runs."""
    file = folder / "config.json"
    if not file.exists() and (folder / "adapter_config.json").exists():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(f"{folder} holds an adapter of {base}, not a model: merge it into that model first")
    if not file.exists() and (folder / "model" / "config.json").exists():
        raise UserError(f"{file} does not exist; the model of this run is in {folder / 'model'}")
    return Config.from_dict(read_object(file), str(file))


def load(name: str | Path, dtype: torch.dtype = torch.float32,
         device: torch.device | str = "cpu") -> Decoder:
    """A decoder from a Hugging Face folder or hub id, with its matrices and biases in `dtype`.

    Weights of norms are kept in fp32 at least. Strict: a missing, superfluous or wrongly shaped tensor is a
    UserError that names it.
    """
    folder = find(name)
    config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    shapes = {key: tuple(p.shape) for key, p in model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for key, tensor in read_tensors(file):
            # Older files store the rotary table, and some store a tied head twice.
            is_tied_head = config.tie_word_embeddings and key == "lm_head.weight"
            if is_tied_head or key.endswith("rotary_emb.inv_freq"):
                continue
            if shapes.get(key, tensor.shape) != tensor.shape:
                raise UserError(f"{file}: {key} is {tuple(tensor.shape)}, config.json asks for {shapes[key]}")
            if tensor.dtype not in FLOATS:
                raise UserError(f"{file}: {key} holds {tensor.dtype}: quantised weights are not supported")
            if key in shapes and not is_finite(tensor):
                raise UserError(f"{file}: {key} holds values that are not finite: the model is damaged, take "
                                "another copy of it")
            is_norm = key.endswith("norm.weight")
            kept = torch.promote_types(dtype, torch.float32) if is_norm else dtype
            weights[key] = tensor.to(device=device, dtype=kept)
    if missing := shapes.keys() - weights.keys():
        raise UserError(f"{folder} lacks {len(missing)} of the model's tensors, for example {min(missing)}")
    if unknown := weights.keys() - shapes.keys():
        raise UserError(f"{folder} holds {len(unknown)} unknown tensors, for example {min(unknown)}")
    model.load_state_dict(weights, strict=True, assign=True)
    return model


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass and without a copy."""
    low, high = tensor.aminmax()
    return math.isfinite(low) and math.isfinite(high)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the single one, else those that its index names.

    An index beside a single file is what an earlier, sharded save has left: transformers goes by the file.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        others = sorted(file.name for pattern in OTHER_WEIGHTS for file in folder.glob(pattern))
        found = f"; the folder has {others[0]}" if others else ""
        raise UserError(f"{single} does not exist (weights are read from safetensors only){found}")
    weight_map = read_object(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{index} has no weight_map from tensors to files")
    for name in names:  # nothing outside of the folder is read
        if Path(name).name != name or name == "..":
            raise UserError(f"{index}: {name!r} is not the name of a file beside it")
    return [folder / name for name in sorted(set(names))]


def check_weights(folder: Path) -> None:
    """UserError where a file of weights is missing or not whole; no more than a first tensor is read."""
    for file in weight_files(folder):
        for _ in read_tensors(file):
            break


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a safetensors file, one at a time."""
    if not file.is_file():
        raise UserError(f"{file} does not exist (weights are read from safetensors only)")
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 - safe_open is no mapping
                yield key, f.get_tensor(key)
    except SafetensorError as e:
        raise UserError(f"{file} is not a whole safetensors file: {e}") from None


# ------------------------------------------------------------------------- saving

def save(weights: dict[str, Tensor], config: Config, folder: Path, source: Path,
         dtype: torch.dtype = torch.bfloat16, max_file_size: str = "5GB") -> None:
    """Write a folder that transformers opens: weights cast to `dtype`, config, `source`'s tokenizer files.

    Weights above `max_file_size` go into several files and an index. The folder appears whole, in the place
    of one that is there; process 0 alone writes.
    """
    if rank():
        return
    with replacing(folder) as temporary:
        config_file = temporary / "config.json"
        spelling = "torch_dtype" if "torch_dtype" in config.raw else "dtype"
        write_json(config_file, {**config.raw, spelling: str(dtype).removeprefix("torch.")})
        sizes = {key: torch.empty(w.shape, dtype=dtype, device="meta") for key, w in weights.items()}
        plan = huggingface_hub.split_torch_state_dict_into_shards(sizes, max_shard_size=max_file_size)
        for file, keys in plan.filename_to_tensors.items():
            tensors = {key: weights[key].detach().to("cpu", dtype).contiguous() for key in keys}
            with naming(folder / file):
                save_file(tensors, temporary / file, metadata={"format": "pt"})
            shutil.copymode(config_file, temporary / file)  # else it could be read by nobody but its owner
        if plan.is_sharded:
            index = dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename)
            write_json(temporary / "model.safetensors.index.json", index)
        for name in ("generation_config.json", *TOKENIZER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)


def save_adapter(model: nn.Module, master_of: Callable[[Tensor], Tensor], folder: Path, base: str) -> None:
    """Write a folder that PEFT opens: the masters of all adapters, and what they are.

    base: the model that the adapters belong to, a folder or a hub id. The folder appears whole, in the place
    of one that is there; process 0 alone writes.
    """
    layers = adapted_layers(model)
    tensors = {}
    for name, layer in layers.items():
        for part in ADAPTER:
            master = master_of(getattr(layer, part)).detach()
            tensors[f"base_model.model.{name}.{part}.weight"] = master.to("cpu", torch.float32).contiguous()
    if rank():  # having taken part in gathering the masters of a sharded model
        return
    first = next(iter(layers.values()))
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=len(first.lora_A),
        lora_alpha=first.alpha,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )
    with replacing(folder) as temporary:
        file = temporary / "adapter_model.safetensors"
        with naming(folder / file.name):
            save_file(tensors, file, metadata={"format": "pt"})
        write_json(temporary / "adapter_config.json", config)
        shutil.copymode(temporary / "adapter_config.json", file)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of `folder`: it is on the disk before it has its name,
    and at every moment the old one or the new one is whole (between two renames the old one, as NAME.old)."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            sync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk has no room for half a folder
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------- command line

def program() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python folder.py DIR")
    model = load(sys.argv[1])
    print(json.dumps({key: value for key, value in vars(model.config).items() if key != "raw"}, indent=1))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, all tensors of the model found")


if __name__ == "__main__":
    main(program)
