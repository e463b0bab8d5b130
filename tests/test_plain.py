"""The fast code against tests/plain.py, the whole method in textbook operations: the same tokens,
readout, advantages, class weights, loss, gradient and weights after one update."""

import copy

import pytest
import torch
from torch.testing import assert_close

from nanolaser import grpo, load_pretrained
from nanolaser.problems import made_up_problems
from nanolaser.sampler import generate
from tests import plain
from tests.core import FakeTokenizer, make_batch, random_model, update

G = 4


class Case:
    """A model, its prompts and what is to be sampled, with one solution of each kind at least."""

    def __init__(self, model, tokenizer, prompts, texts, **settings):
        self.model, self.tokenizer, self.prompts, self.texts = model, tokenizer, prompts, texts
        usual = dict(group_size=G, c_ref=-30.0, tau=0.3, min_std=1e-4, alpha=0.5)
        self.o = plain.Settings(**{**usual, **settings})

    def weights(self):
        """The parameters by Hugging Face's names, as plain.py wants them."""
        return dict(self.model.named_parameters())

    def check(self, i, y):
        """A verdict that both sides can give without knowing any arithmetic."""
        return float(sum(y) % 5 < 2)

    def sample(self):
        """The fast sampler's rollouts."""
        return generate(
            self.model, self.tokenizer, self.texts, n=G, max_new_tokens=self.o.max_new_tokens,
            temperature=self.o.temperature, seed=7, max_rows=5,
        )  # fmt: skip

    def batch(self, rollouts):
        """The fast step's batch."""
        o = self.o
        for r in rollouts:
            r.r_s = o.beta_v * (r.logp_zc - o.c_ref) if r.finished else None
            r.r_v = self.check(r.prompt_id, r.response_tokens)
        return make_batch(rollouts, G, o.tau, o.min_std)

    def loss(self):
        """The fast loss's numbers."""
        o = self.o
        return grpo.Loss(o.alpha, o.beta_v, o.c_ref, self.tokenizer.z_c_id,
                         temperature=o.temperature)

    def solutions(self, batch):
        """The fast rollouts and what the batch makes of them, as plain.py's nouns."""
        columns = zip(batch.rollouts, batch.advantages, batch.weights)
        return [
            plain.Solution(
                r.prompt_tokens, r.response_tokens, r.logprobs, r.finished, r.logp_zc,
                r_v=r.r_v, advantage=a.item(), weight=weight.item(),
            )
            for r, a, weight in columns
        ]  # fmt: skip


def embedded():
    """The shipped model on its own problems (LLaMA, tied, grouped queries), at a temperature that
    makes them differ."""
    model, tokenizer = load_pretrained("tiny", device="cpu", dtype="float32")
    texts = [p.problem for p in made_up_problems(3, seed=0)]
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    return Case(model, tokenizer, prompts, texts, max_new_tokens=48, temperature=1.5)


def random_qwen():
    """A wild model (Qwen2 with biases, untied, of other widths); short prompts, temperature 0.8."""
    model, tokenizer = random_model(tie_word_embeddings=False, head_dim=12), FakeTokenizer()
    texts = ["abc", "0123456789", "k"]
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    return Case(model, tokenizer, prompts, texts, max_new_tokens=12, temperature=0.8, c_ref=-15.0)


@pytest.fixture(params=[embedded, random_qwen], ids=lambda case: case.__name__)
def case(request):
    return request.param()


def close(mine, theirs, share):
    """Equal up to a share of the largest entry."""
    mine, theirs = mine.double(), theirs.double()
    assert_close(mine, theirs, atol=share * theirs.abs().max().item(), rtol=0)


