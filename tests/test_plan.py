"""The plan: are its bytes what the code really keeps, and does it choose and refuse rightly?

The peaks here are torch's own count of living tensors (its profiler), exact and the same on every
machine; benchmarks/memory.py measures resident memory, allocator and all.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from nanolaser import grpo
from nanolaser.cache import KVCache
from nanolaser.checkpoint import ALIASES
from nanolaser.lora import AdaptedLinear, Lora, attach, fill
from nanolaser.model import CausalLM, ModelConfig
from nanolaser.scale import plan as planning
from nanolaser.scale.optimizer import Optimizer
from nanolaser.scale.plan import FILL, GIB, SHAPES, Plan, Settings, Workload
from nanolaser.tiny.__main__ import init_weights

SHAPE = ModelConfig(
    "qwen2", 17_000, 128, 384, 3, 4, 2, 32, tie_word_embeddings=True, attention_bias=True
)
UNLIKE = ModelConfig(
    "llama", 500, 96, 200, 2, 6, 3, 24, attention_bias=True, attention_output_bias=True,
    mlp_bias=True,
)  # fmt: skip
NORMED = ModelConfig("qwen3", 500, 96, 200, 2, 6, 3, 24, qk_norm=True)
DTYPES = (torch.float32, torch.bfloat16)


# ---------------------------------------------------------------------------------------------
# shapes


@pytest.mark.parametrize("config", [SHAPE, UNLIKE, NORMED, *SHAPES.values()])
def test_parameters_are_counted_as_the_model_has_them(config):
    with torch.device("meta"):
        model = CausalLM(config)
    assert planning.parameters(config) == sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert planning.layer_parameters(config) == layer


def test_shapes_have_the_published_number_of_parameters():
    published = {  # from the models' cards, in millions
        "qwen2.5-0.5b": 494, "qwen2.5-1.5b": 1544, "qwen2.5-3b": 3086, "qwen2.5-7b": 7616,
        "qwen3-0.6b": 596, "qwen3-1.7b": 1721, "qwen3-4b": 4022, "qwen3-8b": 8191,
        "qwen2.5-math-1.5b": 1544, "llama-3.2-1b": 1236, "llama-3.2-3b": 3213,
        "llama-3.1-8b": 8030, "octothinker-3b": 3213, "orz-7b": 7616, "smollm2-135m": 135,
        "smollm2-360m": 362, "smollm2-1.7b": 1711, "tinyllama-1.1b": 1100,
    }  # fmt: skip
    counted = {alias: round(planning.parameters(SHAPES[alias]) / 1e6) for alias in published}
    assert counted == published
    assert set(SHAPES) == set(ALIASES)


def test_config_is_found_by_alias_hub_id_and_folder_without_a_download(tiny_checkpoint):
    assert planning.known_config("qwen2.5-7b") is planning.known_config("Qwen/Qwen2.5-7B")
    assert planning.known_config(str(tiny_checkpoint)).num_hidden_layers == 2
    assert planning.known_config("tiny").vocab_size == 108
    assert planning.known_config("somebody/something") is None


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


@pytest.mark.parametrize("config", [SHAPE, UNLIKE, NORMED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora", [(), (4, "all"), (4, "attention")])
def test_layer_activations_to_the_byte(config, dtype, lora):
    """One layer more keeps exactly layer_activation_bytes more a token."""
    sizes = []
    for layers in (1, 2):
        model = CausalLM(dataclasses.replace(config, num_hidden_layers=layers)).to(dtype)
        if lora:
            attach(model, Lora(lora[0], 8, lora[1]))
            fill(model)
            counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert counted == planning.adapter_parameters(model.config, *lora)
        sizes.append(saved_bytes(model, 3, 16))
    assert sizes[1] - sizes[0] == 3 * 16 * planning.layer_activation_bytes(config, dtype, *lora)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_bytes_are_those_of_the_cache(dtype):
    c = SHAPE
    cache = KVCache(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, 65, dtype=dtype)
    cache.admit(list(range(8)), [0] * 8, [65])  # one more than a block
    assert planning.kv_bytes(SHAPE, dtype, 8, 65) == cache.bytes


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
@pytest.mark.parametrize("rank", [0, 8])
def test_each_phase_of_a_step_peaks_where_the_plan_says(dtype, checkpointing, rank):
    work = Workload(4, 4, prompt_tokens=24, max_new_tokens=72, lora_rank=rank)
    settings = Settings(2 * (24 + 4 * 72), checkpointing)  # two whole groups
    planned = dict(Plan(SHAPE, 64 * GIB, 64 * GIB, dtype, work=work, settings=settings).bytes)
    # what a process takes beside its tensors is the benchmark's business
    del planned["Python, torch"]
    totals = dict(zip(planning.PHASES, map(sum, zip(*planned.values()))))

    model = init_weights(CausalLM(SHAPE), 0).to(dtype)
    if rank:
        attach(model, Lora(rank, 16))
        fill(model)
    model.gradient_checkpointing = checkpointing
    optimizer, rollouts = Optimizer(model, 1e-4, 0.0), []
    problems = [SimpleNamespace(problem=[5 + i] * 24) for i in range(4)]
    measured = {
        "sample": peak_bytes(
            lambda: rollouts.extend(
                grpo.sample(model, FakeTokenizer, problems, 4, max_new_tokens=72,
                            kv_cache_gb=planned["KV cache"][0] / 1e9)
            )
        )
    }
    for i, r in enumerate(rollouts):
        r.r_v, r.finished = float(i % 2), False
    advantages, weights = torch.tensor([-1.0, 1.0] * 8), torch.zeros(16)
    update = lambda: grpo.accumulate_gradients(  # noqa: E731
        model, rollouts, advantages, weights, grpo.Loss(), settings.micro_batch_tokens
    )
    update()
    optimizer.step(), optimizer.zero_grad()  # from here on there is optimizer state
    update()  # and from here on gradients, which count among what was there before
    measured["update"] = peak_bytes(update)
    optimizer.zero_grad()

    def step():  # with gradients of its own: the profiler sees no block go that it saw not come
        for p in optimizer.parameters:
            p.grad = torch.ones_like(p)
        optimizer.clip(1.0), optimizer.step()

    measured["step"] = peak_bytes(step)

    there = dict.fromkeys(planning.PHASES, planned["weights"][0] + planned["optimizer state"][0])
    there["update"] += planned["gradients"][1]
    if rank:  # the copy is made once, when the first rollouts are sampled
        assert planned["weights, unmerged"][0] == sum(
            m.frozen.nbytes for m in model.modules() if isinstance(m, AdaptedLinear))
        for name in ("update", "step"):
            there[name] += planned["weights, unmerged"][0]
    for name in planning.PHASES:
        assert totals[name] == pytest.approx(there[name] + measured[name], rel=0.08), name
        # what comes and goes is counted by itself, or large weights would hide an error in it
        if name != "step":
            assert totals[name] - there[name] == pytest.approx(measured[name], rel=0.15), name


# ---------------------------------------------------------------------------------------------
# choosing


def plan_7b(gpus: int = 1, host_gb: float = 1000, gpu_gb: float = 80) -> Plan:
    return planning.plan(
        SHAPES["qwen2.5-7b"], device_bytes=int(gpu_gb * 1e9), host_bytes=int(host_gb * 1e9 / gpus),
        world=gpus, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip


def test_7b_on_one_gpu_offloads_the_optimizer_and_on_eight_does_not():
    one, eight = plan_7b(), plan_7b(gpus=8)
    assert one.fits and one.settings.offload_optimizer and one.settings.gradient_checkpointing
    assert eight.fits and not eight.settings.offload_optimizer
    n = 7_615_616_512
    # fp32 masters, two moments and the gradients' sums: 16 bytes a parameter
    assert one.host_needed == 16 * n + 3 * GIB
    assert one.bytes["weights"][0] == 2 * n and eight.bytes["weights"][0] == 2 * n // 8
    # bf16 gradients and their fp32 sums while there are micro-batches, then the sums alone
    assert eight.bytes["gradients"] == (0, 2 * n // 8, 0)
    assert eight.bytes["gradients summed in fp32"] == (0, 4 * n // 8, 4 * n // 8)
    assert one.bytes["gradients summed in fp32"] == (0, 0, 0)  # those are the host's


@pytest.mark.parametrize("short", [dict(host_gb=100), dict(gpu_gb=24)])
def test_7b_is_refused_where_host_or_gpu_is_too_small(short):
    p = plan_7b(**short)
    assert not p.fits and "NOT FIT" in p.table()


def test_settings_grow_cheaper_with_memory():
    """More memory never means more recomputing or offloading, or fewer rows with the same of
    both; and a plan fills no more than it may."""
    seen = [plan_7b(gpu_gb=gb) for gb in (80, 120, 141, 192, 288, 512)]
    cost = [(p.settings.offload_optimizer, p.settings.gradient_checkpointing) for p in seen]
    assert cost == sorted(cost, reverse=True) and cost[0] == (True, True)
    assert seen[-1].settings == Settings() and seen[-1].rows == 256
    assert seen[0].rows < seen[1].rows
    for p in seen:
        assert p.fits and max(p.totals) <= FILL * p.device_bytes
        assert 16 <= p.rows <= 256 and p.totals[0] + p.kv_cache_bytes - p.bytes["KV cache"][0] <= (
            FILL * p.device_bytes
        )


@pytest.mark.parametrize("prompt, new", [(64, 8192), (64, 1024), (2048, 64)])
def test_the_cache_takes_what_is_left_and_no_more(prompt, new):
    """Whatever the lengths, as many rows are sampled at a time as there is room for: the plan
    fits, and one of twice the rows would not."""
    p = planning.plan(SHAPES["llama-3.1-8b"], device_bytes=60 * 10**9, host_bytes=10**12, world=8,
                      dtype=torch.bfloat16, device="cuda",
                      work=Workload(512, prompt_tokens=prompt, max_new_tokens=new))  # fmt: skip
    assert p.fits and not p.settings.offload_optimizer and p.rows > 16
    if p.rows < 256:
        twice = planning.bytes_by_phase(p, 2 * p.rows)
        assert sum(sizes[0] for sizes in twice.values()) > FILL * p.device_bytes


def test_few_rows_are_the_last_resort():
    """What fits with one row at a time only is still a plan."""
    small = SHAPES["smollm2-1.7b"]  # two gigabytes of KV cache for a row of the paper's length
    p = planning.plan(small, device_bytes=18 * 10**9, host_bytes=10**12, dtype=torch.bfloat16,
                      device="cuda")  # fmt: skip
    assert p.fits and 1 <= p.rows < 16 and p.settings == Settings(16_384, True, True)


def test_time_knows_what_costs_time():
    def seconds(*s, world=1, rows=256):
        work = Workload(max_rows=rows)
        return planning.seconds_of_step(Plan(
            SHAPES["qwen2.5-7b"], 10**12, 10**12, torch.bfloat16, device="cuda", world=world,
            work=work, settings=Settings(*s),
        ))  # fmt: skip

    plain, again, host = seconds(), seconds(16_384, True), seconds(16_384, False, True)
    assert again[1] > 1.2 * plain[1] and again[0] == plain[0]
    assert host[1] > plain[1]
    assert seconds(rows=8)[0] > 3 * plain[0]  # few rows: a GPU mostly waits
    assert seconds(world=8)[1] < plain[1] / 4


# ---------------------------------------------------------------------------------------------
# train.py's hooks


@dataclasses.dataclass
class Options:
    """Of train.py's options those that a plan reads; the paper's numbers."""

    model: str
    device: str = "cpu"
    dtype: str = "auto"
    data: str = "deepmath"
    steps: int = 800
    problems_per_step: int = 128
    group_size: int = 8
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 8192
    max_rows: int = 256
    kv_cache_gb: float | None = None
    c_ref: float | str = "auto"
    eval_every: int = 20
    eval_problems: int = 400
    eval_n: int = 2
    micro_batch_tokens: int = 16_384
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False
    lora_rank: int = 0
    lora_targets: str = "all"


TINY = dict(model="tiny", data="arithmetic", problems_per_step=16, max_new_tokens=96,
            micro_batch_tokens=2048, steps=360, eval_every=120, eval_n=8)  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """machine(gib) makes this one seem to have so much memory."""
    return lambda gib: monkeypatch.setattr(
        planning, "available_bytes", lambda device="cpu": int(gib * GIB)
    )


def test_7b_is_refused_with_plan_and_alternative_before_anything_is_loaded(machine, capsys):
    machine(22)
    with pytest.raises(ValueError, match="does not fit") as refusal:
        planning.settle(Options("qwen2.5-7b"))
    assert "\n" not in str(refusal.value)
    alias = str(refusal.value).split("the largest that fits is ")[1].split(";")[0]
    table = capsys.readouterr().err
    assert "optimizer state" in table and max(map(len, table.splitlines())) <= 100
    # the model it names does fit, and the next larger one does not
    planning.settle(Options(alias))
    size = lambda alias: planning.parameters(SHAPES[alias])  # noqa: E731
    next_one = min((x for x in SHAPES if size(x) > size(alias)), key=size)
    with pytest.raises(ValueError):
        planning.settle(Options(next_one))


def test_options_that_fit_are_kept_and_others_changed_and_said(machine, capsys):
    machine(22)
    o = Options(**TINY)
    settled = planning.settle(o)
    assert settled.kv_cache_gb > 1 and dataclasses.replace(settled, kv_cache_gb=None) == o
    assert planning.settle(dataclasses.replace(o, kv_cache_gb=0.5)).kv_cache_gb == 0.5
    assert capsys.readouterr().out == ""
    machine(10)
    o = Options("smollm2-135m")
    settled = planning.settle(o)
    assert settled.gradient_checkpointing and not o.gradient_checkpointing
    assert "gradient-checkpointing" in capsys.readouterr().out


def test_an_exact_reference_is_a_second_model(machine):
    machine(22)
    one, two = (planning.plan_for(Options("smollm2-135m", c_ref=c)).bytes["weights"]
                for c in ("auto", "exact"))  # fmt: skip
    assert two == tuple(2 * size for size in one)


def test_unknown_shapes_pass_to_the_loader_but_have_no_plan():
    o = Options("somebody/something")
    assert planning.settle(o) is o
    with pytest.raises(ValueError, match="without a download"):
        planning.plan_for(o)


def test_ranks_of_a_machine_share_its_memory(machine, monkeypatch):
    machine(22)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    p = planning.plan_for(Options("smollm2-135m"))
    assert p.world == 4 and p.device_bytes == 11 * GIB and p.bytes["gathered weights"][0] > 0


@pytest.mark.parametrize("limit, used, there", [
    ("max", 0, 8),  # no limit: what the system calls available, and what is ours already
    (5, 3, 3),  # a container's limit, of which others use 2
    (64, 3, 8),  # one that is larger than the machine
])  # fmt: skip
def test_available_memory_is_that_of_machine_and_container(
    tmp_path, monkeypatch, limit, used, there
):
    monkeypatch.setattr(planning, "Path", lambda path: tmp_path / path.lstrip("/"))
    in_bytes = lambda gib: gib if gib == "max" else str(gib * GIB)  # noqa: E731
    for name, content in {
        "proc/self/statm": f"99999999 {GIB // planning.os.sysconf('SC_PAGE_SIZE')} 0",  # 1 GiB
        "proc/meminfo": f"MemTotal: 1 kB\nMemFree: 2 kB\nMemAvailable: {7 * 2**20} kB\n",
        "sys/fs/cgroup/memory.max": in_bytes(limit),
        "sys/fs/cgroup/memory.current": in_bytes(used),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert planning.available_bytes("cpu") == there * GIB
    # half of what is free beside what this process holds
    assert planning.default_kv_cache_gb(torch.device("cpu")) == (there - 1) * GIB / 2e9


def test_adapters_make_room():
    """On one GPU of 80 GB 7B weights need no offloading then; and a table says it of each model."""
    one = planning.Options(lora_rank=16).plan(SHAPES["qwen2.5-7b"])
    assert one.fits and not one.settings.offload_optimizer
    table = planning.cards_table(planning.Options(cards=(24, 80)))
    row = next(line for line in table.splitlines() if line.startswith("| qwen2.5-7b "))
    assert row.split(" | ")[2:] == ["-", "-", "offloaded", "yes |"]
    assert planning.Options(lora_rank=16, device_gb=24).plan(SHAPES["qwen3-4b"]).fits


@pytest.mark.parametrize(
    "arguments, code", [(["--gpus", "8"], 0), (["--host-gb", "64"], 1), (["--model", "nope"], 2)]
)
def test_as_a_command(arguments, code):
    command = [sys.executable, "-W", "error", "-m", "nanolaser.scale.plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    if code == 2:
        assert done.stderr.startswith("error:") and len(done.stderr.splitlines()) == 1
    else:
        assert "time of a step" in done.stdout and done.stderr == ""


def test_train_has_the_options_that_a_plan_reads(machine, call):
    """The list above, and train.py's, are the same contract."""
    machine(22)
    code, out, _ = call("train.py", "--plan")
    assert code == 0 and "time of a step" in out
