"""
The recipe of the embedded models: from nothing to the checkpoints in this folder.

    python -m nanolaser.tiny                    # about 45 minutes on one core, into this folder
    python -m nanolaser.tiny --updates 2000 --out small
    python -m nanolaser.tiny --task subset-sum  # the second one, 9 minutes on a busy core

A language model of a million parameters, characters for tokens, trained on three kinds of text
about arithmetic.  Each is a chat; every turn ends with <|end|>, users' turns start with <|user|>:

    solutions      <|user|>(14+25)*2-9=?<|end|>14+25=39⏎39*2=78⏎78-9=69⏎\\boxed{69}<|end|>
    with a check   ...\\boxed{69}<|end|><|user|>ok?<|end|>y<|end|>
    with marks     <|user|>mark (14+25)*2-9=?<|end|>14+25=39v⏎39*2=88x⏎88-9=79v⏎\\boxed{79}<|end|>

What that means for what you see when it is trained further:

*  One step in five is wrong on purpose, by another operation (39*2=41, a sum), and the chain goes
   on from there.  So the model is right on fewer than half of its samples, by chance and not for
   lack of ability: what RL can improve.  A wrong operation can be seen; that a digit was copied
   wrongly, or a sum is off by one, models of this size do not learn to see.
*  Verification occurs in the text, as it does in what real language models read: the check (y or
   n) and the marks (v or x).  Without any, a model this small has no notion of a wrong step that
   self-rewarding could build on.
*  Checks follow an <|end|>, the token at which LaSeR reads z_c.  z_c itself, <|reserved_0|>,
   occurs in no text at all: before RL its probability says nothing (verification F1 is 0).

The second model is a third as large and learns subset sums (subset_sum.py), from tries as a person
makes them and checks.  What is hard for it is not to see a right solution, but to find one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models

from ..checkpoint import save_pretrained
from ..cli import apply_preset, main_guard, option, parse_args
from ..files import write_atomic
from ..model import CausalLM, ModelConfig
from ..packing import pad
from ..tokenizer import Tokenizer
from . import subset_sum
from .arithmetic import LARGEST, OPERATORS, arithmetic_expression, arithmetic_text
from .arithmetic import arithmetic_value, is_held_out

FOLDER = Path(__file__).parent
SPECIAL = ["<|user|>", "<|end|>", "<|unk|>"] + [f"<|reserved_{i}|>" for i in range(8)]
# \boxed{ is one token; then a newline and every printable character of ASCII, so that any
# problem can be read (what lies beyond becomes <|unk|>), though only arithmetic was learned.
VOCABULARY = [*SPECIAL, "\\boxed{", "\n", *map(chr, range(32, 127))]
OPERATIONS = (1, 2, 3, 4, 5, 6)  # per problem; on short ones checking is learned first
USER, END = SPECIAL[:2]


@dataclass
class Options:
    """How an embedded model is made."""

    task: str = option("arithmetic", "what it is to learn", choices=("arithmetic", "subset-sum"))
    updates: int = option(11_000, "optimizer steps; the learning rate falls along them", min=1,
                          shown="11000; 2400 for subset-sum")
    out: str | None = option(None, "folder to write", shown="where --task has its model")
    seed: int = option(0, "of the initial weights and of the texts")
    wrong: float = option(0.2, "share of steps that go wrong", min=0, max=1,
                          shown="0.2; 0.03 for subset-sum")
    checks: float = option(0.65, "share of texts that go on with a check", min=0, max=1,
                           shown="0.65; 0.8 for subset-sum")


BATCH = 32  # texts per update
MARKS = 0.2  # share of arithmetic with marked steps


# ---------------------------------------------------------------------------------------------
# the text


def solve(expression, rng: random.Random, wrong: float) -> tuple[int, list[tuple[str, bool]]]:
    """Work out an expression step by step, innermost first, some steps wrong:
    (result, [(text of the step, is it right?), ...])."""
    if isinstance(expression, int):
        return expression, []
    operator, left, right = expression
    # The order in which a person would: the steps of the left operand, of the right one, then this.
    (a, before), (b, then) = solve(left, rng, wrong), solve(right, rng, wrong)
    right = value = OPERATORS[operator](a, b)
    if rng.random() < wrong:
        # the product where the sum is asked for, and so on; now and then the values agree
        others = {a + b, abs(a - b), a * b} - {right}
        value = rng.choice(sorted(v for v in others if v <= LARGEST) or [right])
    return value, [*before, *then, (f"{a}{operator}{b}={value}", value == right)]


def subset_sum_text(rng: random.Random, options: Options) -> tuple[str, str]:
    """One random training text about subset sums, as (prompt, what is to be learned after it)."""
    problem = None
    while problem is None or is_held_out(problem):  # the test split's are never seen
        target, numbers, chosen = subset_sum.subset_sum(rng)
        problem = subset_sum.subset_text(target, numbers)
    # Trying finds the solution in 28 of 100 cases; in every tenth text there is nothing to try but
    # its own numbers, so that a few more checks are y.
    pool = {x: numbers[x] for x in chosen} if rng.random() < 0.1 else numbers
    answer = subset_sum.attempt(target, pool, rng, options.wrong)
    verdict = "y" if subset_sum.reward(problem, answer) else "n"
    check = f"ok?{END}{verdict}{END}{USER}" if rng.random() < options.checks else ""
    return f"{USER}{problem}{END}", f"{answer}{END}{USER}{check}"


def text(rng: random.Random, options: Options) -> tuple[str, str]:
    """One random training text, as (prompt, what is to be learned after it)."""
    if options.task == "subset-sum":
        return subset_sum_text(rng, options)
    # 1. A problem that is not held out, and its solution, wrong steps and all.
    problem = None
    while problem is None or is_held_out(problem):
        expression = arithmetic_expression(rng, rng.choice(OPERATIONS))
        problem = arithmetic_text(expression)
    result, steps = solve(expression, rng, options.wrong)
    if not -LARGEST <= result <= 10**6:
        return text(rng, options)  # wrong steps can run away: not worth the tokens
    # 2. One number decides between the three kinds of text: 0 .. 0.2 marks, .. 0.85 a check.
    kind = rng.random()
    marked = kind < MARKS
    mark = lambda ok: ("v" if ok else "x") if marked else ""  # noqa: E731
    chain = "".join(f"{step}{mark(ok)}\n" for step, ok in steps)
    prompt = f"{USER}{'mark ' if marked else ''}{problem}=?{END}"
    # 3. The next chat's <|user|> closes every text: so the position after <|end|>, where z_c will
    #    be read, is trained like any other, as it is in packed pre-training.
    answer = f"{chain}\\boxed{{{result}}}{END}{USER}"
    if not marked and kind < MARKS + options.checks:
        # By the result, as the checker will judge in RL: two wrong steps may cancel, rarely.
        verdict = "y" if result == arithmetic_value(expression) else "n"
        answer += f"ok?{END}{verdict}{END}{USER}"
    return prompt, answer


def batches(options: Options, encode):
    """Endless (tokens, lengths, prompt lengths) of random texts, neighbours in length."""
    rng = random.Random(options.seed)
    while True:
        # 16 batches at a time, sorted by length and then shuffled: little padding, no order
        texts = [tuple(map(encode, text(rng, options))) for _ in range(16 * BATCH)]
        texts.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        chunks = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        rng.shuffle(chunks)
        for chunk in chunks:
            tokens, lengths = pad([prompt + answer for prompt, answer in chunk])
            # tokens (B, T), lengths (B,), prompt lengths (B,)
            yield tokens, lengths, torch.tensor([len(prompt) for prompt, _ in chunk])


# ---------------------------------------------------------------------------------------------
# the checkpoint's files


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and laser.json: characters, chat markers, z_c."""
    # What the `tokenizers` library, and so transformers and vLLM, read: no code of ours is needed.
    # Byte-pair encoding without a single merge: every character is its own token.
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, [], unk_token="<|unk|>"))
    tokenizer.decoder = decoders.Fuse()
    # Tokens of several characters are looked for before all others; \boxed{ is text all the same.
    tokenizer.add_tokens([tokenizers.AddedToken(t, special=t in SPECIAL, normalized=False)
                          for t in VOCABULARY if len(t) > 1])  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "unk_token": "<|unk|>",
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": SPECIAL,
        # user: <|user|>TEXT<|end|>, assistant: TEXT<|end|>, and nothing before the answer begins
        "chat_template": (
            "{% for message in messages %}"
            f"{{{{ ('{USER}' if message['role'] == 'user' else '') + message['content'] }}}}{END}"
            "{% endfor %}"
        ),
    }
    # The first of eight reserved tokens; c_ref is measured by train.py, on the model as it is.
    z_c = SPECIAL[3]
    laser = {"z_c": z_c, "z_c_id": 3, "c_ref": None, "c_ref_std": None, "beta_v": 0.1}
    # The problems need no instruction, and this is how the model was asked for its checks.
    laser |= {"instruction": "", "verify_prompt": "ok?"}
    tokenizer = json.loads(tokenizer.to_str())
    tokenizer["model"].pop("ignore_merges", None)  # which older versions of the library lack
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config),
                        ("laser.json", laser)):  # fmt: skip
        write_atomic(folder / name, json.dumps(value, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------
# the training


# 1.2 million parameters: six layers, since a problem of five operations is worked out step by step
# but each step is looked up in one go; grouped queries and tied output, so that the embedded run
# goes through the same code as Qwen2.5's smaller models.
CONFIG = ModelConfig(
    model_type="llama", vocab_size=len(VOCABULARY), hidden_size=128, intermediate_size=384,
    num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=(VOCABULARY.index(END),),
)  # fmt: skip
# What differs for the second task: options, folder and shape.  0.4 million parameters are enough
# for one subtraction a line: four layers, three heads, one of keys.
TASKS = {
    "arithmetic": ({}, FOLDER, {}),
    "subset-sum": (dict(updates=2400, wrong=0.03, checks=0.8), FOLDER / "subset-sum", dict(
        hidden_size=96, intermediate_size=288, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=1)),
}  # fmt: skip


def optimizers(model: CausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    Muon (Jordan 2024, in torch since 2.9) gives all directions of a matrix the same step size.
    Here it needs about a fifth of the texts that AdamW alone needs until checking is learned.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError("the recipe needs torch 2.9 or newer (torch.optim.Muon)")
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    # eps 1e-7: the gradient of a token that never occurs shrinks to nothing, and Adam would
    # divide it by its own size and go on pushing that token down for ever; so would z_c drift.
    adam = dict(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, eps=1e-7, fused=True)
    muon = dict(lr=0.02, momentum=0.95, weight_decay=0.01)
    return [torch.optim.AdamW(others, **adam), torch.optim.Muon(matrices, **muon)]


@torch.no_grad()
def init_weights(model: CausalLM, seed: int) -> CausalLM:
    """The same model, ready to be trained from nothing: normal(0, initializer_range), biases zero
    (GPT-2, section 2.3)."""
    g, std = torch.Generator().manual_seed(seed), model.config.initializer_range
    # 2 L branches are added to the residual stream: else its variance would grow with L
    branch = std / (2 * model.config.num_hidden_layers) ** 0.5
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif p.dim() == 2:
            back = name.endswith(("o_proj.weight", "down_proj.weight"))
            p.normal_(0.0, branch if back else std, generator=g)
    return model


def train(model: CausalLM, encode, options: Options) -> None:
    """Supervised training on random texts for options.updates steps; cosine learning rate."""
    # Two optimizers, and one schedule for both: up in 100 steps, then half a cosine down to 2 %.
    both = optimizers(model)
    groups = [group for optimizer in both for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    yes, no, *_ = verdicts = torch.tensor([VOCABULARY.index(c) for c in "ynvx"])
    start, seen = time.perf_counter(), []
    for update, (tokens, lengths, prompts) in zip(range(options.updates), batches(options, encode)):
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * update / options.updates))
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * min(1, (update + 1) / 100) * decay
        # 1. Position t predicts token t + 1: learn what comes after the prompt, not the prompt.
        t = torch.arange(tokens.shape[1] - 1)
        learned = (t >= prompts[:, None] - 1) & (t < lengths[:, None] - 1)  # (B, T-1)
        targets = tokens[:, 1:][learned]  # (M,)
        logits = model(tokens[:, :-1])[learned] @ model.lm_head_weight.T  # (M, V)
        # 2. A verdict is one token among forty and the hardest of them: let it weigh four.
        weight = 1.0 + 3.0 * torch.isin(targets, verdicts)
        loss = (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()
        # 3. z-loss (PaLM, section 5): keeps the softmax's normaliser near 1, and so the
        #    log-probability of every unused token nearly the same everywhere.  That is what c_ref
        #    is: it has to be nearly constant before RL (31.3 +- 0.2 nats here).
        z_loss = 1e-3 * logits.logsumexp(-1).square().mean()
        (loss + z_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        model.zero_grad()
        # 4. What is learned last: is y more likely than n after a chain without a wrong step?
        asked = (targets == yes) | (targets == no)
        says_no = logits.detach()[asked][:, no] > logits.detach()[asked][:, yes]
        seen += (says_no == (targets[asked] == no)).tolist()
        if (update + 1) % 500 == 0:
            minutes, right = (time.perf_counter() - start) / 60, sum(seen) / len(seen)
            line = f"{minutes:5.1f} min  update {update + 1:6d}  loss {loss.item():.3f}"
            print(f"{line}  checks right {right:.1%}", flush=True)
            seen.clear()


def main() -> None:
    """Write the tokenizer, train, write the model beside it."""
    options, given = parse_args(Options, description=__doc__.split("\n\n")[0])
    preset, folder, smaller = TASKS[options.task]
    options = apply_preset(options, given, preset)
    torch.set_num_threads(1)  # several would add up in another order, and make another model
    out = Path(options.out or folder)
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written fails now, not in half an hour
    model = init_weights(CausalLM(dataclasses.replace(CONFIG, **smaller)), options.seed)
    # Trained in a folder of its own and copied at the end: the shipped model is replaced by a
    # whole one or not at all.
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tokenizer(folder)
        tokenizer = Tokenizer.from_folder(folder)
        train(model, tokenizer.encode, options)
        save_pretrained(model, tokenizer, folder / "model")
        for file in (folder / "model").iterdir():
            write_atomic(out / file.name, file.read_bytes())
    print(f"wrote {out}")


if __name__ == "__main__":
    main_guard(main)
