"""nanolaser: LaSeR, reinforcement learning with last-token self-rewarding, to read and to use.

    import nanolaser
    model, tokenizer = nanolaser.load_pretrained("qwen2.5-0.5b")
    rollouts = nanolaser.generate(model, tokenizer, ["What is 2+3?"], n=8)

Names are looked up on first use: who only wants the answer checker never waits for torch.
"""

import importlib

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
    "token_logprobs": "readout",
    "self_reward": "laser",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    """Import a public name's module the first time the name is used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'nanolaser' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
