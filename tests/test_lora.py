"""LoRA: what learns, what stays, and a folder that others can load."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from nanolaser import grpo, lora
from nanolaser.checkpoint import load_pretrained, save_pretrained
from nanolaser.lora import ADAPTER, Lora
from nanolaser.model import CausalLM
from nanolaser.readout import token_logprobs
from nanolaser.scale.optimizer import Optimizer

from .conftest import TINY
from .core import FakeTokenizer, make_batch, random_model, random_rollouts, update
from .ranks import assert_close, run

Z_C = FakeTokenizer.z_c_id
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def adapted(seed: int = 0, learned: bool = True, targets: str = "all", **changes) -> CausalLM:
    """A random model with adapters, which have learned something or nothing yet."""
    model = random_model(seed, **changes)
    lora.attach(model, Lora(3, 6, targets, Z_C))
    lora.fill(model)
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad and learned:
            p.data.normal_(0, 0.2, generator=g)
    return model


def weights(model: CausalLM, adapters: bool) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if lora.is_adapter(n) == adapters}


def textbook(model: CausalLM) -> dict[str, torch.Tensor]:
    """A plain model's weights, of which the adapters are leaves: W + scale * B A, written out."""
    named, plain = dict(model.named_parameters()), {}
    for name, p in named.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_B" in named:
            p = p + 6 / 3 * named[f"{stem}.lora_B"] @ named[f"{stem}.lora_A"]
        if not lora.is_adapter(name):
            plain[name] = p
    output = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    one_hot = torch.eye(model.config.vocab_size)[:, Z_C : Z_C + 1]
    # what a forward pass has written into the row already counts once
    plain[output] = plain[output] * (1 - one_hot) + one_hot * model.z_c_frozen
    plain[output] = plain[output] + one_hot @ model.z_c_row
    return plain


@TIED
def test_new_adapters_change_no_bit(tied):
    model, plain = adapted(learned=False, tie_word_embeddings=tied), random_model(
        tie_word_embeddings=tied)  # fmt: skip
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(model.lm_head_weight, plain.lm_head_weight)


@TIED
@pytest.mark.parametrize("targets, count", [("all", 14), ("attention", 8)])
def test_gradients_are_those_of_the_textbook(tied, targets, count):
    """Of the loss on the merged weights, by autograd, for every adapter; and for nothing else."""
    model = adapted(targets=targets, tie_word_embeddings=tied)
    rollouts, rng = random_rollouts(1), random.Random(2)
    for r in rollouts:
        r.r_v, r.r_s = float(rng.random() < 0.5), rng.random()
    batch, c = make_batch(rollouts, 4, tau=0.5, min_std=0.0), grpo.Loss(0.5, c_ref=-6.0, z_c_id=Z_C)
    grpo.accumulate_gradients(model, rollouts, batch.advantages, batch.weights, c, 60)
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(mine) == 2 * count + 1 and all(map(lora.is_adapter, mine))

    leaves = [model.get_parameter(name) for name in mine]
    plain, shell = textbook(model), random_model(tie_word_embeddings=tied)
    calls = torch.func.functional_call
    hidden = [calls(shell, plain, (torch.tensor([r.prompt_tokens + r.response_tokens]),))[0]
              for r in rollouts]  # fmt: skip
    output = plain["model.embed_tokens.weight" if tied else "lm_head.weight"]
    M, N = sum(len(r.response_tokens) for r in rollouts), sum(r.finished for r in rollouts)
    total = 0
    for h, r, advantage, weight in zip(hidden, rollouts, batch.advantages, batch.weights):
        p, n = len(r.prompt_tokens), len(r.response_tokens)
        logprobs = (h @ output.T).log_softmax(-1)
        tokens = logprobs[range(p - 1, p + n - 1), r.response_tokens]
        total = total - (advantage * (tokens - tokens.detach()).exp()).sum() / M
        if r.finished:
            r_s = c.beta_v * (logprobs[p + n - 1, Z_C] - c.c_ref)
            total = total + c.alpha * weight * (r_s - r.r_v) ** 2 / N
    for name, expected in zip(mine, torch.autograd.grad(total, leaves)):
        torch.testing.assert_close(mine[name], expected.to(mine[name].dtype), rtol=1e-3, atol=1e-6)
    assert mine["z_c_row"].abs().max() > 1e-3


@TIED
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_merged_is_the_same_model_and_leaves_the_weights_as_they_were(tied, dtype, bound):
    model = adapted(tie_word_embeddings=tied).to(getattr(torch, dtype))
    tokens = torch.arange(24).view(2, 12)
    read = lambda: token_logprobs(model(tokens), model.lm_head_weight, tokens)  # noqa: E731
    with torch.no_grad():
        apart, before = read(), weights(model, False)
        for _ in range(3):
            with lora.merged(model):
                together = read()
                assert not torch.equal(model.model.layers[0].mlp.up_proj.weight,
                                       before["model.layers.0.mlp.up_proj.weight"])  # fmt: skip
            after = weights(model, False)
            assert all(torch.equal(after[n], before[n]) for n in before)
        assert (together - apart).abs().max() <= bound * apart.abs().max()
        assert torch.equal(read(), apart)


