"""
What the tests of the core share: a tokenizer in 30 lines, a random decoder with grouped-query
attention and one row of everything as tests/plain.py computes it.  No file, no download.
"""

import random

from types import SimpleNamespace

import torch

from nanolaser import grpo, laser
from nanolaser.model import CausalLM, ModelConfig
from nanolaser.packing import Packing
from nanolaser.readout import token_logprobs
from nanolaser.rollout import Rollout
from tests import plain

SIZE, VOCAB = 37, 40  # the output matrix has three rows more than the tokenizer has tokens
C_REF, BETA_V = -15.0, 0.1


class FakeTokenizer:
    """Letters and digits are tokens 4 up; 0 pads and ends, 1 and 2 end, 3 and 36 are unused."""

    LETTERS = "abcdefghijklmnopqrstu0123456789{}"
    stop_ids = (1, 2)
    size = SIZE
    z_c, z_c_id = "<|z|>", 3
    c_ref, beta_v, self_reward_loss = C_REF, BETA_V, "mse"

    def encode_prompt(self, problem):
        return [4 + self.LETTERS.index(c) for c in problem]

    def decode(self, ids, skip_special=True):
        # "{" stands for "\boxed{", one token as in the embedded model's vocabulary
        text = "".join(self.LETTERS[i - 4] for i in ids if 4 <= i < 4 + len(self.LETTERS))
        return text.replace("{", "\\boxed{")

    def unused_special_ids(self):
        return [0, 36]

    def tokens(self, ids):
        return [f"<{i}>" for i in ids]


def config(**changes):
    """Two layers, 4 query heads on 2 key-value heads."""
    shape = dict(
        model_type="qwen2", vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        attention_bias=True, tie_word_embeddings=True)
    return ModelConfig(**{**shape, **changes})


def random_model(seed=0, std=0.25, **changes):
    """Weights large enough that every distribution is far from flat and no two rows agree."""
    g = torch.Generator().manual_seed(seed)
    model = CausalLM(config(**changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, std, generator=g)
    return model


def random_rollouts(seed=0, count=12, truncated=(2, 7), equal_length=False):
    """Ragged rows of random tokens, four to a prompt, all but `truncated` ended by a stop token."""
    rng, rollouts = random.Random(seed), []
    for i in range(count):
        p, n = (4, 5) if equal_length else (rng.randint(1, 9), rng.randint(1, 12))
        own, response = ([rng.randrange(4, 36) for _ in range(k)] for k in (p, n))
        prompt = rollouts[-1].prompt_tokens if i % 4 else own
        finished = i not in truncated
        if finished:
            response[-1] = rng.choice(FakeTokenizer.stop_ids)
        rollouts.append(Rollout(
            i // 4, prompt, response, [0.0] * n, finished=finished,
            logp_zc=-12.0 if finished else None))
    return rollouts


def all_logprobs(model, tokens, temperature=1.0):
    """(T, V) log-probs after each token of ONE row, by the textbook's forward, in float64."""
    logits = plain.forward(dict(model.named_parameters()), model.config, tokens)
    return torch.log_softmax(logits / temperature, -1)


def slow_readout(model, rollout, z_c_id=FakeTokenizer.z_c_id, temperature=1.0):
    """One rollout's (token log-probs (n,), log pi(z_c) or None), nothing batched or chunked."""
    solution = plain.Solution(rollout.prompt_tokens, rollout.response_tokens)
    weights = dict(model.named_parameters())
    logprobs, logp_zc = plain.read(weights, model.config, solution, z_c_id, temperature)
    return logprobs, logp_zc if rollout.finished else None


def make_batch(rollouts, group_size, tau=0.0, min_std=0.1):
    """What train_step hands to the update, from rollouts whose r_v and r_s are set."""
    r_v, r_s, finished = (
        grpo.stack(rollouts, name, group_size) for name in ("r_v", "r_s", "finished"))
    advantages = laser.mixed_advantages(r_v.float(), r_s.float(), finished, tau, min_std)
    weights = laser.class_weights(r_v.float(), finished)
    return SimpleNamespace(
        rollouts=rollouts, advantages=advantages.flatten(), weights=weights.flatten())


def update(model, optimizer, batch, *rest, **options):
    return grpo.update(
        model, optimizer, batch.rollouts, batch.advantages, batch.weights, *rest, **options)


def read(model, rollouts, z_c_id=FakeTokenizer.z_c_id, temperature=1.0):
    """What the update reads: log-probs of all response tokens (m,), log pi(z_c) of ends (e,)."""
    packing = Packing(rollouts, model.device, model.dtype)
    hidden = model(packing.tokens, packing)[0]
    c = grpo.Loss(z_c_id=z_c_id, temperature=temperature)
    for r in rollouts:
        r.r_v = r.r_v or 0.0
    rows = [(r, 1.0, float(r.finished), 0.0, None) for r in rollouts]
    t = grpo.targets(rows, packing.texts, c, model.device)
    logprobs = token_logprobs(hidden[t.place], model.lm_head_weight, t.token, t.temperature)
    return logprobs[t.weight == 0], logprobs[t.weight > 0]
