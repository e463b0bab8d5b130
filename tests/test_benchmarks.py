"""The benchmarks at their smallest: that they run, count what they say, and end in a JSON line.

What they measure is not looked at: seconds are no test.
"""

import json

import pytest
import torch

import train
from benchmarks import generate, grpo_step, readout
from nanolaser import load_pretrained, sampler
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The benchmarks run on one thread and let train.py count CPU time: not so the other tests."""
    monkeypatch.setattr(train, "time", train.time)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def last_line(out):
    return json.loads(out.splitlines()[-1])


def test_generate(call):
    sizes = ["--problems", 2, "--group-size", 2, "--rows", 3, "--runs", 1]
    code, out, err = call("benchmarks/generate.py", "--cases", "embedded", *sizes)
    assert code == 0, err
    found = last_line(out)["embedded"]
    assert found["solutions"] == 4 and found["speedup"] > 0
    # every solution has a token and none more than the limit, on either side
    assert all(4 <= found[side]["tokens"] <= 4 * 96 for side in ("transformers", "nanolaser"))


@pytest.mark.parametrize("count", [32, 64, 128])
def test_skewed_lengths_have_their_mean_and_their_longest(count):
    lengths = generate.skewed_lengths(count, 64, 256)
    assert len(lengths) == count and max(lengths) == 256 and min(lengths) >= 1
    assert abs(sum(lengths) / count - 64) < 0.5
    assert sorted(lengths)[count // 2] < 64 * 0.8  # most are shorter than the mean


def test_both_sides_end_where_they_are_told():
    o = generate.Options(problems=2, group_size=3, rows=4)
    work = generate.embedded(o)
    work.lengths, plain = [9, 1, 5, 2, 12, 3], (sampler.uniforms, sampler.sample_next)
    assert generate.ours(work, o, 0) == generate.Peer(work)(work, o, 0) == work.lengths
    assert (sampler.uniforms, sampler.sample_next) == plain  # nothing stays behind


def test_scaling(call):
    small = ["--axes", "group", "--runs", 1, "--most-rows", 64]
    code, out, err = call("benchmarks/scaling.py", *small)
    assert code == 0, err
    found = last_line(out)
    assert [row["rows"] for row in found["table"]] == [64, 32]
    assert found["spread"] >= 0


def test_readout_ways_have_the_same_gradients(capsys):
    # it asserts so itself; large enough that the table of logits shows in the process's memory
    o = readout.Options(tokens=512, hidden=16, vocabulary=8192, runs=1)
    found = readout.logprobs(o)
    assert set(found) == set(readout.WAYS) and found["plain torch"]["memory_ratio"] == 1
    assert "MISSED" in capsys.readouterr().out or found["loss_backward"]["memory_ratio"] <= 0.1


def test_grpo_step_without_its_peer(capsys):
    o = grpo_step.Options(case="embedded", steps=1, group_size=2)
    found = grpo_step.run("embedded", str(ROOT / "nanolaser" / "tiny"), o, peer=False)
    assert found["GRPO"]["tokens"] == found["LaSeR"]["tokens"] > 0  # the same first step
    assert "laser_share" in found and "speedup" not in found


def test_arithmetic_is_counted_as_matrices_are_used():
    """By hand for one prompt of 3 tokens and two solutions of 2 and 4."""
    model, tokenizer = load_pretrained("tiny", device="cpu", dtype="float32")
    work = generate.Work(model, tokenizer, [[5, 6, 7]], 96, None)
    layers = 6 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 384)
    fed, read = 3 + 2 + 4, (2 + 1) + (4 + 1)
    pairs = 9 // 2 + (2 * 3 + 2) + (4 * 3 + 8)
    expected = 2 * (layers * fed + 108 * 128 * read) + 4 * 6 * 128 * pairs
    assert generate.arithmetic(work, generate.Options(group_size=2), [2, 4]) == expected
