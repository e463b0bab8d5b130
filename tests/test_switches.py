"""The switches that trainers share, and the paper's ablations: each beside textbook operations, on
what a run of train.py really hands to its update."""

import json
import math
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch

from nanolaser import grpo, laser
from nanolaser.problems import Problem, ProblemStream
from nanolaser.scoring import score
from tests import plain
from tests.core import FakeTokenizer, random_model, random_rollouts, slow_readout

# Of all phases, with solutions that are cut off among others.
SHORT = """--steps 4 --problems-per-step 4 --group-size 4 --eval-problems 2 --eval-n 2
--eval-every 9 --save-every 2 --reasoning-warmup 1 --self-reward-warmup 1 --max-new-tokens 40
--c-ref-pairs 8""".split()
ALL = """--refill 2 --aggregate sequence --truncated mask --no-advantage-std --no-class-weights
--c-ref exact --clip-low 0.1 --clip-high 0.3 --tau 0.5 --min-std 0""".split()
OTHERS = "--aggregate constant --truncated zero --refill 1 --alpha 1".split()
DEFAULTS = dict(refill=0, aggregate="token", truncated="keep", clip_low=0.2, clip_high=0.2, tau=0.1,
                min_std=0.1)  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(row):
    return {k: v for k, v in row.items() if "second" not in k}


@pytest.fixture
def spied(call, tmp_path, monkeypatch):
    """spied(options) -> (the run's folder, what each step has handed to the update)."""
    real = grpo.update

    def run(*options):
        batches = []

        def update(model, optimizer, rollouts, advantages, weights, loss, *rest):
            batches.append(SimpleNamespace(rollouts=rollouts, advantages=advantages.flatten(),
                                           weights=weights.flatten(), loss=loss))  # fmt: skip
            return real(model, optimizer, rollouts, advantages, weights, loss, *rest)

        monkeypatch.setattr(grpo, "update", update)
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        code, _, err = call("train.py", *SHORT, "--out", out, *options)
        assert code == 0, err
        return out, batches

    return run


def textbook(batch, o, integrated):
    """(share of each token of each solution in the policy loss, advantage included; weight of each
    in the loss on r_s), solution by solution."""
    groups = [batch.rollouts[i : i + 4] for i in range(0, len(batch.rollouts), 4)]
    tau, shares, counted = o["tau"] if integrated else 0.0, [], []
    for group in groups:
        r_v = [r.r_v for r in group]
        r_s = [min(max(r.r_s, 0.0), 1.0) if r.finished else 0.0 for r in group]
        mixed = tau if statistics.stdev(r_s) > o["min_std"] else 0.0
        if o["advantage_std"]:
            a_v, a_s = plain.normalised(r_v), plain.normalised(r_s)
        else:
            a_v, a_s = ([x - statistics.mean(r) for x in r] for r in (r_v, r_s))
        for r, v, s in zip(group, a_v, a_s):
            shares.append((1 - mixed) * v + mixed * s)
            out = o["refill"] and len(set(r_v)) == 1 or o["truncated"] == "mask" and not r.finished
            counted.append(not out)
    lengths = [len(r.response_tokens) for r in batch.rollouts]
    n, tokens = sum(counted), sum(x for x, c in zip(lengths, counted) if c)
    for i, length in enumerate(lengths):
        mean = {"token": 1 / tokens, "sequence": 1 / (n * length), "constant": 1 / (n * 40)}
        shares[i] *= mean[o["aggregate"]] * counted[i]
    ended = [r.r_v > 0.5 for r in batch.rollouts if r.finished]
    weights = []
    for r in batch.rollouts:
        alike = ended.count(r.r_v > 0.5)
        balanced = len(ended) / (2 * alike) if o["class_weights"] and r.finished else 1.0
        weights.append(balanced * r.finished)
    return shares, weights


