"""Two ranks (gloo, CPU) against one process: the same rollouts, losses, weights and checkpoints.

What four ranks do, and what signals and kills at other moments, takes minutes: see
slow/test_many_ranks.py.
"""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from nanolaser.scale.distributed import ALONE, World, gathered, local

from . import kills, ranks

pytestmark = pytest.mark.skipif(os.name != "posix", reason="gloo and signals as POSIX has them")

# All three phases, three problems for two ranks, an evaluation in between and c_ref estimated.
# (A weight whose gradient is all but zero moves by lr times the rounding of its sign.)
OPTIONS = """--steps 4 --problems-per-step 3 --group-size 4 --eval-problems 3 --eval-n 2
--eval-every 2 --save-every 2 --reasoning-warmup 1 --self-reward-warmup 1 --max-new-tokens 48
--lr 1e-4""".split()


# ---------------------------------------------------------------------------------------------
# without processes


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_what_is_dealt_is_everything_once_and_rounds_are_equal(size, count):
    worlds, items = [World(rank, size) for rank in range(size)], list(range(count))
    assert sorted(x for w in worlds for x in w.shard(items)) == items
    rounds = [list(w.rounds(items)) for w in worlds]
    assert len({len(r) for r in rounds}) == 1  # or somebody would wait for ever
    assert sorted(x for r in rounds for x, counts in r if counts) == items
    assert [[x for x, counts in r if counts] for r in rounds] == [w.shard(items) for w in worlds]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_are_cut_as_torch_cuts_them(size):
    for tensor in (torch.arange(8.0), torch.randn(3, 2), torch.randn(7, 4)):
        parts = [World(rank, size).local_rows(tensor) for rank in range(size)]
        assert torch.equal(torch.cat(parts), tensor)
        for part, chunk in zip(parts, tensor.chunk(size)):  # chunk leaves out empty ones
            assert torch.equal(part, chunk)
    assert World(size - 1, size).local_rows(torch.tensor(3.0)) == 3


def test_alone_nothing_is_copied_or_changed(tiny):
    items, tensor = [{"b": 2}, {"b": 1}], torch.randn(3)
    assert ALONE.gather(items, by="b") is items and ALONE.broadcast(items) is items
    assert ALONE.all_gather(tensor) is tensor is ALONE.local_rows(tensor) is local(tensor)
    assert ALONE.reduce_gradient(tensor) is tensor and gathered(tiny[0], ALONE) is tiny[0]
    assert ALONE.device("auto") == "auto" and ALONE.may_speak()


# ---------------------------------------------------------------------------------------------
# with processes


def test_two_ranks_update_as_one_does(make_checkpoint, tmp_path):
    # tied and untied; 31 rows can only be shared out unevenly
    folders = [
        make_checkpoint(tmp_path / f"tied-{tied}", tie_word_embeddings=tied, hidden_size=31)
        for tied in (True, False)
    ]
    code, out, err = ranks.run(2, *folders, script="tests/ranks.py")
    assert code == 0, err
    assert json.loads(out)["ranks"] == 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run by one process and by two: their folders."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = folder / "one", folder / "two"
    code, _, err = kills.train(*OPTIONS, "--out", one)
    assert code == 0, err
    code, out, err = ranks.run(2, *OPTIONS, "--out", two)
    assert code == 0, err
    assert "over 2 ranks" in out and out.count("everything is in") == 1 and ranks.ours(err) == []
    return one, two


def test_two_ranks_train_as_one_does(runs):
    one, two = runs
    ranks.assert_close(one, two)
    # and something was learned: the first checkpoint is not the last
    a, b = (load_file(two / f"checkpoints/step-00000{n}/model.safetensors") for n in (2, 4))
    assert any((a[name] - b[name]).abs().max() > 1e-5 for name in a)


def test_one_process_goes_on_where_two_were(runs):
    one, two = runs
    (two / "checkpoints" / "latest").write_text("step-000002\n")
    code, out, err = kills.train("--resume", two)
    assert code == 0, err
    assert "resuming after step 2" in out
    ranks.assert_close(one, two)


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="Linux")
def test_a_killed_rank_ends_the_run_with_one_line(tmp_path):
    """In the midst of a step, which the other rank then cannot finish."""
    out, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    process = ranks.start(2, *OPTIONS, "--steps", "500", "--out", out)
    assert kills.until(process, lambda: log.exists() and len(log.read_text().splitlines()) > 2)
    os.kill(ranks.processes(out, 2)[1], signal.SIGKILL)
    said, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "everything is in" not in said
    assert len(ranks.ours(err)) == 1 and "--resume" in ranks.ours(err)[0], err
    assert not kills.half_written(out)
    assert (out / "checkpoints/latest").read_text().startswith("step-")


def test_a_wrong_option_is_said_once(tmp_path):
    code, out, err = ranks.run(2, "--stepz", "3", cwd=tmp_path)
    assert code != 0 and out == "" and len(ranks.ours(err)) == 1, err
    assert "unknown option --stepz" in err and not list(tmp_path.iterdir())
