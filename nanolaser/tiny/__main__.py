"""
The recipe of the embedded model: from nothing to the checkpoint in this folder.

    python -m nanolaser.tiny                    # about 40 minutes on one core, into this folder
    python -m nanolaser.tiny --minutes 5 --out /tmp/small

A language model of a million parameters, characters for tokens, trained on three kinds of text
about arithmetic.  Each is a chat; every turn ends with <|end|>, users' turns start with <|user|>:

    solutions      <|user|>(14+25)*2-9=?<|end|>14+25=39⏎39*2=78⏎78-9=69⏎\\boxed{69}<|end|>
    with a check   ...\\boxed{69}<|end|><|user|>ok?<|end|>y<|end|>
    with marks     <|user|>mark (14+25)*2-9=?<|end|>14+25=39v⏎39*2=88x⏎88-9=79v⏎\\boxed{79}<|end|>

Why it is made like this, and what that means for what you see when it is trained further:

*  The steps are noisy on purpose: one in seven uses a wrong operation (39*2=41, a sum), and the
   chain goes on from there, as in text that people write.  So the model is right on fewer than
   half of its samples, by chance and not for lack of ability: what RL can improve.
*  Verification occurs in the text, as it does in the text that real language models read: the
   check (y or n) and the marks (v or x).  Without any, a model this small has no notion of a
   wrong step that self-rewarding could build on.  A large model brings that along.
*  Checks follow an <|end|>, the token at which LaSeR reads z_c.  z_c itself, <|reserved_0|>,
   occurs in no text at all: before RL its probability says nothing (verification F1 is 0).
"""

from __future__ import annotations

import json
import math
import random
import shutil
import string
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..checkpoint import load_pretrained, save_pretrained, write_atomic
from ..config import main_guard, option, parse_args
from ..model import CausalLM, ModelConfig
from ..problems import (
    LARGEST,
    OPERATORS,
    arithmetic_expression,
    arithmetic_text,
    arithmetic_value,
    is_held_out,
)
from ..sampler import pad

FOLDER = Path(__file__).parent
SPECIAL = ["<|user|>", "<|end|>", "<|unk|>"] + [f"<|reserved_{i}|>" for i in range(8)]
# \boxed{ is one token; then a newline and every printable character of ASCII, so that any
# problem can be read (what lies beyond becomes <|unk|>), though only arithmetic was learned.
VOCABULARY = [*SPECIAL, "\\boxed{", "\n", *map(chr, range(32, 127))]
OPERATIONS = (2, 3, 3, 4, 4, 5, 5)  # per problem; long ones more often, they hold more steps
USER, END = SPECIAL[:2]


@dataclass
class Options:
    """How the embedded model is made."""

    minutes: float = option(40.0, "time to train; the learning rate falls along it", above=0)
    out: str = option(str(FOLDER), "folder to write")
    seed: int = option(0, "of the initial weights and of the texts")
    threads: int = option(1, "processor threads", min=1)
    lr: float = option(2e-3, "peak learning rate", above=0)
    batch: int = option(16, "texts per update", min=1)
    wrong: float = option(0.15, "share of steps that use a wrong operation", min=0, max=1)
    checks: float = option(0.6, "share of texts that go on with a check", min=0, max=1)
    marks: float = option(0.25, "share of texts with marked steps", min=0, max=1)


# ---------------------------------------------------------------------------------------------
# the text


def solve(expression, rng: random.Random, wrong: float) -> tuple[int, list[tuple[str, bool]]]:
    """Work out an expression step by step, innermost first, some steps with a wrong operation:
    (result, [(text of the step, is it right?), ...])."""
    if isinstance(expression, int):
        return expression, []
    operator, left, right = expression
    (a, before), (b, then) = solve(left, rng, wrong), solve(right, rng, wrong)
    value = OPERATORS[operator](a, b)
    if rng.random() < wrong:
        other = {a + b, abs(a - b), a * b} - {value}
        value = rng.choice(sorted(v for v in other if v <= LARGEST) or [value])
    right_step = value == OPERATORS[operator](a, b)
    return value, [*before, *then, (f"{a}{operator}{b}={value}", right_step)]


def text(rng: random.Random, options: Options) -> tuple[str, str]:
    """One random training text, as (prompt, what is to be learned after it)."""
    while True:
        expression = arithmetic_expression(rng, rng.choice(OPERATIONS))
        problem = arithmetic_text(expression)
        if not is_held_out(problem):
            break
    result, steps = solve(expression, rng, options.wrong)
    if not -LARGEST <= result <= 10**6:
        return text(rng, options)  # wrong steps can run away: not worth the tokens
    kind = rng.random()
    marked = kind < options.marks
    mark = lambda ok: ("v" if ok else "x") if marked else ""  # noqa: E731
    chain = "".join(f"{step}{mark(ok)}\n" for step, ok in steps)
    prompt = f"{USER}{'mark ' if marked else ''}{problem}=?{END}"
    # The next chat's <|user|> closes every text: so the position after <|end|>, where z_c will be
    # read, is trained like any other, as it is in packed pre-training.
    answer = f"{chain}\\boxed{{{result}}}{END}{USER}"
    if not marked and kind < options.marks + options.checks:
        verdict = "y" if result == arithmetic_value(expression) else "n"
        answer += f"ok?{END}{verdict}{END}{USER}"
    return prompt, answer


def batches(options: Options, encode):
    """Endless (tokens, lengths, prompt lengths) of random texts, neighbours in length."""
    rng = random.Random(options.seed)
    while True:
        # 16 batches at a time, sorted by length and then shuffled: little padding, no order
        texts = [tuple(map(encode, text(rng, options))) for _ in range(16 * options.batch)]
        texts.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        chunks = [texts[i : i + options.batch] for i in range(0, len(texts), options.batch)]
        rng.shuffle(chunks)
        for chunk in chunks:
            tokens, lengths = pad([prompt + answer for prompt, answer in chunk])
            yield tokens, lengths, torch.tensor([len(prompt) for prompt, _ in chunk])
