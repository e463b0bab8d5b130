"""The plan: are its bytes what the code really keeps, and does it choose and refuse rightly?

The peaks here are torch's own count of living tensors (its profiler), exact and the same on every
machine; benchmarks/memory.py measures resident memory, allocator and all.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from nanolaser import grpo, sampler
from nanolaser.scale import plan as memory
from nanolaser.checkpoint import ALIASES, config_from_hf, config_to_hf
from nanolaser.scale.plan import GIB, H100, SHAPES, Plan, Settings, Workload
from nanolaser.cache import KVCache
from nanolaser.model import CausalLM, ModelConfig
from train import PRESETS, Options

SHAPE = ModelConfig(
    "qwen2", 17_000, 128, 384, 3, 4, 2, 32, tie_word_embeddings=True, attention_bias=True
)
UNLIKE = ModelConfig(
    "llama", 500, 96, 200, 2, 6, 3, 24, attention_bias=True, attention_output_bias=True,
    mlp_bias=True,
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
PAPER = Workload()
GPU = dict(dtype=torch.bfloat16, device="cuda", work=PAPER, rates=H100)


# ---------------------------------------------------------------------------------------------
# shapes


@pytest.mark.parametrize("config", [SHAPE, UNLIKE, *SHAPES.values()])
def test_parameters_are_counted_as_the_model_has_them(config):
    with torch.device("meta"):
        model = CausalLM(config)
    assert memory.parameters(config) == sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert memory.layer_parameters(config) == layer


@pytest.mark.parametrize(
    "alias, published",  # from the models' cards, in millions
    [
        ("qwen2.5-0.5b", 494), ("qwen2.5-1.5b", 1544), ("qwen2.5-3b", 3086), ("qwen2.5-7b", 7616),
        ("qwen2.5-math-1.5b", 1544), ("llama-3.2-1b", 1236), ("llama-3.2-3b", 3213),
        ("llama-3.1-8b", 8030), ("octothinker-3b", 3213), ("orz-7b", 7616), ("smollm2-135m", 135),
        ("smollm2-360m", 362), ("smollm2-1.7b", 1711), ("tinyllama-1.1b", 1100),
    ],
)  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(alias, published):
    assert round(memory.parameters(SHAPES[alias]) / 1e6) == published


def test_every_alias_has_a_shape_and_every_shape_survives_its_config():
    assert set(SHAPES) == set(ALIASES)
    for config in SHAPES.values():
        assert config_from_hf(config_to_hf(config, "bfloat16")) == config


def test_config_is_found_by_alias_hub_id_and_folder_without_a_download(tiny_checkpoint):
    assert memory.known_config("qwen2.5-7b") is memory.known_config("Qwen/Qwen2.5-7B")
    assert memory.known_config(str(tiny_checkpoint)).num_hidden_layers == 2
    assert memory.known_config("tiny").vocab_size == 108
    assert memory.known_config("somebody/something") is None


# ---------------------------------------------------------------------------------------------
# bytes: formulas against what torch keeps


def saved_bytes(model: CausalLM, rows: int, length: int) -> int:
    """Bytes of all tensors that one forward pass keeps for backward, parameters not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so no address comes twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(rows, length, dtype=torch.long))
    return sum(size for where, (size, _) in kept.items() if where not in weights)


