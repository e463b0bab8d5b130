"""
"Is this solution right?", asked of the model itself, in three ways.

    by readout     log pi(z_c) after the solution's end: LaSeR's r_s, one token
    by generation  a second prompt with the question in words, and the model writes a judgement:
                   what LaSeR replaces, as the baseline to compare with
    by log ratio   log pi(y | x) - log pi_ref(y | x), how much likelier training made the solution:
                   the implicit reward of DPO, free of charge and biased towards long solutions

`open_model` is how the scripts that only use a model load it: it refuses one in which r_s cannot
be read and says when r_s has no scale yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from .checker import extract_answer
from .checkpoint import load_pretrained
from .cli import ModelOptions, warn
from .model import CausalLM
from .readout import token_logprobs
from .rollout import Rollout
from .sampler import cut_by_tokens, generate, pad

# The longest default answer, in tokens: long enough for a chain of thought on a hard problem.
LONGEST = 4096
STRETCH = 16  # prompts so many times longer than what the model was trained on are a mistake


def open_model(options: ModelOptions) -> tuple[CausalLM, object]:
    """Load the model of a script's options: (model, tokenizer), with z_c, c_ref and beta_v set.

    ValueError or FileNotFoundError for a model that cannot be read or has no usable z_c.
    """
    model, tokenizer = load_pretrained(
        options.model, device=options.device, dtype=options.dtype, z_c=options.z_c
    )
    if options.thinking is not None:
        tokenizer.set_thinking(options.thinking)
    if options.beta_v is not None:
        tokenizer.beta_v = options.beta_v
    if options.c_ref is not None:
        tokenizer.c_ref, tokenizer.c_ref_std = options.c_ref, None
    if tokenizer.c_ref is None:
        # Without it log pi(z_c) has no zero point.  A guess would look like a result.
        warn(
            f"c_ref was never estimated for {options.model}: there is log pi({tokenizer.z_c}) but "
            "no r_s; train the model (train.py estimates c_ref first), or give --c-ref"
        )
    return model, tokenizer


def check_prompts(model: CausalLM, tokenizer, problems: list[str]) -> None:
    """Warns of problems whose prompt alone is longer than the model was made for; ValueError for
    one over STRETCH times as long: now, and not as an error of memory hours later."""
    positions = model.config.max_position_embeddings
    lengths = [len(tokenizer.encode_prompt(problem)) for problem in problems]
    longer = [i for i, length in enumerate(lengths) if length > positions]
    if not longer:
        return
    worst = max(longer, key=lengths.__getitem__)
    begins = f"{' '.join(problems[worst][:200].split())[:40]}..."
    said = f"problem {worst + 1} has {lengths[worst]} tokens; the model was made for {positions}"
    if lengths[worst] > STRETCH * positions:
        raise ValueError(f"{said}: {begins}")
    # A benchmark is the same for every model: such a problem is asked, and hardly ever solved.
    warn(f"{len(longer)} of {len(problems)} problems are too long: {said}: {begins}")


def default_new_tokens(model: CausalLM) -> int:
    """How long an answer may get if nobody says: half of the positions that the model has seen in
    training, the other half being left to the problem, at most LONGEST tokens."""
    return max(1, min(LONGEST, model.config.max_position_embeddings // 2))


def tokens_of(tokenizer, row: dict) -> tuple[list[int], list[int]]:
    """(prompt, response) of a rollout row as token ids, the response with an end, which one that
    was cut off did not come to: there r_s can be read as if it had ended."""
    # The ids that were sampled, where the row has them: its text may be cut otherwise.
    prompt = row.get("prompt_token_ids") or tokenizer.encode_prompt(row["problem"])
    response = row.get("response_token_ids") or tokenizer.encode(row["response"])
    ended = response[-1:] and response[-1] in tokenizer.stop_ids
    return prompt, response if ended else [*response, tokenizer.stop_ids[0]]


# ---------------------------------------------------------------------------------------------
# a judgement in words

# Asked in a conversation of its own.  The prompt's instruction, if the model has one, asks for a
# final answer in \boxed{}, so the question names what should be in it.
QUESTION = """Here is a problem and a proposed solution.