@pytest.mark.parametrize("options, expected", [
    (ALL, dict(refill=2, aggregate="sequence", truncated="mask", clip_low=0.1, clip_high=0.3,
               tau=0.5, min_std=0, advantage_std=False, class_weights=False)),
    (OTHERS, dict(refill=1, aggregate="constant", truncated="zero", advantage_std=True,
                  class_weights=True)),
    ([], dict(advantage_std=True, class_weights=True)),
], ids=["all", "others", "the paper"])  # fmt: skip
def test_what_the_update_gets_is_the_textbooks(spied, options, expected):
    out, batches = spied(*options)
    o = DEFAULTS | expected
    finished = [r.finished for b in batches for r in b.rollouts]
    assert len(batches) == 4 and True in finished and False in finished
    for step, batch in enumerate(batches, 1):
        shares, weights = textbook(batch, o, integrated=step >= 3)
        M = sum(len(r.response_tokens) for r in batch.rollouts)  # which the update divides by
        assert (batch.advantages / M).tolist() == pytest.approx(shares, abs=1e-7)
        assert batch.weights.tolist() == pytest.approx(weights, rel=1e-6)
        assert (batch.loss.clip_low, batch.loss.clip_high) == (o["clip_low"], o["clip_high"])
        if o["truncated"] == "zero":
            assert not any(r.r_v for r in batch.rollouts if not r.finished)
    metrics = rows(out / "metrics.jsonl")
    assert [len(b.rollouts) for b in batches] == [
        4 * (4 + m.get("refilled_groups", 0)) for m in metrics]
    assert ("refilled_groups" in metrics[0]) == bool(o["refill"])
    summary = json.loads((out / "summary.json").read_text())
    drawn = sum(len(r.response_tokens) for b in batches for r in b.rollouts)
    assert summary["tokens"] == pytest.approx(drawn, abs=4)


def test_refilled_groups_are_fresh_and_no_more_than_are_missing(spied):
    _, plain_batches = spied()
    out, batches = spied("--refill", 3)
    groups = lambda b: [b.rollouts[i : i + 4] for i in range(0, len(b.rollouts), 4)]  # noqa: E731
    # step 1 is made by the same model: what was sampled without --refill comes first, unchanged
    first = [r.response_tokens for r in batches[0].rollouts[:16]]
    assert first == [r.response_tokens for r in plain_batches[0].rollouts]
    more = 0
    for batch in batches:
        texts = [group[0].problem for group in groups(batch)]
        assert len(set(texts)) == len(texts)
        compared = [len({r.r_v for r in group}) > 1 for group in groups(batch)]
        assert sum(compared) <= 4 and (sum(compared) == 4 or len(compared) > 4)
        # a group that has nothing to compare teaches the policy nothing, and r_s all the same
        for group, differs, at in zip(groups(batch), compared, range(0, 999, 4)):
            assert differs or not batch.advantages[at : at + 4].any()
            ended = torch.tensor([r.finished for r in group])
            assert ((batch.weights[at : at + 4] > 0) == ended).all()
        more += len(compared) - 4
    assert more == sum(m["refilled_groups"] for m in rows(out / "metrics.jsonl")) > 0


def test_fresh_problems_leave_those_of_the_steps_alone():
    problems = [Problem(str(i), f"p{i}", "1") for i in range(40)]
    for made_up in (None, "arithmetic"):
        stream = ProblemStream([] if made_up else problems, 4, 0, made_up)
        for step in (1, 2, 30):
            eight = stream.at(step, 4)
            assert len(eight) == 8 and eight[:4] == stream.at(step)
            assert eight[:6] == stream.at(step, 2)  # whatever the number of draws
        assert stream.at(1, 4)[4:] != stream.at(2, 4)[4:]


def test_the_exact_reference_is_the_starting_models(spied):
    from nanolaser.checkpoint import load_pretrained

    out, batches = spied("--c-ref", "exact", "--lr", "1e-2")
    model, tokenizer = load_pretrained("tiny", device="cpu", dtype="float32")
    last = batches[-1]  # by now the model is another
    ended = [r for r in last.rollouts if r.finished]
    expected = score(model, tokenizer.z_c_id, [r.prompt_tokens for r in ended],
                     [r.response_tokens for r in ended])  # fmt: skip
    assert [r.logp_ref for r in ended] == pytest.approx(expected, abs=1e-4)
    moved = statistics.mean(abs(r.logp_zc - r.logp_ref) for r in ended)
    assert moved > 0.5 and len({r.logp_ref for r in ended}) > 1
    for r, c_ref in zip(last.rollouts, last.loss.c_ref.tolist()):
        # in what is logged, in the advantage and in the loss
        assert c_ref == r.logp_ref if r.finished else math.isnan(c_ref)
        assert not r.finished or r.r_s == pytest.approx(0.1 * (r.logp_zc - r.logp_ref), abs=1e-6)
    m = rows(out / "metrics.jsonl")[-1]
    assert m["c_ref"] == pytest.approx(statistics.mean(expected), abs=1e-4)
    assert m["c_ref_std"] == pytest.approx(statistics.pstdev(expected), abs=1e-3)
    # whoever uses the checkpoint has no reference: it holds a constant, as ever
    saved = json.loads((out / "checkpoints" / "step-000004" / "laser.json").read_text())
    assert saved["c_ref"] == pytest.approx(m["c_ref"], abs=1)


