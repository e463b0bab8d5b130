"""Checkpoints: in strictly, out whole, and nothing half-written whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanolaser import checkpoint
from nanolaser.checkpoint import (
    ALIASES,
    auto_dtype,
    find_checkpoint,
    load_pretrained,
    load_state,
    save_pretrained,
    save_state,
    write_atomic,
)
from nanolaser.scale.distributed import ALONE
from nanolaser.laser import self_reward
from nanolaser.model import CausalLM, ModelConfig
from nanolaser.readout import token_logprobs

from .conftest import TINY, run_readme_snippet

ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_checkpoint, tmp_path) -> Path:
    """A checkpoint folder to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def refused(folder, message, error=ValueError, **options) -> str:
    """The one line with which loading the folder ends."""
    with pytest.raises(error, match=message) as caught:
        load_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---------------------------------------------------------------------------------------------
# there and back


def test_round_trip_is_bit_equal(tiny, tmp_path):
    model, tokenizer = tiny
    tokenizer.set_z_c("<|reserved_0|>")
    tokenizer.c_ref, tokenizer.c_ref_std, tokenizer.beta_v = -19.25, 0.2, 0.05
    save_pretrained(model, tokenizer, tmp_path / "out")
    again, other = load_pretrained(tmp_path / "out")
    assert same_weights(model, again) and again.config == model.config
    assert (other.c_ref, other.c_ref_std, other.beta_v) == (-19.25, 0.2, 0.05)
    assert (other.z_c, other.z_c_id) == ("<|reserved_0|>", 260)
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "laser.json", WEIGHTS, "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def test_a_tied_matrix_is_written_once_and_an_untied_one_as_itself(make_checkpoint, tmp_path):
    tied = make_checkpoint(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tied / WEIGHTS)
    untied = make_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
    assert "lm_head.weight" in load_file(untied / WEIGHTS)


@pytest.mark.parametrize("disk", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16", "auto"])
def test_any_dtype_on_disk_into_the_dtype_asked_for(tiny, tmp_path, disk, asked):
    model, tokenizer = tiny
    save_pretrained(model.to(getattr(torch, disk)), tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == disk
    loaded, _ = load_pretrained(tmp_path / "out", dtype=asked)
    asked = "float32" if asked == "auto" else asked  # on a CPU
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, asked)}
    expected = model.model.norm.weight.to(getattr(torch, asked))
    assert torch.equal(loaded.model.norm.weight, expected)


def shard(folder: Path) -> None:
    """Cut the weights of a checkpoint into three files with an index, as large models come."""
    tensors, place = load_file(folder / WEIGHTS), {}
    for i in range(3):
        part = {n: t for j, (n, t) in enumerate(tensors.items()) if j % 3 == i}
        save_file(part, folder / f"model-0000{i + 1}-of-00003.safetensors")
        place |= dict.fromkeys(part, f"model-0000{i + 1}-of-00003.safetensors")
    index = {"metadata": {"total_size": 5}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def test_shards_are_read_and_replaced_by_one_file(copy, tiny):
    model, tokenizer = tiny
    shard(copy)
    assert same_weights(load_pretrained(copy)[0], model)
    save_pretrained(model, tokenizer, copy)
    assert not list(copy.glob("model-*")) and not list(copy.glob("*.index.json"))
    assert same_weights(load_pretrained(copy)[0], model)


def test_weights_are_no_view_of_the_file(copy):
    model, _ = load_pretrained(copy)
    before = model.model.norm.weight.clone()
    content = bytearray((copy / WEIGHTS).read_bytes())
    content[-4096:] = bytes(4096)
    with open(copy / WEIGHTS, "r+b") as file:  # in place: the same file, as `cp` would do
        file.write(content)
    assert torch.equal(model.model.norm.weight, before)
    # 64 bytes is what allocators give and vector units like; a file's offsets are any
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())


def test_z_c_by_argument(tiny_checkpoint):
    assert load_pretrained(tiny_checkpoint, z_c="<|reserved_0|>")[1].z_c_id == 260
    refused(tiny_checkpoint, "it is a stop token", z_c="<|im_end|>")


# ---------------------------------------------------------------------------------------------
# names


