"""
Checkpoints: a Hugging Face folder or hub id in, a Hugging Face folder out, and the resume state.

    model, tokenizer = load_pretrained("qwen2.5-0.5b")       # alias, hub id or folder
    save_pretrained(model, tokenizer, "my-model")             # transformers and vLLM load it

On disk there is safetensors and JSON, which can execute nothing.  (A .bin or .pt checkpoint is a
pickle, that is, a program; it is not read at all.)  Loading is strict: a model that runs with a
random layer in it looks almost like one that was trained.  Saving is whole or not at all.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .scale.distributed import ALONE, World, local
from .cli import near
from .files import HUB_ID, fetch, latest_checkpoint, read_json, sync_folder, write_atomic
from .lora import ADAPTER, Lora, attach, fill, in_peft, is_adapter, merged
from .model import CausalLM, ModelConfig
from .tokenizer import FILES as TOKENIZER_FILES
from .tokenizer import Tokenizer, to_json

# Short names of models.  Most are those of the hub in small letters, without the owner: --model
# qwen2.5-7b is Qwen/Qwen2.5-7B.  (Qwen3's bare name is the instruct model's, and so is ours.)
PUBLISHED = {
    "Qwen": "Qwen2.5-0.5B Qwen2.5-0.5B-Instruct Qwen2.5-1.5B Qwen2.5-1.5B-Instruct Qwen2.5-3B "
            "Qwen2.5-7B Qwen2.5-7B-Instruct Qwen2.5-Math-1.5B Qwen2.5-Math-7B Qwen3-0.6B "
            "Qwen3-0.6B-Base Qwen3-1.7B Qwen3-1.7B-Base Qwen3-4B Qwen3-4B-Base Qwen3-8B "
            "Qwen3-8B-Base",
    "meta-llama": "Llama-3.2-1B Llama-3.2-3B Llama-3.1-8B",
    "HuggingFaceTB": "SmolLM2-135M SmolLM2-135M-Instruct SmolLM2-360M SmolLM2-1.7B",
}  # fmt: skip
ALIASES = {name.lower(): f"{owner}/{name}" for owner in PUBLISHED
           for name in PUBLISHED[owner].split()}  # fmt: skip
ALIASES |= {
    "orz-7b": "Open-Reasoner-Zero/Open-Reasoner-Zero-7B",
    "octothinker-3b": "OctoThinker/OctoThinker-3B-Short-Base",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
# The embedded ones are folders beside this file.
TINY = Path(__file__).parent / "tiny"
EMBEDDED = {"tiny": TINY, "tiny-subset-sum": TINY / "subset-sum"}

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# All that is needed of a repository, which may also hold pickles, other formats and pictures.
# huggingface_hub takes these as shell patterns; vLLM and transformers look for the same names.
NEEDED = (*TOKENIZER_FILES, "config.json", "laser.json", WEIGHTS, INDEX, "model-*-of-*.safetensors")

# What to do about a damaged one: the older checkpoints of the run lie beside it.
OLDER = "resume from an older checkpoint: put its name (step-000080) into checkpoints/latest"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DISK_DTYPES = ("F32", "BF16", "F16", "F64")  # as safetensors calls them; others are quantised
# What is written may also be counts and the like, in a state: AdamW's steps, say.
DTYPE_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# in


def load_pretrained(
    name: str | Path, device: str = "cpu", dtype: str = "float32", z_c: str | None = None,
    world: World = ALONE, lora: Lora | None = None,
) -> tuple[CausalLM, Tokenizer]:  # fmt: skip
    """Model and tokenizer of an alias, a hub id, a checkpoint folder or a run's folder.

    device: auto, cpu, cuda; dtype: auto (see auto_dtype), float32, bfloat16, float16, whatever the
    dtype on disk.  z_c: another readout token than the checkpoint's.  world: the ranks over which
    the weights are spread.  lora: the adapters to give it; the weights are then those of lora.base.
    ValueError, FileNotFoundError or OSError, one line, for all that can be wrong with it.
    """
    # 1. Where is it, and in what shall it compute?
    folder = find_checkpoint(name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU here; use --device cpu")
    if dtype == "auto":
        dtype = auto_dtype(folder, device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}, auto")
    # 2. The tokenizer before the weights: seconds spent on gigabytes are lost if it is wrong.
    tokenizer = Tokenizer.from_folder(folder)
    if z_c is not None:
        tokenizer.set_z_c(z_c)
    if lora is not None:
        # A checkpoint of adapters holds merged weights too; but what they are learned beside is the
        # base model, to the last bit, and merging has rounded it away.
        folder, base = find_checkpoint(lora.base), ALIASES.get(lora.base.lower(), lora.base)
        lora = replace(lora, base=base, z_c_id=tokenizer.z_c_id)
    # 3. The weights.
    model = _load_model(folder, torch.device(device), DTYPES[dtype], world, lora)
    return model, tokenizer


def auto_dtype(folder: Path | None, device: str) -> str:
    """What dtype auto means for a checkpoint; None: one that was not downloaded yet."""
    # float32 on a CPU, for most emulate bfloat16, slowly.  On a GPU bfloat16 halves memory and more
    # than doubles speed, and what is stored in 16 bits loses nothing by it.  What is stored in 32
    # may need them, as the embedded model does, and is rounded only if somebody asks for it.
    raw = {} if folder is None else read_json(folder / "config.json")
    stored = raw.get("dtype") or raw.get("torch_dtype")  # transformers 5 and before
    return "float32" if device == "cpu" or stored == "float32" else "bfloat16"


def find_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint: an embedded one, a local folder (of a checkpoint, or of a run:
    its newest checkpoint), else an alias or hub id, downloaded if the cache lacks it."""
    text = str(name)
    path = EMBEDDED.get(text) or Path(text).expanduser()
    # 1. What is here goes before what is elsewhere: a folder called Qwen/Qwen2.5-7B is that folder.
    if path.is_dir():
        return _local(path)
    if path.exists():
        raise ValueError(f"{path} is a file; a model is a folder that holds a config.json")
    # 2. A name on the hub.  What can only be a path is not asked for there.
    hub_id = ALIASES.get(text.lower(), text)
    if text.startswith((".", "~", "/")):
        raise FileNotFoundError(f"there is no folder {text}")
    if not HUB_ID.fullmatch(hub_id):
        known = [*EMBEDDED, *ALIASES]
        hint = near(text.lower(), known, "; ".join(known))
        raise FileNotFoundError(f"{text!r} is no folder, hub id (owner/name) or alias: {hint}")
    try:
        return _local(fetch(hub_id, NEEDED))
    except OSError as error:
        # owner/name is also what a mistyped relative path looks like
        lost = "" if text.lower() in ALIASES else f"there is no folder {text!r} here, and "
        raise OSError(f"{lost}{error}") from None