def test_a_run_with_another_reference_is_not_resumed(call, tmp_path, make_checkpoint):
    model = make_checkpoint(tmp_path / "model")
    out = tmp_path / "run"
    options = ["--model", model, "--data", "arithmetic", *SHORT, "--c-ref", "exact", "--trial"]
    assert call("train.py", *options, "--out", out)[0] == 0
    make_checkpoint(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / "model.safetensors", model / "model.safetensors")
    code, _, err = call("train.py", "--resume", out)
    assert code == 2 and "changed" in err and len(err.strip().splitlines()) == 1


def test_each_solution_has_its_own_reference_in_the_gradient():
    model, rollouts = random_model(), random_rollouts()
    for i, r in enumerate(rollouts):
        r.r_v, r.logp_ref = float(i % 3 == 0), -10.0 - i if r.finished else None
    c_ref = grpo.stack(rollouts, "logp_ref", 4).flatten()
    weights = torch.tensor([float(r.finished) for r in rollouts])
    loss = grpo.Loss(alpha=1.0, c_ref=c_ref, z_c_id=FakeTokenizer.z_c_id)
    stats = grpo.accumulate_gradients(model, rollouts, torch.zeros(12), weights, loss, 60)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    error, ended = 0.0, [r for r in rollouts if r.finished]
    for r in ended:
        r_s = 0.1 * (slow_readout(model, r)[1] - r.logp_ref)
        error = error + (r_s - r.r_v) ** 2 / len(ended)
    error.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, expected, atol=5e-6 * expected.abs().max().item(), rtol=0)
    assert stats["self_reward_loss"] == pytest.approx(error.item(), rel=1e-5)


def test_where_nothing_counts_nothing_is_learned():
    lengths, none = torch.tensor([[3, 5]]), torch.zeros(1, 2, dtype=torch.bool)
    for aggregate in ("token", "sequence", "constant"):
        assert not laser.token_weights(lengths, none, aggregate, 10).any()
        # lengths 3 and 5 alone: whatever the kind, it is a mean over what counts
        weights = laser.token_weights(lengths, torch.tensor([[True, False]]), aggregate, 3)
        assert weights.tolist() == [[pytest.approx(8 / 3), 0.0]]


def test_with_every_switch_a_resumed_run_is_the_same_run(call, spied):
    whole, _ = spied(*ALL)
    part, _ = spied(*ALL)
    (part / "checkpoints" / "latest").write_text("step-000002\n")
    code, _, err = call("train.py", "--resume", part)
    assert code == 0, err
    for name in ("metrics.jsonl", "samples.jsonl", "evals.jsonl"):
        ours, theirs = (list(map(without_time, rows(f / name))) for f in (part, whole))
        assert ours == theirs


def test_a_trial_takes_every_switch(call, tmp_path):
    code, out, err = call("train.py", "--trial", *ALL, "--out", tmp_path / "t")
    assert code == 0 and "refill" not in err, err
    assert len(rows(tmp_path / "t" / "metrics.jsonl")) == 3


@pytest.mark.parametrize("options, said", [
    (["--aggregate", "tokens"], "token"), (["--truncated", "drop"], "mask"),
    (["--refill", "-1"], "refill"), (["--clip-low", "2"], "clip-low"),
    (["--c-ref", "exactly"], "exact"), (["--c-ref", "exact", "--self-reward-loss", "bce"], "bce"),
])  # fmt: skip
def test_bad_switches_are_one_line(call, tmp_path, options, said):
    code, _, err = call("train.py", *SHORT, "--out", tmp_path / "run", *options)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