def test_names_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("qwen2.5-7", "did you mean qwen2.5-7b", FileNotFoundError)
    refused("tinny", "did you mean tiny", FileNotFoundError)
    refused("a/b/c", "is no folder, hub id .owner/name. or alias", FileNotFoundError)
    refused("./nowhere", "there is no folder ./nowhere", FileNotFoundError)
    (tmp_path / "file").write_text("")
    refused("file", "is a file; a model is a folder")
    refused(str(tmp_path), "no config.json there", FileNotFoundError)


def test_a_runs_folder_means_its_newest_checkpoint(copy, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(copy, run / "checkpoints" / "step-000002")
    (run / "checkpoints" / "latest").write_text("step-000002\n")
    (run / "config.json").write_text('{"options": {}}')  # the run's, not a model's
    for name in (run, run / "checkpoints", run / "checkpoints" / "step-000002"):
        assert find_checkpoint(name) == run / "checkpoints" / "step-000002"
    for outside in ("../../copy", str(copy), "..", "step-000002/../step-000002", "", "\0"):
        (run / "checkpoints" / "latest").write_text(outside)
        refused(run, "latest names .* no checkpoint of this run")
    (run / "checkpoints" / "latest").unlink()
    refused(run, "a run that has saved no checkpoint yet", FileNotFoundError)


def test_aliases_are_hub_ids():
    wanted = {"qwen2.5-7b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-math-1.5b", "orz-7b"}
    wanted |= {"octothinker-3b", "llama-3.2-1b", "smollm2-135m"}
    assert wanted <= set(ALIASES)
    assert all(name == name.lower() and hub_id.count("/") == 1 for name, hub_id in ALIASES.items())


def test_device_and_dtype(tiny_checkpoint, monkeypatch):
    refused(tiny_checkpoint, "dtype 'int8' is not one of float32, bfloat16,", dtype="int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(tiny_checkpoint, "torch finds no GPU here; use --device cpu", device="cuda")
    assert load_pretrained(tiny_checkpoint, device="auto", dtype="auto")[0].device.type == "cpu"


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_auto_is_bfloat16_on_a_gpu_unless_stored_in_float32(tmp_path, field):
    for stored, meant in [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16"),
                          (None, "bfloat16")]:  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({field: stored}))
        assert auto_dtype(tmp_path, "cuda") == meant
        assert auto_dtype(tmp_path, "cpu") == "float32"
    assert auto_dtype(None, "cuda") == "bfloat16"
    assert auto_dtype(find_checkpoint("tiny"), "cuda") == "float32"


# ---------------------------------------------------------------------------------------------
# strict: what does not fit is named


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_missing_surplus_and_misshapen_tensors_are_named_three_and_a_count(copy):
    def change(tensors):
        for name in [n for n in tensors if "layers.1." in n]:
            del tensors[name]
        tensors["model.layers.7.x"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(31)

    rewrite(copy, change)
    line = refused(copy, "the weights do not fit config.json")
    assert "12 missing: " in line and ", ..." in line and line.count("layers.1.") == 3
    assert "1 surplus: model.layers.7.x" in line
    assert "1 misshapen: model.norm.weight [31] instead of [32]" in line


@pytest.mark.parametrize("name, value", [
    ("hidden_size", 64), ("num_hidden_layers", 3), ("num_hidden_layers", 1), ("vocab_size", 300),
    ("head_dim", 16), ("intermediate_size", 50), ("num_key_value_heads", 4),
    ("tie_word_embeddings", False), ("model_type", "llama"),
])  # fmt: skip
def test_the_config_of_another_model(copy, name, value):
    raw = json.loads((copy / "config.json").read_text()) | {name: value}
    (copy / "config.json").write_text(json.dumps(raw))
    refused(copy, "missing|surplus|misshapen")


def test_tied_duplicates_are_taken_if_they_are_duplicates(copy, tiny):
    rewrite(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same_weights(load_pretrained(copy)[0], tiny[0])
    rewrite(copy, lambda t: t["lm_head.weight"].add_(1e-3))
    refused(copy, "lm_head.weight differs from the embedding, .* set tie_word_embeddings to false")


def test_rotary_tables_of_old_llama_checkpoints_are_no_surplus(copy):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(copy, lambda t: t.update({name: torch.ones(4)}))
    load_pretrained(copy)


def test_quantised_weights_are_refused(copy):
    rewrite(copy, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    refused(copy, "model.norm.weight is I8: quantised weights are not supported")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_weights_that_are_no_numbers_are_refused(copy, bad, asked):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(copy, lambda tensors: tensors[name][3, 5].fill_(bad))
    line = refused(copy, "NaN or infinity", dtype=asked)
    assert name in line and WEIGHTS in line
    rewrite(copy, lambda tensors: tensors[name][3, 5].fill_(1e6))  # fits into all but float16
    refused(copy, "NaN or infinity", dtype="float16")
    load_pretrained(copy, dtype="bfloat16")


@pytest.mark.parametrize("damage", [
    lambda b: b[:-100], lambda b: b[:1000], lambda b: b[:4], lambda b: b"", lambda b: b + b"more",
    lambda b: b"\x80\x04" + b[2:], lambda b: struct.pack("<Q", 2**63) + b[8:],
    lambda b: b[:8] + b"?" + b[9:],
])  # fmt: skip
def test_truncated_and_corrupt_files_are_one_line_that_names_them(copy, damage):
    (copy / WEIGHTS).write_bytes(damage((copy / WEIGHTS).read_bytes()))
    assert str(copy / WEIGHTS) in refused(copy, "truncated or corrupt")


def test_folders_without_weights(copy):
    os.rename(copy / WEIGHTS, copy / "pytorch_model.bin")
    refused(copy, "pytorch_model.bin is a pickle, .* and is not read", FileNotFoundError)
    (copy / "pytorch_model.bin").unlink()
    refused(copy, "no weights there; model.safetensors is missing", FileNotFoundError)


def test_a_truncated_and_a_missing_shard_and_a_hostile_index(tiny, tmp_path):
    save_pretrained(*tiny, tmp_path / "out")
    shard(tmp_path / "out")
    victim = sorted((tmp_path / "out").glob("model-*"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    assert str(victim) in refused(tmp_path / "out", "truncated or corrupt")
    victim.unlink()
    refused(tmp_path / "out", f"shard {victim.name} is missing", FileNotFoundError)
    index = tmp_path / "out" / "model.safetensors.index.json"
    for content, message in [
        ('{"weight_map": {"x": "../../secrets"}}', "names '../../secrets', .* not a file beside"),
        ('{"weight_map": {"x": 5}}', "names 5"),
        ("{}", "no weight_map"),
        ("[]", "is damaged"),
        ("{", "is damaged"),
    ]:
        index.write_text(content)
        refused(tmp_path / "out", message)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_damaged_config(copy, content):
    (copy / "config.json").write_text(content)
    refused(copy, "config.json")


def test_a_checkpoint_without_laser_json_is_one_that_was_never_trained_here(copy):
    (copy / "laser.json").unlink()
    tokenizer = load_pretrained(copy)[1]
    assert (tokenizer.c_ref, tokenizer.beta_v, tokenizer.z_c) == (None, 0.1, "<|vision_start|>")


class Bomb:
    """Unpickling it would create the file OWNED."""

    def __reduce__(self):
        return (os.system, ("touch OWNED",))


def test_a_planted_pickle_is_never_run(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "state.pkl"):
        torch.save(Bomb(), copy / name)
    load_pretrained(copy)
    shutil.copy(copy / "optimizer.pt", copy / WEIGHTS)  # under a trusted name
    refused(copy, "truncated or corrupt")
    assert not (tmp_path / "OWNED").exists()
    torch.load(copy / "state.pkl", weights_only=False)  # and it would have worked
    assert (tmp_path / "OWNED").exists()


# ---------------------------------------------------------------------------------------------
# written whole or not at all


def test_write_atomic(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "text é\n")
    write_atomic(path, b"bytes")
    assert path.read_bytes() == b"bytes" and os.listdir(tmp_path) == ["file"]


def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_write_atomic_follows_links_and_replaces_no_device_or_pipe(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o600)
    for link, target in (("link", "real"), ("dangling", "new"), ("two", "link")):
        (tmp_path / link).symlink_to(target)
        write_atomic(tmp_path / link, f"by {link}")
        assert (tmp_path / link).is_symlink() and (tmp_path / target).read_text() == f"by {link}"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600  # private before, private after
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError):
        write_atomic(tmp_path / "loop", "x")
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    write_atomic(tmp_path / "pipe", "through")
    assert reader.communicate(timeout=20)[0] == b"through"
    with contextlib.suppress(PermissionError):  # one that may be lost, where we may make one
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    for device in filter(os.path.exists, [tmp_path / "null"]):
        write_atomic(device, "away")
        assert stat.S_ISCHR(os.stat(device).st_mode)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("when", range(0, 12, 2))
def test_a_save_that_fails_leaves_what_was_there(tiny, tmp_path, monkeypatch, when):
    save_pretrained(*tiny, tmp_path / "old")
    calls = iter(range(100))
    fsync = os.fsync

    def full_at_some_point(descriptor):
        if next(calls) == when:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_some_point)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(*tiny, tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"]


def test_our_files_are_the_librarys_byte_by_byte(tmp_path):
    tensors = {
        "z": torch.randn(3, 5).T,  # a view
        "b": torch.randn(7).bfloat16(),
        "a": torch.randn(2, 3, 4),
        "step": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "é": torch.randn(3).double(),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    checkpoint._write_tensors(tmp_path / "ours", tensors, ALONE)
    dense = {name: t.contiguous() for name, t in tensors.items()}
    save_file(dense, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
def test_a_full_disk_is_named(tiny):
    with pytest.raises(OSError, match="No space left") as error:
        checkpoint._write_tensors(Path("/dev/full"), tiny[0].state_dict(), ALONE)
    assert error.value.errno == errno.ENOSPC and error.value.filename == "/dev/full"


def test_a_killed_save_is_cleared_away_by_the_next(tiny, tmp_path):
    leftover = tmp_path / "new.incomplete.tmp"
    leftover.mkdir()
    (leftover / WEIGHTS).write_bytes(b"half")
    save_pretrained(*tiny, tmp_path / "new")
    assert os.listdir(tmp_path) == ["new"]


def test_saving_again_replaces_files_and_keeps_foreign_ones(tiny, tmp_path):
    model, tokenizer = tiny
    out = tmp_path / "out"
    save_pretrained(model, tokenizer, out)
    (out / "notes.txt").write_text("mine")
    with torch.no_grad():
        model.model.norm.weight += 1
    save_pretrained(model, tokenizer, out)
    assert same_weights(load_pretrained(out)[0], model)
    assert (out / "notes.txt").read_text() == "mine"


def test_files_are_readable_by_others_as_the_umask_has_it(tiny, tmp_path):
    save_pretrained(*tiny, tmp_path / "out")
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1


def test_where_nothing_can_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        save_pretrained(*tiny, tmp_path / "file" / "out")


# ---------------------------------------------------------------------------------------------
# resume state


def optimizer_like():
    generator = torch.Generator().manual_seed(0)
    return {
        "m.weight": torch.randn(4, 5, generator=generator),
        "v.weight": torch.randn(5, 4, generator=generator).T,  # not contiguous
        "half": torch.randn(3, generator=generator).bfloat16(),
        "step": torch.tensor(7),
        "random": torch.get_rng_state(),
    }


def test_state_round_trip_is_bit_equal(tiny, tmp_path):
    meta = {"step": 7, "phase": "reasoning", "c_ref": 0.1 + 0.2, "order": (3, 1), 5: None}
    save_pretrained(*tiny, tmp_path / "out", state=(optimizer_like(), meta))
    tensors, read = load_state(tmp_path / "out" / "state")
    for name, value in optimizer_like().items():
        assert torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype
    assert read == {"step": 7, "phase": "reasoning", "c_ref": 0.1 + 0.2, "order": [3, 1], "5": None}
    names = sorted(p.name for p in (tmp_path / "out" / "state").iterdir())
    assert names == ["state.json", "state.safetensors"]


def test_state_alone(tmp_path):
    save_state(tmp_path / "s", {"x": torch.ones(2)}, {"step": 1})
    assert load_state(tmp_path / "s")[1] == {"step": 1}
    with pytest.raises(FileNotFoundError, match="no resume state there"):
        load_state(tmp_path)
    with pytest.raises(ValueError):  # NaN is not JSON
        save_state(tmp_path / "s", {}, {"loss": float("nan")})


@pytest.mark.parametrize("name", [
    WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "laser.json",
    "generation_config.json", "state/state.safetensors", "state/state.json",
])  # fmt: skip
def test_one_changed_byte_is_found_and_the_file_named(tiny, tmp_path, name):
    out = tmp_path / "out"
    save_pretrained(*tiny, out, state=(optimizer_like(), {"step": 7, "c_ref": -20.5}))
    content = bytearray((out / name).read_bytes())
    place = content.find(b"7") if name.endswith("state.json") else len(content) // 2
    content[place] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as error:
        load_state(out / "state")
    line = str(error.value)
    assert Path(name).name in line and "resume from an older" in line and "\n" not in line


@pytest.mark.parametrize("name", ["laser.json", WEIGHTS, "state/state.safetensors"])
def test_a_lost_file_is_found_and_named(tiny, tmp_path, name):
    out = tmp_path / "out"
    save_pretrained(*tiny, out, state=(optimizer_like(), {}))
    (out / name).unlink()
    with pytest.raises(ValueError, match=f"{Path(name).name} is missing"):
        load_state(out / "state")


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", '{"meta": {}, "sha256": {}}', '{"meta": {}, "sha256": 5}',
])  # fmt: skip
def test_a_damaged_state_json(tmp_path, content):
    save_state(tmp_path, {"x": torch.ones(2)}, {})
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match="state.json is damaged"):
        load_state(tmp_path)


# ---------------------------------------------------------------------------------------------
# memory, and other people's tools


MEASURE = """
import sys
from nanolaser import checkpoint

def memory(what):  # bytes; not ru_maxrss, which a child inherits from the process that forked it
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))

checkpoint.load_pretrained(sys.argv[1])  # a small one first: libraries and their pools
before = memory("VmRSS")
model, _ = checkpoint.load_pretrained(sys.argv[2], dtype=sys.argv[3])
print(memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_loading_needs_one_copy_and_a_tensor(tiny, tmp_path):
    large = {**TINY, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 7}
    with torch.device("meta"):
        model = CausalLM(ModelConfig(**large)).bfloat16()
    model.to_empty(device="cpu").requires_grad_(False)
    for p in model.parameters():
        p.fill_(0.5)
    save_pretrained(tiny[0], tiny[1], tmp_path / "small")
    save_pretrained(model, tiny[1], tmp_path / "large")  # 17M parameters: 34 MB in one file
    for dtype in ("bfloat16", "float32"):  # a process each: freed memory would serve the second
        folders = [str(tmp_path / "small"), str(tmp_path / "large")]
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, *folders, dtype],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        grown, size = map(int, result.stdout.split())
        assert size > 34e6
        # a second copy would be 34 or 68 MB more
        assert 0.9 * size < grown < 1.1 * size + 12e6, f"{grown / 1e6:.0f} for {size / 1e6:.0f} MB"


def test_r_s_read_in_plain_transformers_as_the_readme_does(tiny, tmp_path, capsys):
    """Exactly the snippet of the docs, on another folder and another solution."""
    pytest.importorskip("transformers")
    model, tokenizer = tiny
    tokenizer.c_ref = -4.0
    save_pretrained(model, tokenizer, tmp_path / "out")
    names = run_readme_snippet(tmp_path / "out")

    # ours: ids in, no text in between
    ids = tokenizer.encode_prompt(names["problem"]) + tokenizer.encode(names["solution"])
    ids.append(tokenizer.stop_ids[0])
    assert names["ids"] == ids
    with torch.no_grad():
        hidden = model(torch.tensor([ids]))[:, -1]
        logp = token_logprobs(hidden, model.lm_head_weight, torch.tensor([tokenizer.z_c_id]))
    r_s = float(self_reward(logp, -4.0, tokenizer.beta_v))
    printed = float(capsys.readouterr().out.split("r_s =")[1].split()[0])
    assert printed == pytest.approx(r_s, abs=1e-5)
