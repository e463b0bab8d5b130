"""Real pretrained weights, against transformers: what random ones of any shape cannot show.

    NANOLASER_REAL_MODEL=a/checkpoint python -m pytest -m slow tests/slow/test_real_weights.py

Made for SmolLM2-135M-Instruct (two minutes on one core); any Qwen2.5 or LLaMA that fits will do.
"""

import json
import os

import pytest
import torch

from nanolaser.checkpoint import load_pretrained, save_pretrained
from nanolaser.problems import load_problems
from nanolaser.scoring import score
from nanolaser.sampler import generate

from ..conftest import run_readme_snippet

FOLDER = os.environ.get("NANOLASER_REAL_MODEL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="NANOLASER_REAL_MODEL names no checkpoint"),
]


@pytest.fixture(scope="module")
def ours():
    return load_pretrained(FOLDER)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def greedy(ours, shared):
    """Twenty problems, sampled together: rollouts of 64 tokens."""
    problems = load_problems(str(shared / "gsm8k" / "test.jsonl"), max_problems=20)
    texts = [p.problem for p in problems]
    return texts, generate(*ours, texts, max_new_tokens=64, temperature=0.0)


def test_greedy_ids_are_those_of_transformers(ours, theirs, greedy):
    """Prompts and answers, id by id; ours in one batch of unequal prompts, theirs one by one."""
    tokenizer, (model, their_tokenizer) = ours[1], theirs
    for text, rollout in zip(*greedy):
        chat = [{"role": "user", "content": f"{text} {tokenizer.instruction}"}]
        prompt = their_tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        assert rollout.prompt_tokens == list(prompt)
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False,
            eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.stop_ids[0],
        )  # fmt: skip
        assert rollout.response_tokens == out[0, len(prompt) :].tolist()


def test_logits_and_log_probs_of_real_text(ours, theirs, greedy):
    model = ours[0]
    for rollout in greedy[1][:5]:
        prompt, response = rollout.prompt_tokens, rollout.response_tokens
        tokens = torch.tensor([prompt + response])
        with torch.no_grad():
            expected = theirs[0](tokens).logits
            logits = model(tokens) @ model.lm_head_weight.T
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        at = expected.log_softmax(-1)[0, len(prompt) - 1 : -1]  # what predicts each answer token
        logprobs = at.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert (logprobs - torch.tensor(rollout.logprobs)).abs().max() < 1e-3


def test_r_s_in_plain_transformers(ours, greedy, tmp_path):
    """A saved checkpoint read as the docs do it gives r_s as `score` does."""
    pytest.importorskip("transformers")
    model, tokenizer = ours
    tokenizer.c_ref = -20.0
    save_pretrained(model, tokenizer, tmp_path / "out")
    text, rollout = greedy[0][0], greedy[1][0]
    solution = tokenizer.decode(rollout.response_tokens)
    names = run_readme_snippet(tmp_path / "out", **{"problem, solution": (text, solution)})
    response = names["ids"][len(rollout.prompt_tokens) :]
    (logp_zc,) = score(model, tokenizer.z_c_id, [rollout.prompt_tokens], [response])
    assert float(names["logp_zc"]) == pytest.approx(logp_zc, abs=1e-3)
    assert json.loads((tmp_path / "out" / "laser.json").read_text())["z_c_id"] == tokenizer.z_c_id