def test_the_sampler_draws_the_textbooks_tokens(case):
    rollouts, o = case.sample(), case.o
    assert {r.finished for r in rollouts} == {True, False}
    for i, r in enumerate(rollouts):
        s = plain.sample(case.weights(), case.model.config, case.tokenizer, case.prompts[i // G],
                         i, 7, o.max_new_tokens, o.temperature)
        assert r.response_tokens == s.y and r.finished == s.finished
        assert r.logprobs == pytest.approx(s.logprobs, abs=1e-4)
        assert (r.logp_zc is None) == (s.logp_zc is None)
        assert r.logp_zc is None or r.logp_zc == pytest.approx(s.logp_zc, abs=1e-4)


def test_advantages_and_weights_are_the_textbooks(case):
    batch = case.batch(case.sample())
    solutions = case.solutions(batch)
    for s in solutions:
        s.advantage = s.weight = 0.0  # what is to be found again
        s.r_s = case.o.beta_v * (s.logp_zc - case.o.c_ref) if s.finished else 0.0
    for first in range(0, len(solutions), G):
        plain.advantages(solutions[first : first + G], case.o.tau, case.o.min_std)
    plain.class_weights(solutions)
    assert any(s.advantage for s in solutions) and len({s.weight for s in solutions}) == 3
    assert batch.advantages.tolist() == pytest.approx([s.advantage for s in solutions], abs=1e-3)
    assert batch.weights.tolist() == pytest.approx([s.weight for s in solutions], rel=1e-6)


@pytest.mark.parametrize("moved", [False, True])
def test_loss_and_gradient_are_the_textbooks(case, moved):
    """On the model that sampled, where every ratio is 1, and on one that has moved away since,
    where the clips act."""
    batch = case.batch(case.sample())
    solutions, old = case.solutions(batch), None
    if moved:
        old = {i: torch.tensor(r.logprobs) for i, r in enumerate(batch.rollouts)}
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in case.model.parameters():
                p += 0.4 * p.abs().mean() * torch.randn(p.shape, generator=g)
    sums = grpo.accumulate_gradients(
        case.model, batch.rollouts, batch.advantages, batch.weights, case.loss(), 100, old)
    assert (sums["clip_fraction"] > 0.05) == moved
    mine = [p.grad.clone() for p in case.model.parameters()]
    case.model.zero_grad()
    policy, error = plain.loss(
        case.weights(), case.model.config, solutions, case.tokenizer.z_c_id, case.o
    )
    (policy + case.o.alpha * error).backward()
    assert sums["policy_loss"] == pytest.approx(policy.item(), rel=1e-4, abs=1e-6)
    assert sums["self_reward_loss"] == pytest.approx(error.item(), rel=1e-4)
    for gradient, p in zip(mine, case.model.parameters()):
        close(gradient, p.grad, 3e-4)


def test_one_update_is_the_textbooks(case):
    """From problems to changed weights, both ways."""
    o, twin = case.o, copy.deepcopy(case.model)
    optimizer = grpo.Optimizer(case.model, o.lr, o.weight_decay)
    batch = case.batch(case.sample())
    sums = update(
        case.model, optimizer, batch, case.loss(), micro_batch_tokens=100, grad_clip=o.grad_clip
    )
    assert not sums["skipped_updates"] and sums["grad_norm"] > 0
    before = [p.detach().clone() for p in twin.parameters()]
    solutions, policy, error = plain.train_step(
        dict(twin.named_parameters()), twin.config, case.tokenizer, case.prompts, case.check, o,
        seed=7, state={},
    )  # fmt: skip
    assert [s.y for s in solutions] == [r.response_tokens for r in batch.rollouts]
    assert sums["policy_loss"] == pytest.approx(policy, rel=1e-3, abs=1e-5)
    assert sums["self_reward_loss"] == pytest.approx(error, rel=1e-4)
    moves = [(p.detach() - b for p, b in zip(model.parameters(), before))
             for model in (case.model, twin)]  # fmt: skip
    mine, theirs = (torch.cat([move.flatten() for move in each]) for each in moves)
    # Adam's first step is lr * the gradient's sign: where a gradient is all but zero, rounding
    # decides about it, so a few weights may differ by as much as a whole step.
    assert ((mine - theirs).abs() > 0.02 * o.lr).float().mean() < 0.01
    assert (theirs.abs() > 0.5 * o.lr).float().mean() > 0.9


def test_the_reference_runs_by_itself(capsys):
    """As its docstring says."""
    plain.main()
    out = capsys.readouterr().out
    assert "c_ref" in out and out.count("\\boxed") >= 4 and "self-reward loss" in out
