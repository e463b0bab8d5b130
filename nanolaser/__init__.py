"""nanolaser: LaSeR, reinforcement learning with last-token self-rewarding, to read and to use.

    import nanolaser
    model, tokenizer = nanolaser.load_pretrained("qwen2.5-0.5b")
    rollouts = nanolaser.generate(model, tokenizer, ["What is 2+3?"], n=8)

Names are looked up on first use: who only wants the answer checker never waits for torch.
"""

import importlib
import os

# OpenMP's threads spin while they wait for each other, and waste the core that another program on
# the machine could use, on which the slowest of them may depend.  After 1,000 rounds they sleep:
# a step of the embedded run on two cores then takes 1.7 s instead of 2.5 s beside one busy program,
# and 0.84 s instead of 0.78 s on a quiet machine.  To be set before torch loads OpenMP; a setting
# of the user's own stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOME = {
    "load_pretrained": "checkpoint",
    "save_pretrained": "checkpoint",
    "generate": "sampler",
    "score": "scoring",
    "Rollout": "rollout",
    "extract_answer": "checker",
    "is_equivalent": "checker",
    "is_correct": "checker",
    "explain": "checker",
    "reward_function": "checker",
    "compute_score": "checker",
    "token_logprobs": "readout",
    "self_reward": "laser",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    """Import a public name's module the first time the name is used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'nanolaser' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
