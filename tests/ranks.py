"""train.py, or this file, as several ranks that torchrun starts on this machine (gloo, CPU).

As a program it checks one rank's side of a few updates, bare: python tests/ranks.py MODELS, under
torchrun.  Used by test_distributed.py and slow/test_many_ranks.py.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from nanolaser import grpo  # noqa: E402
from nanolaser.checkpoint import load_pretrained, load_state, save_pretrained  # noqa: E402
from nanolaser.cli import main_guard  # noqa: E402
from nanolaser.scale.distributed import gathered, join  # noqa: E402
from tests.core import make_batch, random_rollouts, update  # noqa: E402
from tests.kills import ENVIRONMENT, rows  # noqa: E402


def start(ranks: int, *arguments, script: str = "train.py", **more) -> subprocess.Popen:
    """A script under torchrun, in a process of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={ranks}", str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=ENVIRONMENT, **more)  # fmt: skip


def run(ranks: int, *arguments, **more) -> tuple[int, str, str]:
    """(exit code of torchrun, stdout, stderr) of it."""
    process = start(ranks, *arguments, **more)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def ours(err: str) -> list[str]:
    """Of stderr what the ranks have said, without torchrun's report: our errors begin so, and a
    traceback of a rank would run through the package, the script or this file."""
    # By the whole path of a frame: torchrun's report names the script, in whatever folder it lies.
    frames = [f'File "{ROOT / place}' for place in ("nanolaser/", "tests/", "train.py")]
    marks = ("error:", "stopped", "terminate called", *frames)
    return [line for line in err.splitlines() if any(mark in line for mark in marks)]


def processes(out: Path, size: int) -> list[int]:
    """The process ids of the ranks whose run is in `out`, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            pairs = (folder / "environ").read_bytes().split(b"\0")
            settings = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
        except OSError:  # gone, or not ours
            continue
        if str(out).encode() in words and b"LOCAL_RANK" in settings:
            found[int(settings[b"LOCAL_RANK"])] = int(folder.name)
    assert sorted(found) == list(range(size))
    return [found[rank] for rank in range(size)]


def assert_close(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    """Two runs have sampled the same and learned the same: every number of every log, and every
    weight and moment of the checkpoints."""
    # sampler_gap and logp_zc are differences and numbers of a size of 30, whose rounding is coarse
    for name in ("metrics.jsonl", "samples.jsonl", "evals.jsonl"):
        mine, theirs = rows(a / name), rows(b / name)
        assert len(mine) == len(theirs) > 0
        _close(mine, theirs, name, tolerance)
    files = sorted(f.relative_to(a) for f in a.glob("checkpoints/step-*/**/*.safetensors"))
    assert files and files == sorted(
        f.relative_to(b) for f in b.glob("checkpoints/step-*/**/*.safetensors")
    )
    for file in files:
        mine, theirs = load_file(a / file), load_file(b / file)
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert (mine[name] - theirs[name]).abs().max() <= tolerance, (file, name)
    assert not list(a.rglob("*.tmp")) and not list(b.rglob("*.tmp"))


def _close(mine, theirs, name: str, tolerance: float) -> None:
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), name
        for key in mine:
            coarse = 10 if key in ("logp_zc", "sampler_gap", "zc_gap") else 1
            _close(mine[key], theirs[key], f"{name} {key}", coarse * tolerance)
    elif isinstance(mine, list):
        assert len(mine) == len(theirs), name
        for x, y in zip(mine, theirs):
            _close(x, y, name, tolerance)
    elif isinstance(mine, float) and isinstance(theirs, float):
        assert abs(mine - theirs) <= tolerance, (name, mine, theirs)
    else:
        assert mine == theirs, name


# ---------------------------------------------------------------------------------------------
# one rank of a few updates, beside the same updates made alone


def learn(model, world, **options) -> tuple[grpo.Optimizer, list]:
    """Three steps on random rollouts, of which one rank has none left in the last round."""
    more = {} if world is None else {"world": world}
    optimizer = grpo.Optimizer(model, 1e-3, 0.01, options.get("offload", False), **more)
    said = []
    for step in range(3):
        rollouts, rng = random_rollouts(step), random.Random(step)
        for r in rollouts:
            r.r_v, r.r_s = float(rng.random() < 0.5), rng.random()
        loss = grpo.Loss(alpha=0.5, c_ref=-6.0, z_c_id=259)
        # 12 rows in micro-batches of 60 tokens: an odd number of them, or ranks idle at the end
        batch = make_batch(rollouts, 4, tau=0.5, min_std=0.0)
        stats = update(model, optimizer, batch, loss, 60, 1.0, options.get("updates", 1))
        assert stats["skipped_updates"] == 0 and stats["grad_norm"] > 0
        said.append(stats)
    return optimizer, said


def check(folders: list[Path]) -> None:
    """Every rank: the model in each folder, spread, learns what it learns alone."""
    cases = {
        "plain": ("float32", {}),
        "two updates a batch, checkpointing": ("float32", {"updates": 2, "checkpointing": True}),
        "bf16, offloaded": ("bfloat16", {"offload": True}),
    }
    with join() as world:
        for folder, (case, (dtype, options)) in itertools.product(folders, cases.items()):
            alone, _ = load_pretrained(folder, dtype=dtype)
            spread, tokenizer = load_pretrained(folder, dtype=dtype, world=world)
            held = sum(p.to_local().numel() for p in spread.parameters())
            assert held < 1.2 * sum(p.numel() for p in alone.parameters()) / world.size
            for model in (alone, spread):
                model.gradient_checkpointing = options.get("checkpointing", False)
            _, theirs = learn(alone, None, **options)
            optimizer, mine = learn(spread, world, **options)
            # bf16 holds 8 bits, and gradients of several micro-batches are summed in it
            bound = 1e-5 if dtype == "float32" else 2e-2
            for a, b in zip(mine, theirs):
                for key in a:
                    assert abs(a[key] - b[key]) <= bound * max(1, abs(b[key])), (case, key, a, b)
            everything = gathered(spread, world)
            for (name, p), q in zip(alone.named_parameters(), everything.parameters()):
                assert (p - q).abs().max() <= bound, (case, name)
            # saved by all ranks, it is a folder like any other; and a state for any number of them
            out = folder / f"saved-{dtype}-{len(options)}"
            state = (optimizer.state(), {"step": 3})
            save_pretrained(spread, tokenizer, out, state, world=world)
            world.gather([])  # the first rank has written it by now
            again, _ = load_pretrained(out, dtype=dtype)
            for p, q in zip(again.parameters(), everything.parameters()):
                assert torch.equal(p, q)
            resumed = grpo.Optimizer(again, 1e-3, 0.01, options.get("offload", False))
            resumed.load_state(load_state(out / "state")[0])
            parts = world.gather([[len(t) if t.dim() else 0 for t in optimizer.state().values()]])
            for total, t in zip(map(sum, zip(*parts)), resumed.state().values()):
                assert total == (len(t) if t.dim() else 0)
            back = load_state(out / "state", world)[0]
            for name, t in optimizer.state().items():
                assert torch.equal(back[name], t)
            world.gather([])
        print(json.dumps({"ranks": world.size, "cases": list(cases)}))


if __name__ == "__main__":
    main_guard(lambda: check([Path(folder) for folder in sys.argv[1:]]))