def _local(path: Path) -> Path:
    """The checkpoint folder that a local folder is, or points to."""
    # runs/a, runs/a/checkpoints and runs/a/checkpoints/step-000120 all mean a checkpoint.  A run's
    # folder has a config.json too (its options), so whether it is one is asked first.
    config = path / "config.json"
    inside = path.name == "checkpoints" and not config.is_file()
    newest = latest_checkpoint(path.parent if inside else path)
    if newest is not None:
        return newest
    if not config.is_file():
        raise FileNotFoundError(f"{path}: no config.json there, so this is not a model's folder")
    if "options" in read_json(config):
        raise FileNotFoundError(f"{path} is a run that has saved no checkpoint yet")
    return path


def _load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, world: World, lora: Lora | None
) -> CausalLM:
    """Build the model without memory (device meta), then hand it its tensors one by one."""
    # 1. The shape.  On the device meta a tensor is nothing else; made on the CPU, the model would
    #    first be filled with random numbers that take as long to draw as the weights to read.
    config = load_config(folder)
    with torch.device("meta"):
        model = CausalLM(config)
        if lora is not None:
            attach(model, lora)
    world.fully_shard(model, device)
    # 2. All headers before any tensor: what does not fit is said at once, not after gigabytes.
    found, places = {}, {}
    for path in _weight_files(folder):
        header = _read_header(path)
        found |= header
        places |= dict.fromkeys(header, path)
    expected = {name: list(t.shape) for name, t in _weights(model).items()}
    _check_names(folder, expected, found, config.tie_word_embeddings)
    # 3. The tensors, mapped, copied and unmapped one by one: the peak is the model and one tensor.
    #    A copy also where the dtype is right already: a mapped tensor would change with its file,
    #    and starts at an odd address, on which fast kernels round differently.
    tensors = {}
    for name, path in places.items():
        if name not in expected:  # not needed, see _check_names
            continue
        with _open(path) as file:
            tensors[name] = world.scatter(file.get_tensor(name), device, dtype)
        _check_finite(path, name, local(tensors[name]))
    # assign: these tensors become the parameters; there is nothing to copy into.
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_word_embeddings and "lm_head.weight" in places:
        _check_tied(places["lm_head.weight"], model, world)
    if lora is not None:
        fill(model, world)
    return model