Problem: {problem}

Proposed solution: {solution}

Is the final answer of the proposed solution correct? Check it, then answer \\boxed{{yes}} or \
\\boxed{{no}}."""


def judgement_prompt(tokenizer, row: dict) -> list[int]:
    """Token ids of the prompt that asks for a judgement of a rollout row."""
    follow_up = getattr(tokenizer, "verify_prompt", None)
    if not follow_up:
        question = QUESTION.format(problem=row["problem"], solution=row["response"])
        return tokenizer.encode_prompt(question)
    # The model has learned a question of its own, asked as the next turn: the solution stays
    # where it was written, with the tokens it was written with.  The embedded model's:
    #     <|user|>2+3=?<|end|>2+3=5 \boxed{5}<|end|><|user|>ok?<|end|>   and it writes   y<|end|>
    prompt, response = tokens_of(tokenizer, row)
    return prompt + response + tokenizer.encode_prompt(follow_up)


def verdict(text: str, follow_up: bool) -> float | None:
    """What a judgement says: 1.0 right, 0.0 wrong, None where it does not commit itself.

    follow_up: the answer to a model's own short question, which begins with y or n.
    """
    text = text.strip().lower()
    if follow_up:
        return {"y": 1.0, "n": 0.0}.get(text[:1])
    # The box is the answer; without one, the last yes or no of the text, where a judgement ends
    # up after all its ifs and buts.
    word = r"\b(yes|no)\b"
    words = re.findall(word, extract_answer(text) or "") or re.findall(word, text)
    return float(words[-1] == "yes") if words else None


def judge(
    model: CausalLM, tokenizer, rows: list[dict], on_judged: Callable[[int, dict], None], **sampling
) -> None:
    """Ask for a judgement of each row; `on_judged(index, {judgement, score, tokens, finished})`
    hears of each as it ends, `tokens` counting what was generated.

    Greedy: the verdict wanted is the model's likeliest, not a draw.  `sampling` is generate's.
    """
    follow_up = bool(getattr(tokenizer, "verify_prompt", None))

    def finish(rollout: Rollout) -> None:
        text = tokenizer.decode(rollout.response_tokens)
        # One that was cut off has not said its last word.
        score = verdict(text, follow_up) if rollout.finished else None
        facts = {"judgement": text, "score": score, "tokens": len(rollout.response_tokens)}
        on_judged(rollout.prompt_id, facts | {"finished": rollout.finished})

    prompts = [judgement_prompt(tokenizer, row) for row in rows]
    generate(model, tokenizer, prompts, temperature=0.0, on_finish=finish, **sampling)


# ---------------------------------------------------------------------------------------------
# a log ratio


@torch.no_grad()
def log_probability(
    model: CausalLM, prompts: list[list[int]], responses: list[list[int]], budget: int = 16_384
) -> list[float]:
    """log pi(y | x) in nats of each of N responses, all its tokens summed; `budget` tokens, padding
    included, to a forward pass."""
    sums = [0.0] * len(prompts)
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    for batch in cut_by_tokens(lengths, budget):
        tokens, ends = pad([prompts[i] + responses[i] for i in batch], model.device)  # (B, T)
        starts = torch.tensor([len(prompts[i]) for i in batch], device=model.device)
        # Position t predicts token t + 1: a response at 3 .. 6 is predicted at 2 .. 5.
        hidden = model(tokens[:, :-1])  # (B, T-1, C)
        logprobs = token_logprobs(hidden, model.lm_head_weight, tokens[:, 1:])  # (B, T-1)
        t = torch.arange(tokens.shape[1] - 1, device=model.device)
        inside = (t >= starts[:, None] - 1) & (t < ends[:, None] - 1)
        for i, total in zip(batch, (logprobs * inside).sum(1).tolist()):
            sums[i] = total
    return sums
