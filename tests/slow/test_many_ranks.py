"""Four ranks against one, through all phases; ranks that are killed, signals, another number of
ranks on resume; bf16 with the optimizer offloaded.

    python -m pytest -m slow tests/slow/test_many_ranks.py
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from .. import kills, ranks
from ..test_distributed import OPTIONS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals, gloo")]
SIX = [*OPTIONS, "--steps", "6", "--self-reward-warmup", "2", "--problems-per-step", "5"]
LONG = [*OPTIONS, "--steps", "500", "--save-every", "1", "--eval-every", "400"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    code, _, err = kills.train(*SIX, "--out", out)
    assert code == 0, err
    return out


@pytest.mark.parametrize("size", [2, 4])
def test_many_ranks_train_as_one_does(one, tmp_path, size):
    code, _, err = ranks.run(size, *SIX, "--out", tmp_path / "run")
    assert code == 0, err
    ranks.assert_close(one, tmp_path / "run")
    # and another number of ranks goes on from the middle
    (tmp_path / "run/checkpoints/latest").write_text("step-000002\n")
    code, out, err = ranks.run(6 // size, "--resume", tmp_path / "run")
    assert code == 0, err
    assert "resuming after step 2" in out
    ranks.assert_close(one, tmp_path / "run")


def test_micro_batches_and_more_updates_change_nothing(tmp_path):
    # twice the updates at half the rate: see OPTIONS
    more = ["--micro-batch-tokens", "250", "--updates-per-batch", "2", "--gradient-checkpointing",
            "--lr", "5e-5"]  # fmt: skip
    code, _, err = kills.train(*OPTIONS, *more, "--out", tmp_path / "one")
    assert code == 0, err
    code, _, err = ranks.run(3, *OPTIONS, *more, "--out", tmp_path / "three")
    assert code == 0, err
    ranks.assert_close(tmp_path / "one", tmp_path / "three")


def test_bf16_with_the_optimizer_offloaded(tmp_path):
    # In 8 bits the sampled tokens may differ; the updates of the same rollouts are compared by
    # ranks.check.  Here: it runs, saves fp32 masters, and one process goes on from them.
    out = tmp_path / "run"
    options = [*OPTIONS, "--dtype", "bfloat16", "--offload-optimizer", "--out", out]
    code, _, err = ranks.run(2, *options)
    assert code == 0, err
    assert ranks.load_file(out / "checkpoints/step-000004/state/state.safetensors").keys() >= {
        "model.norm.weight.master", "model.norm.weight.exp_avg", "model.norm.weight.step"
    }  # fmt: skip
    (out / "checkpoints/latest").write_text("step-000002\n")
    before = kills.rows(out / "metrics.jsonl")
    code, _, err = kills.train("--resume", out)
    assert code == 0, err
    after = kills.rows(out / "metrics.jsonl")
    assert [m["step"] for m in after] == [1, 2, 3, 4]
    assert after[2]["reward"] == pytest.approx(before[2]["reward"], abs=0.2)


def steps(out: Path) -> int:
    log = out / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="Linux")
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("moment", ["step", "write"])
def test_a_rank_that_is_killed_ends_the_run_with_one_line(tmp_path, rank, moment):
    out = tmp_path / "run"
    process = ranks.start(4, *LONG, "--out", out)
    assert kills.until(process, lambda: steps(out) >= 2)
    victim = ranks.processes(out, 4)[rank]
    if moment == "write":
        kills.until(process, lambda: kills.half_written(out))
    else:
        time.sleep(random.Random(rank).uniform(0, 0.5))
    os.kill(victim, signal.SIGKILL)
    said, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "everything is in" not in said
    assert len(ranks.ours(err)) == 1, err
    assert "error: another rank died or was killed" in err and "--resume" in err
    # what was being written is gone, or, if the writer is dead, cleared away by the next run
    if rank:
        assert not kills.half_written(out)
    done = steps(out)
    latest = int((out / "checkpoints/latest").read_text().strip().removeprefix("step-"))
    assert done - 1 <= latest <= done
    resumed = ranks.start(2, "--resume", out)
    assert kills.until(resumed, lambda: steps(out) >= done + 2)
    resumed.send_signal(signal.SIGTERM)
    said, err = resumed.communicate(timeout=60)
    assert f"resuming after step {latest}" in said and "stopped after step" in said, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_ends_with_a_checkpoint(tmp_path, number):
    out = tmp_path / "run"
    process = ranks.start(2, *LONG, "--save-every", "400", "--out", out)
    assert kills.until(process, lambda: steps(out) >= 2)
    process.send_signal(number)
    said, err = process.communicate(timeout=60)
    done = steps(out)
    assert f"stopped after step {done}; go on with: " in said, err
    assert "error:" not in "".join(ranks.ours(err)), err
    assert (out / "checkpoints/latest").read_text().strip() == f"step-{done:06d}"
    assert not list(out.rglob("*.tmp"))


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"problem": "1+1", "answer": 2}\n{"problem": oops\n')
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text(json.dumps({"options": {}}))
    for arguments, said in (
        (["--data", "broken.jsonl"], "broken.jsonl:2"),  # wrong on every rank
        (["--out", "used"], "--resume"),  # on the first one alone
        (["--resume", "nowhere"], "nowhere"),
    ):
        code, out, err = ranks.run(3, *SIX, *arguments, cwd=tmp_path)
        assert code != 0 and len(ranks.ours(err)) == 1 and said in ranks.ours(err)[0], err
        assert "(exitcode: 2)" in err  # of torchrun itself it is 1, whatever it was