def _weights(model: CausalLM) -> dict[str, Tensor]:
    """A model's weights by name, without LoRA's adapters."""
    return {name: t for name, t in model.state_dict().items() if not is_adapter(name)}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or many."""
    # One file; transformers, too, prefers it to an index beside it.
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        which = pickles[0] if pickles else "a .bin or .pt file"
        raise FileNotFoundError(f"{folder}: no weights there; {WEIGHTS} is missing ({which} is a "
                                "pickle, which can run any code, and is not read)")  # fmt: skip
    # Large models come in pieces: {"weight_map": {"model.norm.weight": "model-00002-of-...", ...}}
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / INDEX} is damaged: no weight_map in it")
    for name in places.values():
        # An index is data from elsewhere: it may name files of its own folder, and no others.
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{folder / INDEX} names {name!r}, which is not a file beside it")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: shard {name} is missing; copy or download it again")
    return [folder / name for name in sorted(set(places.values()))]


def _open(path: Path):
    """safe_open, with its error turned into a line that names the file."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); copy it again") from None


def _read_header(path: Path) -> dict[str, list[int]]:
    """{name: shape} of the tensors in a file, none of which is read."""
    shapes = {}
    with _open(path) as file:
        for name in file.keys():
            part = file.get_slice(name)
            dtype, shapes[name] = str(part.get_dtype()), part.get_shape()
            if dtype not in DISK_DTYPES:
                raise ValueError(f"{path}: {name} is {dtype}: quantised weights are not supported")
    return shapes


def _check_names(folder: Path, expected: dict, found: dict, tied: bool) -> None:
    """ValueError unless the tensors are the model's; names three of each kind, and counts."""
    # Two kinds of tensor may be there and are not needed: the duplicate of a tied output matrix,
    # and the rotary tables that old LLaMA checkpoints carry.
    needless = ("rotary_emb.inv_freq", *(["lm_head.weight"] if tied else []))
    wrong = {
        "missing": [n for n in expected if n not in found],
        "surplus": [n for n in found if n not in expected and not n.endswith(needless)],
        "misshapen": [f"{n} {found[n]} instead of {shape}" for n, shape in expected.items()
                      if found.get(n, shape) != shape],
    }  # fmt: skip
    # "12 missing: a, b, c, ...; 1 misshapen: d [31] instead of [32]"
    said = [f"{len(names)} {kind}: {', '.join(names[:3] + ['...'] * (len(names) > 3))}"
            for kind, names in wrong.items() if names]  # fmt: skip
    if said:
        raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(said)}")


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """ValueError if a weight is NaN or infinite: one is enough to make every answer noise."""
    # Smallest and largest number tell (a NaN is both), and are found as fast as memory is read.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        what = f"the weights hold NaN or infinity ({name}, read as {tensor.dtype})"
        raise ValueError(f"{path}: {what}; take an older checkpoint, or copy it again")


def _check_tied(path: Path, model: CausalLM, world: World) -> None:
    """ValueError if the config ties the output matrix, but the file holds another one: whichever of
    the two were used, half of those who saved such a checkpoint would have meant the other."""
    with _open(path) as file:  # in the model's dtype: what differs by its rounding alone is equal
        own = file.get_tensor("lm_head.weight").to(model.device, model.dtype)
    if not torch.equal(world.local_rows(own), local(model.lm_head_weight)):
        what = "lm_head.weight differs from the embedding, to which config.json ties it"
        raise ValueError(f"{path}: {what}; set tie_word_embeddings to false there to use it")


# ---------------------------------------------------------------------------------------------
# config.json: the dialects of Hugging Face's transformers, 4 and 5

# What each family is called, and the size of a head where config.json does not say (None: C / H).
FAMILIES = {"qwen2": ("Qwen2ForCausalLM", None), "qwen3": ("Qwen3ForCausalLM", 128),
            "llama": ("LlamaForCausalLM", None)}  # fmt: skip