@pytest.mark.parametrize("config", [SHAPE, UNLIKE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_activations_to_the_byte(config, dtype):
    """One layer more keeps exactly layer_activation_bytes more a token."""
    sizes = []
    for layers in (1, 2):
        shape = dataclasses.replace(config, num_hidden_layers=layers)
        sizes.append(saved_bytes(CausalLM(shape).to(dtype), 3, 16))
    assert sizes[1] - sizes[0] == 3 * 16 * memory.layer_activation_bytes(config, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_the_whole_model(dtype, checkpointing):
    model = CausalLM(SHAPE).to(dtype)
    model.gradient_checkpointing = checkpointing
    kept = saved_bytes(model, 4, 50)
    # the formula also counts the hidden states and those picked from them, which the readout
    # keeps, and not the rotary table
    later = 2 * 4 * 50 * SHAPE.hidden_size * dtype.itemsize
    planned = memory.activation_bytes(SHAPE, dtype, 4 * 50, checkpointing) - later
    assert planned == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_bytes_are_those_of_the_cache(dtype):
    cache = KVCache(SHAPE, 65, dtype=dtype)  # one more than a block
    cache.admit(list(range(8)), [0] * 8, [65])
    assert memory.kv_bytes(SHAPE, dtype, 8, 65) == cache.bytes == sum(
        t.nbytes for shelf in cache.shelves for t in shelf.layers
    )


def peak_bytes(run) -> int:
    """The most bytes that tensors made during `run` occupied at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()
    alive = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


class FakeTokenizer:
    """Never stops a rollout: the plan speaks of the longest."""

    stop_ids, z_c_id, size = (-1,), 1, SHAPE.vocab_size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_phase_of_a_step_peaks_where_the_plan_says(dtype, checkpointing):
    work = Workload(4, 4, prompt_tokens=24, max_new_tokens=72)
    settings = Settings(6 * work.longest, checkpointing, max_rows=16)
    planned = memory.device_bytes_by_phase(SHAPE, dtype, settings, work, 1, "cpu")
    totals = dict(zip(memory.PHASES, map(sum, zip(*planned.values()))))

    model = CausalLM(SHAPE).init_weights(0).to(dtype)
    model.gradient_checkpointing = checkpointing
    optimizer, rollouts = grpo.Optimizer(model, 1e-4, 0.0), []
    prompts = [[5 + i] * 24 for i in range(4)]
    measured = {
        "sample": peak_bytes(
            lambda: rollouts.extend(
                sampler.generate(model, FakeTokenizer, prompts, n=4, max_new_tokens=72,
                                 kv_cache_gb=planned["KV cache"][0] / 1e9)
            )
        )
    }
    rows = [{"r_v": float(i % 2), "r_s": 0.5, "finished": False} for i in range(16)]
    batch = grpo.make_batch(rollouts, rows, 4, 0.0, 0.1)
    update = lambda: grpo.accumulate_gradients(  # noqa: E731
        model, batch, grpo.Loss(), settings.micro_batch_tokens
    )
    update()
    optimizer.step()  # from here on there is optimizer state
    # gradients are there already and count among what was there before, as weights do
    measured["update"] = peak_bytes(update)
    measured["step"] = peak_bytes(optimizer.step)

    before = {"weights": (1, 1, 1), "optimizer state": (1, 1, 1), "gradients": (0, 1, 1)}
    for phase, name in enumerate(memory.PHASES):
        there = sum(planned[what][phase] for what, counts in before.items() if counts[phase])
        assert totals[name] == pytest.approx(there + measured[name], rel=0.08), name
        # what comes and goes is counted by itself, or large weights would hide an error in it
        if name != "step":
            assert totals[name] - there == pytest.approx(measured[name], rel=0.15), name


# ---------------------------------------------------------------------------------------------
# choosing


def plan_7b(gpus: int = 1, host_gb: float = 1000, gpu_gb: float = 80) -> Plan:
    return memory.plan(
        SHAPES["qwen2.5-7b"], device_bytes=int(gpu_gb * 1e9),
        host_bytes=int(host_gb * 1e9 / gpus), world=gpus, **GPU,
    )  # fmt: skip


def test_7b_on_one_gpu_offloads_the_optimizer_and_on_eight_does_not():
    one, eight = plan_7b(), plan_7b(gpus=8)
    assert one.fits and one.settings.offload_optimizer and one.settings.gradient_checkpointing
    assert eight.fits and not eight.settings.offload_optimizer
    # fp32 masters, two moments and the gradients' fp32 copy: 16 bytes a parameter
    assert one.host_needed == 16 * 7_615_616_512 + 3 * GIB
    assert one.rows["weights"][0] == 2 * 7_615_616_512
    assert eight.rows["weights"][0] == 2 * 7_615_616_512 // 8


@pytest.mark.parametrize("short", [dict(host_gb=100), dict(gpu_gb=24)])
def test_7b_is_refused_where_host_or_gpu_is_too_small(short):
    p = plan_7b(**short)
    assert not p.fits and "DOES NOT FIT" in p.table()


def test_settings_grow_cheaper_with_memory():
    """More memory never means more recomputing, offloading or fewer rows than less did."""
    seen = [plan_7b(gpu_gb=gb) for gb in (80, 141, 192, 288, 512)]
    assert all(p.fits for p in seen)
    cost = [(p.settings.offload_optimizer, p.settings.gradient_checkpointing) for p in seen]
    assert cost == sorted(cost, reverse=True) and cost[-1] == (False, False)
    assert seen[-1].settings == Settings()
    for p in seen:
        assert max(p.totals) <= memory.FILL * p.device_bytes


def test_wanted_settings_are_kept_where_they_fit_and_when_told():
    wanted = Settings(4096, max_rows=8)
    options = dict(work=Workload(4, 4, 64, 64), rates=H100, wanted=wanted, runtime=0)
    config = SHAPES["smollm2-135m"]
    assert memory.plan(config, device_bytes=64 * GIB, **options).settings == wanted
    told = memory.plan(config, device_bytes=1, choose=False, **options)
    assert told.settings == wanted and not told.fits


def test_malloc_keeps_small_blocks_unless_told_to_give_them_back(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    rows = {"weights": (100, 100, 100), "KV cache": (50, 0, 0)}
    assert memory.heap_bytes(SHAPE, torch.float32, 1000, rows)[:2] == (49, 33)
    # tensors of a long micro-batch are too large for the heap
    assert memory.heap_bytes(SHAPE, torch.float32, 10**6, rows) == (33, 33, 33)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    assert memory.heap_bytes(SHAPE, torch.float32, 1000, rows) == (0, 0, 0)


def test_time_knows_what_costs_time():
    config, rates = SHAPES["qwen2.5-7b"], H100
    seconds = lambda *s, world=1: memory.seconds_by_phase(  # noqa: E731
        config, torch.bfloat16, Settings(*s), PAPER, world, rates
    )
    plain, again, host = seconds(), seconds(16_384, True), seconds(16_384, False, True)
    assert again[1] > 1.2 * plain[1] and again[0] == plain[0]
    assert host[2] > 5 * plain[2]
    assert seconds(16_384, False, False, 8)[0] > 3 * plain[0]  # few rows: a GPU mostly waits
    assert seconds(world=8)[1] < plain[1] / 4


@pytest.mark.parametrize("alias", sorted(SHAPES))
def test_every_alias_has_a_table(alias):
    p = memory.plan(SHAPES[alias], device_bytes=80 * 10**9, host_bytes=10**12, name=alias, **GPU)
    lines = p.table().splitlines()
    assert p.fits and lines[0].startswith(alias)
    assert max(map(len, lines)) <= 100
    assert p.kv_cache_bytes > 0


# ---------------------------------------------------------------------------------------------
# train.py's hooks


def options_of(model: str, **changes) -> Options:
    preset = PRESETS["tiny" if model == "tiny" else "paper"]
    return dataclasses.replace(Options(model=model, device="cpu"), **preset, **changes)


@pytest.fixture
def small_machine(monkeypatch):
    """A machine of 22 GiB, whatever this one has."""
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 22 * GIB)


def test_7b_is_refused_with_plan_and_alternative_before_anything_is_loaded(small_machine, capsys):
    with pytest.raises(ValueError) as refusal:
        memory.settle(options_of("qwen2.5-7b"))
    message = str(refusal.value)
    assert "\n" not in message and "does not fit" in message
    alias = message.split("the largest that fits is ")[1].split(";")[0]
    table = capsys.readouterr().err
    assert "optimizer state" in table and "DOES NOT FIT" in table
    # the model it names does fit, and the next larger one does not
    memory.settle(options_of(alias))
    larger = [x for x in SHAPES if memory.parameters(SHAPES[x]) > memory.parameters(SHAPES[alias])]
    next_one = min(larger, key=lambda x: memory.parameters(SHAPES[x]))
    with pytest.raises(ValueError):
        memory.settle(options_of(next_one))


def test_the_embedded_model_keeps_its_options(small_machine):
    o = options_of("tiny")
    assert dataclasses.replace(memory.settle(o), kv_cache_gb=None) == o


def test_a_plan_counts_the_evaluations():
    o = options_of("tiny")
    o = dataclasses.replace(o, eval_problems=400, eval_n=8, steps=360, eval_every=120)
    p = memory.plan_for(o, rates=H100)
    # before and after 400 x 8, after steps 120 and 240 100 x 8
    assert p.work.evaluated == 8000
    assert "for 8,000 solutions" in p.table()


def test_unknown_shapes_pass_to_the_loader_but_have_no_plan():
    o = options_of("somebody/something")
    assert memory.settle(o) is o
    with pytest.raises(ValueError, match="not known without a download"):
        memory.plan_for(o)


def test_settings_go_into_the_options_that_exist_and_are_said(monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 12 * GIB)
    o = memory.settle(options_of("smollm2-135m"))
    assert o.max_rows < 256 and o.micro_batch_tokens == 16_384
    assert f"max-rows {o.max_rows}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "seconds, text",
    [(0.031, "0.03 s"), (7.26, "7.3 s"), (119, "119.0 s"), (150, "2.5 min"), (9e3, "2.5 hours"),
     (1.6e6, "18.5 days"), (1e10, "317 years")],
)  # fmt: skip
def test_times_are_readable(seconds, text):
    assert memory._span(seconds) == text


def test_ranks_of_a_machine_share_its_memory(small_machine, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    p = memory.plan_for(options_of("smollm2-135m"), rates=H100)
    assert p.world == 4 and p.device_bytes == 11 * GIB and "gathered weights" in p.rows


def test_what_this_machine_has():
    assert memory.resident_bytes() < memory.available_bytes("cpu") < 2**50
    rates = memory.measure_rates()
    assert 1e8 < rates.flops < 1e14 and rates.source.startswith("measured")


@pytest.mark.parametrize("arguments, code", [(["--gpus", "8"], 0), (["--model", "nope"], 2)])
def test_as_a_command(arguments, code):
    done = subprocess.run(
        [sys.executable, "-m", "nanolaser.scale.plan", *arguments], capture_output=True, text=True
    )
    assert done.returncode == code
    said = done.stdout if code == 0 else done.stderr
    assert "each of 8 ranks" in said if code == 0 else said.startswith("error:")