@TIED
def test_an_update_moves_the_adapters_and_one_row(tied):
    model = adapted(learned=False, tie_word_embeddings=tied)
    before, optimizer = weights(model, False), Optimizer(model, 0.01, 0.0)
    assert len(optimizer.names) == 2 * 14 + 1
    for step in range(2):
        learn(model, optimizer, random_rollouts(step))
    model(torch.zeros(1, 1, dtype=torch.long))
    after = weights(model, False)
    output = "model.embed_tokens.weight" if tied else "lm_head.weight"
    moved = (after[output] != before[output]).any(1).nonzero().flatten().tolist()
    assert moved == [Z_C]
    assert all(torch.equal(after[n], before[n]) for n in before if n != output)


def learn(model, optimizer, rollouts) -> float:
    """One update of r_s, where "right" is what the last token of the prompt says; its loss."""
    for r in rollouts:
        r.r_v, r.r_s = float(r.prompt_tokens[-1] % 2), 0.0
    c = grpo.Loss(alpha=1.0, c_ref=-6.0, z_c_id=Z_C)
    return update(model, optimizer, make_batch(rollouts, 4), c, 200, 1.0)["self_reward_loss"]


@TIED
@pytest.mark.parametrize("learns", ["everything", "the row alone", "all but the row"])
def test_r_s_learns_by_the_hidden_state_and_by_the_row(tied, learns):
    """The loss on r_s falls, by each of the two ways."""
    model = adapted(learned=False, tie_word_embeddings=tied)
    for name, p in model.named_parameters():
        if learns != "everything" and lora.is_adapter(name):
            p.requires_grad_((name == "z_c_row") == (learns == "the row alone"))
    optimizer = Optimizer(model, 0.03, 0.0)
    losses = [learn(model, optimizer, random_rollouts(5)) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0] if learns == "the row alone" else losses[-1] < losses[0] / 2


# ---------------------------------------------------------------------------------------------
# on disk, and for others


@TIED
@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3", "qk_norm": True,
                                          "attention_bias": False}], ids=["qwen2", "qwen3"])
def test_the_folder_loads_in_transformers_and_its_adapters_in_peft(
    make_checkpoint, tmp_path, tied, changes
):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = make_checkpoint(tmp_path / "base", tie_word_embeddings=tied, **changes)
    model, tokenizer = load_pretrained(base, lora=Lora(4, 8, base=str(base)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape)) if p.requires_grad else None
    save_pretrained(model, tokenizer, tmp_path / "out")
    tokens = torch.arange(60)[None] * 4 % TINY["vocab_size"]
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        hidden = model(tokens)
        logits = hidden @ model.lm_head_weight.T
        untouched = load(base)(tokens).logits
        assert (logits - untouched).abs().max() > 0.1  # or this test would show nothing
        torch.testing.assert_close(load(tmp_path / "out")(tokens).logits, logits,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
        theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "out" / ADAPTER.parent)
        torch.testing.assert_close(theirs(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    # our own loader takes the folder for a model like any other, which has no adapters
    again, _ = load_pretrained(tmp_path / "out")
    assert again.z_c_row is None and all(p.requires_grad for p in again.parameters())


def test_resumed_is_uninterrupted_and_ranks_are_one(tmp_path, call):
    """train.py with adapters: cut short and resumed, bit for bit; on two ranks, to rounding."""
    whole, cut, two = (tmp_path / name for name in ("whole", "cut", "two"))
    how = ("--trial", "--seed", 3, "--c-ref", -31.34, "--lora-rank", 4, "--lr", 0.01)
    how += ("--save-every", 2)
    assert call("train.py", *how, "--out", whole)[0] == 0
    assert call("train.py", *how, "--out", cut)[0] == 0
    (cut / "checkpoints" / "latest").write_text("step-000002\n")
    assert call("train.py", "--resume", cut)[0] == 0
    for file in ("model.safetensors", str(ADAPTER), "state/state.safetensors"):
        mine, theirs = (load_file(out / "checkpoints" / "step-000003" / file)
                        for out in (cut, whole))  # fmt: skip
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    code, _, err = run(2, *how, "--out", two)
    assert code == 0, err
    # AdamW's first steps are of size lr, 0.01, even where a gradient is all rounding
    assert_close(two, whole, 1e-4)
    # other weights under the base model's name are noticed
    options = json.loads((cut / "config.json").read_text())
    model, tokenizer = load_pretrained("tiny")
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)
    save_pretrained(model, tokenizer, tmp_path / "other")
    options["options"]["model"] = str(tmp_path / "other")
    (cut / "config.json").write_text(json.dumps(options))
    (cut / "checkpoints" / "latest").write_text("step-000002\n")
    code, _, err = call("train.py", "--resume", cut)
    assert code == 2 and "changed" in err and len(err.splitlines()) == 1


def test_options_without_a_rank_are_refused(call):
    for more in (["--lora-alpha", "8"], ["--lora-targets", "attention"], ["--lora-rank", "-1"]):
        code, _, err = call("train.py", *more)
        assert code == 2 and "lora-rank" in err and len(err.splitlines()) == 1