# The numbers: their type, the default (REQUIRED: none), and the largest that is believed.  That is
# far above any published model: with 2^62 rows the arithmetic of sizes itself fails.
REQUIRED = object()
NUMBERS = {
    "vocab_size": (int, REQUIRED, 16_777_216), "hidden_size": (int, REQUIRED, 1_048_576),
    "intermediate_size": (int, REQUIRED, 1_048_576), "num_hidden_layers": (int, REQUIRED, 1024),
    "num_attention_heads": (int, REQUIRED, 65_536), "rms_norm_eps": (float, 1e-6, 1.0),
    "max_position_embeddings": (int, 2048, 2**31), "initializer_range": (float, 0.02, 1000.0),
}  # fmt: skip


def load_config(folder: Path) -> ModelConfig:
    """The model's shape out of config.json; ValueError names the file and what is wrong."""
    path = folder / "config.json"
    try:
        return config_from_hf(read_json(path))
    except ValueError as error:
        raise ValueError(str(error).replace("config.json:", f"{path}:", 1)) from None


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A parsed config.json as a ModelConfig; ValueError names what this decoder does not implement,
    so that nothing is ever silently computed differently, and sizes that no model has."""
    kind = raw.get("model_type")
    layers = raw.get("layer_types") or ["full_attention"]
    # Qwen2.5 configs carry a sliding_window that is switched off: only a live one matters.
    sliding = raw.get("use_sliding_window", kind == "llama") and raw.get("sliding_window")
    sliding = sliding or not isinstance(layers, list) or any(x != "full_attention" for x in layers)
    # 1. What would be computed differently.
    for unsupported, what in (
        (str(kind) not in FAMILIES, f"model_type {kind!r:.40} (only {', '.join(FAMILIES)} are)"),
        (raw.get("hidden_act", "silu") != "silu", f"hidden_act {raw.get('hidden_act')!r:.40}"),
        (raw.get("quantization_config"), "a model of quantised weights"),
        (sliding, "sliding-window attention (sliding_window, layer_types)"),
    ):
        if unsupported:
            raise ValueError(f"config.json: {what} is not supported")
    # 2. Numbers.  transformers leaves out what equals the family's default.
    numbers = {name: _number(raw, name, *accepted) for name, accepted in NUMBERS.items()}
    heads, head_dim = numbers["num_attention_heads"], FAMILIES[kind][1]
    head_dim = head_dim or numbers["hidden_size"] // heads
    theta, scaling = _rope_from_hf(raw)
    eos, bos = raw.get("eos_token_id"), raw.get("bos_token_id")
    # 3. What a family says by its name: Qwen2 has q, k, v biases and never an output bias; the one
    #    switch of the other families means all four.
    bias = bool(raw.get("attention_bias"))
    config = ModelConfig(
        model_type=kind,
        **numbers,
        num_key_value_heads=_number(raw, "num_key_value_heads", int, heads, heads),
        head_dim=_number(raw, "head_dim", int, head_dim, 65_536),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        attention_bias=bias or kind == "qwen2",
        attention_output_bias=bias and kind != "qwen2",
        qk_norm=kind == "qwen3",
        mlp_bias=bool(raw.get("mlp_bias")) and kind == "llama",
        eos_token_id=tuple(i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int),
        bos_token_id=bos if type(bos) is int else None,
    )
    # Turning pairs halves a head; a key-value head serves a whole number of query heads.
    if config.head_dim % 2 or heads % config.num_key_value_heads:
        what = f"{heads} heads of head_dim {config.head_dim} (an even number) that share"
        raise ValueError(f"config.json: {what} {config.num_key_value_heads} key-value heads: that "
                         "does not divide")  # fmt: skip
    return config


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json that transformers (4 and 5) and vLLM read back; dtype as on disk."""
    kind, eos = config.model_type, config.eos_token_id
    theta, scaling = config.rope_theta, config.rope_scaling
    raw = {
        "architectures": [FAMILIES[kind][0]],
        **asdict(config),
        "hidden_act": "silu",
        # Both dialects: rope_theta and rope_scaling, which asdict has, and transformers 5's name;
        # torch_dtype, and what it is called by now.
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        "eos_token_id": [*eos] if len(eos) > 1 else eos[0] if eos else None,
    }
    # What a family says by its name (see config_from_hf) is left out.
    del raw["attention_output_bias"], raw["qk_norm"]
    if kind == "qwen2":
        del raw["attention_bias"]
    if kind != "llama":
        del raw["mlp_bias"]
        raw["use_sliding_window"] = False
    return {k: v for k, v in raw.items() if v is not None or k == "rope_scaling"}


def _number(raw: dict, name: str, kind: type, default: Any = REQUIRED, most: float = 1e12) -> Any:
    """A number above 0 from the config; absent or null stands for the default."""
    value = default if raw.get(name) is None else raw[name]
    # by type: True is an int to Python, and "12" a text.  (No float is as large as JSON's 1 and 400
    # zeros: that stays an int, and is refused.)
    value = float(value) if kind is float and type(value) is int and value < 1e300 else value
    if type(value) is not kind or not 0 < value <= most:
        wanted = f"a {'whole ' * (kind is int)}number above 0, at most {most}"
        raise ValueError(f"config.json: {name} is {raw.get(name)!r:.40}, but has to be {wanted}")
    return value


def _rope_from_hf(raw: dict[str, Any]) -> tuple[float, dict | None]:
    """rope_theta and rope_scaling out of either dialect; ValueError for a type we lack."""
    # transformers 4:  "rope_theta": 5e5, "rope_scaling": {"rope_type" or "type": "llama3", ...}
    # transformers 5:  "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", ...}
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise ValueError("config.json: rope_parameters or rope_scaling is no JSON object")
    theta = _number({"rope_theta": raw.get("rope_theta"), **new}, "rope_theta", float, 10_000.0)
    scaling = {k: v for k, v in (old or new).items() if k not in ("rope_theta", "type")}
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor is not supported")
    kind = scaling.get("rope_type", (old or new).get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: rope type {kind!r:.40} is not default or llama3")
    if kind == "default":
        return theta, None
    # read and not guessed: a wrong one only shows in long texts
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        _number(scaling, name, float)
    _number(scaling, "original_max_position_embeddings", int)
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("config.json: low_freq_factor has to be below high_freq_factor")
    return theta, {**scaling, "rope_type": "llama3"}


# ---------------------------------------------------------------------------------------------
# out


def save_pretrained(
    model: CausalLM, tokenizer: Tokenizer, folder: str | Path,
    state: tuple[dict[str, Tensor], dict] | None = None, world: World = ALONE,
) -> None:  # fmt: skip
    """Write a checkpoint folder that `load_pretrained`, transformers and vLLM load; with `state`,
    also what `load_state` reads, in its folder `state/`.  OSError if the disk is full or read-only;
    nothing is left behind then.
    """
    # Weights keep the model's dtype; a tied matrix is written once.  LoRA's adapters are merged
    # into them, for whoever knows nothing of adapters, and lie in adapter/ as well, as PEFT has
    # them.  The tokenizer's files go along unchanged: a checkpoint must not need its ancestor.
    adapter_config, adapters = in_peft(model, world)
    dtype = str(model.dtype).removeprefix("torch.")
    files = {"config.json": to_json(config_to_hf(model.config, dtype)), **tokenizer.files()}
    if adapters:
        files[str(ADAPTER.with_name("adapter_config.json"))] = to_json(adapter_config)
    with _whole(Path(folder).expanduser().resolve(), world) as temporary:
        for name, content in files.items() if world.is_first else ():
            (temporary / name).parent.mkdir(exist_ok=True)
            write_atomic(temporary / name, content)
        # Here all ranks meet, tensor by tensor, in the same order: the first one writes, handed the
        # parts of one tensor after the other, and never holds a second model.
        with merged(model, world):
            _write_tensors(temporary / WEIGHTS, _weights(model), world)
        if adapters:
            _write_tensors(temporary / ADAPTER, adapters, world)
        if state is not None:
            save_state(temporary / "state", *state, world)


@contextlib.contextmanager
def _whole(folder: Path, world: World) -> Iterator[Path]:
    """A temporary folder that takes the name of `folder` when it is complete, or is gone again; on
    other ranks than the first nothing is made."""
    # A fixed name: what a killed process left half-written is found and removed by the next.
    temporary = folder.with_name(folder.name + ".incomplete.tmp")
    if not world.is_first:
        yield temporary
        return
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_folder(temporary)
        if not folder.exists():
            os.rename(temporary, folder)  # the usual case: all of it at once
        else:
            # A folder that is there may hold files of somebody else: ours are replaced one by one.
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                file = folder / path.relative_to(temporary)
                file.parent.mkdir(exist_ok=True)
                os.replace(path, file)
            # The weights are one file now.  vLLM would read an old index and its shards instead.
            for old in (folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
                old.unlink(missing_ok=True)
            sync_folder(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well


def _write_tensors(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """One safetensors file, flushed to the disk; of many ranks each gives its rows of the tensors.
    OSError if the disk is full."""
    # The format: the length of the header in 8 bytes, the header (JSON), the tensors' bytes.  The
    # library's own writer wants all tensors at once, which for 7B parameters and AdamW's state is
    # 100 GB; here each is gathered and brought to the CPU when its turn comes.
    tensors = {name: local(t.detach()) for name, t in tensors.items()}
    # 1. The header.  How many rows a tensor has is the sum over the ranks.
    rows = world.gather([[len(t) if t.dim() else 0 for t in tensors.values()]])
    lengths = dict(zip(tensors, map(sum, zip(*rows))))
    # The widest first, as the library has it: so each begins at a multiple of its item's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for this mark
    for name in order:
        t = tensors[name]
        shape = [lengths[name], *t.shape[1:]] if t.dim() else []
        begin, end = end, end + math.prod(shape) * t.itemsize
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # 2. The bytes, one tensor after the other.  What the others gather they throw away.
    wholes = (world.all_gather(tensors[name]) for name in order)
    if not world.is_first:
        collections.deque(wholes, maxlen=0)
        return
    try:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for t in wholes:
                # the format stores dense rows; views (a transposed moment) are made dense first
                file.write(t.cpu().contiguous().view(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # a full disk does not say by itself
        raise


# ---------------------------------------------------------------------------------------------
# resume state


def save_state(
    folder: str | Path, tensors: dict[str, Tensor], meta: dict, world: World = ALONE
) -> None:
    """Write what resuming needs: tensors (the optimizer's; of many ranks, this one's rows of them)
    into state.safetensors and meta, which is anything that JSON can hold, into state.json.
    ValueError for a NaN in meta; OSError as in writing."""
    folder = Path(folder)
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    meta = json.loads(to_json(meta))  # as it will be read back: tuples are lists, keys are texts
    _write_tensors(folder / "state.safetensors", tensors, world)
    if not world.is_first:
        return
    # A state fits the weights it was saved with and no others, and a disk that lost a byte would
    # change a resumed run without a word: so the checksums of both stand in the state, and that of
    # meta itself.  {"state.safetensors": "9f8c...", "../model.safetensors": ...}
    beside = {p for pattern in (*NEEDED, "adapter/*") for p in folder.parent.glob(pattern)}
    names = [f"../{p.relative_to(folder.parent)}" for p in sorted(beside)]
    sums = {name: _sha256(folder / name) for name in ("state.safetensors", *names)}
    sums["meta"] = _sha256_of(meta)
    write_atomic(folder / "state.json", to_json({"meta": meta, "sha256": sums}))


def load_state(folder: str | Path, world: World = ALONE) -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) as they were saved; of many ranks, this one's rows of the tensors, however
    many there were then.  FileNotFoundError if there is no state; ValueError names the first file
    that is missing or not, byte for byte, what was written."""
    folder = Path(folder)
    path = folder / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no resume state there (state.json is missing)")
    # Whether state.json itself is whole comes first: it holds all the other checksums.
    try:
        saved = read_json(path)
        meta, sums = saved["meta"], dict(saved["sha256"])
        intact = sums.pop("meta") == _sha256_of(meta)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged; {OLDER}")
    for name, written in sums.items():
        file = Path(os.path.normpath(folder / name))  # state/../laser.json is laser.json
        if not file.is_file():
            raise ValueError(f"{file} is missing; {OLDER}")
        if _sha256(file) != written:
            raise ValueError(f"{file} is damaged: its checksum is not the saved one; {OLDER}")
    # Read and copied, not mapped: these tensors are about to be updated in place.
    with _open(folder / "state.safetensors") as file:
        return {name: world.local_rows(file.get_tensor(name)).clone() for name in file.keys()}, meta


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):  # never a whole model in memory
            digest.update(block)
    return digest.hexdigest()


def _sha256_of(meta: dict) -> str:
    # of one canonical spelling, so that indentation and the order of keys do not matter
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
