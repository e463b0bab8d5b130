"""
"Is this solution right?", asked of the model itself, in three ways.

    by readout     log pi(z_c) after the solution's end: LaSeR's r_s, one token
    by generation  a second prompt with the question in words, and the model writes a judgement:
                   what LaSeR replaces, as the baseline to compare with
    by log-probs   how likely the solution was as it was written: free of charge; against the model
                   before training (the implicit reward of DPO) biased towards long solutions

And what the scripts that only use a model share: its loading, its sampling options, its rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import metrics
from .checker import explain, extract_answer, is_equivalent
from .checkpoint import load_pretrained
from .cli import ModelOptions, option, warn
from .files import read_jsonl
from .model import CausalLM
from .packing import cut_by_tokens, pad
from .readout import BLOCK_LOGITS
from .reward import self_reward
from .rollout import Rollout
from .sampler import generate
from .scale.plan import default_kv_cache_gb
from .scoring import read_last, score

# The longest default answer, in tokens: long enough for a chain of thought on a hard problem.
LONGEST = 4096
STRETCH = 16  # prompts so many times longer than what the model was trained on are a mistake


def open_model(options: ModelOptions) -> tuple[CausalLM, object]:
    """Load the model of a script's options: (model, tokenizer), with z_c, c_ref and beta_v set;
    ValueError or FileNotFoundError for one that cannot be read or has no usable z_c."""
    model, tokenizer = load_pretrained(
        options.model, device=options.device, dtype=options.dtype, z_c=options.z_c)
    # The scale of r_s comes with a trained model (laser.json); what was typed overrides it.
    if options.thinking is not None:
        tokenizer.set_thinking(options.thinking)
    if options.beta_v is not None:
        tokenizer.beta_v = options.beta_v
    if options.c_ref is not None:
        tokenizer.c_ref, tokenizer.c_ref_std = options.c_ref, None
    if tokenizer.c_ref is None:
        # Without it log pi(z_c) has no zero point.  A guess would look like a result.
        warn(f"c_ref was never estimated for {options.model}: there is log pi({tokenizer.z_c}) but "
             "no r_s; train the model (train.py estimates c_ref first), or give --c-ref")
    return model, tokenizer


@dataclass
class SamplingOptions(ModelOptions):
    """The options of every script that samples from a model it does not train."""

    temperature: float = option(1.0, "0 always takes the likeliest token", group="sampling", min=0)
    top_p: float = option(1.0, "draw from the likeliest tokens of this total probability",
                          group="sampling", above=0, max=1)
    max_new_tokens: int | None = option(None, "longest solution", group="sampling", min=1,
                                        shown="half of the model's positions, at most 4096")
    max_rows: int = option(256, "solutions sampled at the same time", group="sampling", min=1)
    kv_cache_gb: float | None = option(None, "GB the KV cache may take", group="sampling",
                                       shown="half of what is free")

    def how(self, model: CausalLM) -> dict:
        """`generate`'s arguments, with what the model decides where nothing was said."""
        # Half of the positions that the model has seen in training are left to the problem.
        longest = max(1, min(LONGEST, model.config.max_position_embeddings // 2))
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed,
                "max_new_tokens": self.max_new_tokens or longest, "max_rows": self.max_rows,
                "kv_cache_gb": self.kv_cache_gb or default_kv_cache_gb(model.device)}


def check_prompts(model: CausalLM, tokenizer, problems: list[str]) -> None:
    """Warns of problems whose prompt alone is longer than the model was made for; ValueError for
    one over STRETCH times as long: now, and not as an error of memory hours later."""
    positions = model.config.max_position_embeddings
    lengths = [len(tokenizer.encode_prompt(problem)) for problem in problems]
    longer = sum(length > positions for length in lengths)
    if not longer:
        return
    worst = lengths.index(max(lengths))
    begins = f"{' '.join(problems[worst][:200].split())[:40]}..."
    said = f"problem {worst + 1} has {lengths[worst]} tokens; the model was made for {positions}"
    if lengths[worst] > STRETCH * positions:
        raise ValueError(f"{said}: {begins}")
    # A benchmark is the same for every model: such a problem is asked, and hardly ever solved.
    warn(f"{longer} of {len(problems)} problems are too long: {said}: {begins}")


# ---------------------------------------------------------------------------------------------
# rows of solutions that are there already


def tokens_of(tokenizer, row: dict, ended: bool = True) -> tuple[list[int], list[int]]:
    """(prompt, response) of a rollout row as token ids: those that were sampled, if they spell the
    text beside them, else the text's.  `ended`: with a stop token even where it was cut off, so
    that r_s can be read as if it had ended.  ValueError for foreign ids without a text."""
    # A model's own tokens are not always those that its tokenizer would make of its text: "\boxed"
    # may have been drawn as "\box" and "ed", and r_s belongs to what was drawn.
    prompt, response = row.get("prompt_token_ids"), row.get("response_token_ids")
    if not (response and own_tokens(tokenizer, row)):
        if row["response"] is None or row["problem"] is None:
            raise ValueError("a row's token ids are another model's, and it has no problem and "
                             "response as text")
        # With the ids of its response those of its prompt fall: they are the same model's.
        prompt, response = None, tokenizer.encode(row["response"])
        ended = ended or row.get("finished", True)  # a text without the word for it is whole
    if ended and not (response and response[-1] in tokenizer.stop_ids):
        response = [*response, tokenizer.stop_ids[0]]
    return prompt or tokenizer.encode_prompt(row["problem"]), response


def own_tokens(tokenizer, row: dict) -> bool:
    """Whether a row's response_token_ids are this tokenizer's, and spell its text."""
    ids = row.get("response_token_ids") or []
    known = ids and max([*ids, *(row.get("prompt_token_ids") or [])]) < tokenizer.size
    return bool(known) and row["response"] in (None, tokenizer.decode(ids))


# Problem and solution may be this many times as long as the texts that the model was trained on:
# a model can be sampled beyond its positions, and then r_s is read as it was sampled.
TOO_LONG = 4


def score_rows(
    model: CausalLM, tokenizer, rows: list[dict], threshold: float = 0.5,
    batch_tokens: int = 16_384, on_scored: Callable[[int], None] | None = None,
) -> list[dict]:  # fmt: skip
    """Rows of `problems.read_solutions` with logp_zc, r_s, verdict (right where r_s > threshold)
    and all that the checker says; None where a solution was cut off, for there is no end to read
    at."""
    # 1. Text to tokens; what is known without the model.
    tokens = [tokens_of(tokenizer, row, ended=False) for row in rows]
    done = []
    for row, (_, response) in zip(rows, tokens):
        own = own_tokens(tokenizer, row)
        done.append(row | {
            "logp_zc": None, "r_s": None, "verdict": None, "tokens_from": "ids" if own else "text",
            "response": tokenizer.decode(response) if own else row["response"],
            "finished": bool(response) and response[-1] in tokenizer.stop_ids,
            "response_tokens": len(response),
        })  # fmt: skip
    # 2. Those that can be read: with an end, and of a sane length.  A row of a megabyte is a
    #    mistake, and the cost grows with the square of the length.
    ended = [i for i, row in enumerate(done) if row["finished"]]
    most = TOO_LONG * model.config.max_position_embeddings
    fit = [i for i in ended if len(tokens[i][0]) + len(tokens[i][1]) <= most]
    if len(fit) < len(ended):
        warn(f"{len(ended) - len(fit)} solutions have over {most} tokens, {TOO_LONG} times what "
             "the model was made for: no r_s")
    # 3. One forward pass over each, one number from it.
    prompts, responses = [tokens[i][0] for i in fit], [tokens[i][1] for i in fit]
    values = score(model, tokenizer.z_c_id, prompts, responses, batch_tokens, on_scored)
    for i, value in zip(fit, values):
        r_s = self_reward(value, tokenizer)
        verdict = None if r_s is None else "right" if r_s > threshold else "wrong"
        done[i] |= {"logp_zc": value, "r_s": r_s, "verdict": verdict}
    return [row | ask_checker(row) for row in done]


def ask_checker(row: dict) -> dict:
    """The boxed answer and, where there is a gold, r_v and the checker's reason."""
    gold = row.get("gold")
    # Not strict: exactly one box is a rule for training, where a model would exploit more.
    try:
        answer = extract_answer(row["response"]) or None
        if gold is None:
            return {"answer": answer, "r_v": row.get("r_v")}
        r_v = float(answer is not None and is_equivalent(answer, gold))
        reason = "no boxed answer" if answer is None else explain(answer, gold).rule
    except Exception as error:  # a text that is too much for the checker is one bad row, not all
        answer, r_v = None, row.get("r_v") if gold is None else 0.0
        reason = f"the checker failed: {type(error).__name__}"
    return {"answer": answer, "r_v": r_v, "checker": reason}


def fitted_threshold(name: str | None, evaluated: Sequence[dict] = ()) -> float:
    """The threshold of r_s whose verdicts have the best F1 on the solved problems of a file (rows
    with r_s and r_v); 0.5 without a file.  Warns where a problem of it is also in the rows
    `evaluated`; ValueError names the file, and the line if it is one."""
    if name is None:
        return 0.5
    number = (int, float, type(None))
    rows = [row for _, row in read_jsonl(name, {"r_s": number, "r_v": number})]
    rows = [row for row in rows if row["r_v"] is not None]
    try:
        threshold = metrics.fit_threshold([r["r_v"] for r in rows], [r["r_s"] for r in rows])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    # Fitted on what it is then judged by, a threshold looks better than it is.
    both = {row.get("problem") for row in rows} & {row["problem"] for row in evaluated}
    if both:
        warn(f"{len(both)} of the problems evaluated are also in {name}: F1 is no longer that of "
             "problems which the threshold has not seen")
    return threshold


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
    hears of each as it ends, `tokens` counting what was generated.  `sampling` is generate's."""
    follow_up = bool(getattr(tokenizer, "verify_prompt", None))

    def finish(rollout: Rollout) -> None:
        text = tokenizer.decode(rollout.response_tokens)
        # One that was cut off has not said its last word.
        said = verdict(text, follow_up) if rollout.finished else None
        facts = {"judgement": text, "score": said, "tokens": len(rollout.response_tokens)}
        on_judged(rollout.prompt_id, facts | {"finished": rollout.finished})

    prompts = [judgement_prompt(tokenizer, row) for row in rows]
    # Greedy: the verdict wanted is the model's likeliest, not a draw.
    generate(model, tokenizer, prompts, on_finish=finish, **sampling | {"temperature": 0.0})


def p_yes(
    model: CausalLM, tokenizer, rows: list[dict], budget: int = 16_384,
    on_read: Callable[[int], None] | None = None,
) -> list[float]:  # fmt: skip
    """P(yes) / (P(yes) + P(no)) of each row as the first word of a judgement, in [0, 1]: the same
    question, but instead of writing an answer the model is asked what it would write (P(True),
    Kadavath et al. 2022)."""
    follow_up = bool(getattr(tokenizer, "verify_prompt", None))
    lead, words = ("", ("y", "n")) if follow_up else ("\\boxed{", ("yes", "no"))
    # The first token of each word stands for it: what follows is nearly certain then.
    ids = [tokenizer.encode(word)[0] for word in words]
    prompts = [judgement_prompt(tokenizer, row) + tokenizer.encode(lead) for row in rows]
    logprobs = read_last(model, prompts, [[] for _ in rows], ids, budget, on_read)  # (N, 2)
    return (logprobs[:, 0] - logprobs[:, 1]).sigmoid().tolist()


# ---------------------------------------------------------------------------------------------
# the probabilities with which a solution was written

TOP = 20  # tokens that DeepConf's confidence is the mean over
WINDOW = 8  # tokens in a group of it; the authors take 1024 or 2048 of solutions of 10,000 and more


@torch.no_grad()
def confidences(
    model: CausalLM, prompts: list[list[int]], responses: list[list[int]], size: int,
    budget: int = 16_384, on_read: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """What the distributions at the tokens of N responses say, N numbers each, larger is surer:

    logprob         log pi(y | x) in nats, summed over the response
    mean-logprob    the same, a token
    self-certainty  the mean over tokens of KL(uniform || pi), nats (Kang et al. 2025)
    lowest-group    the least mean over WINDOW tokens in a row of minus the mean log-prob of the TOP
                    likeliest tokens, nats (DeepConf, Fu et al. 2025)

    `size` is the tokenizer's; `budget` tokens, padding included, go to a forward pass; `on_read(k)`
    hears of every k responses done.
    """
    values = [(0.0,) * 4] * len(prompts)  # in the order above
    head = model.lm_head_weight  # (V, C); rows beyond `size` are padding of the matrix
    block = max(1, BLOCK_LOGITS // len(head))
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    # All of a row's distributions are read in one pass, a block of positions at a time: (M, V) in
    # fp32 would be gigabytes.
    for batch in cut_by_tokens(lengths, budget):
        tokens, ends = pad([prompts[i] + responses[i] for i in batch], model.device)  # (B, T)
        starts = torch.tensor([len(prompts[i]) for i in batch], device=model.device)
        # Position t predicts token t + 1: a response at 3 .. 6 is predicted at 2 .. 5.
        t = torch.arange(tokens.shape[1] - 1, device=model.device)
        inside = (t >= starts[:, None] - 1) & (t < ends[:, None] - 1)  # (B, T-1)
        hidden, said = model(tokens[:, :-1])[inside], tokens[:, 1:][inside]  # (M, C), (M,)
        facts = []  # (3, n) of each block of M
        for states, chosen in zip(hidden.split(block), said.split(block)):
            logprobs = (states.float() @ head.float().T).log_softmax(-1)  # (n, V)
            known = logprobs[:, :size]
            facts.append(torch.stack([
                logprobs.gather(1, chosen[:, None])[:, 0],
                -known.mean(-1) - math.log(size),
                -known.topk(min(TOP, size)).values.mean(-1),
            ]))  # fmt: skip
        rows = torch.cat(facts, 1).cpu().split([len(responses[i]) for i in batch], 1)
        for i, (logprob, certainty, confidence) in zip(batch, rows):
            # Groups overlap: 10 tokens have three of 8.  A shorter solution is one group.
            groups = confidence.unfold(0, min(WINDOW, len(confidence)), 1).mean(-1)
            four = (logprob.sum(), logprob.mean(), certainty.mean(), groups.min())
            values[i] = tuple(x.item() for x in four)
        if on_read is not None:
            on_read(len(batch))
    names = ("logprob", "mean-logprob", "self-certainty", "lowest-group")
    return {name: [four[k] for four in values] for k, name in enumerate(names)}


# Scores that a model gives its own finished solutions without having been trained to.
OWN_SCORES = ("p-yes", "mean-logprob", "self-certainty", "lowest-group")


def own_scores(
    model: CausalLM, tokenizer, rows: list[dict], names: Sequence[str],
    on_read: Callable[[int], None] | None = None,
) -> dict:  # fmt: skip
    """{name: N scores} of N rollout rows that have an end, for names of OWN_SCORES; `on_read(k)`
    hears of k rows after each forward pass, of which a row takes one or two."""
    asked = {"p-yes"} & set(names)
    found = {name: p_yes(model, tokenizer, rows, on_read=on_read) for name in asked}
    if set(names) - asked and rows:
        prompts, responses = zip(*(tokens_of(tokenizer, row) for row in rows))
        found |= confidences(model, prompts, responses, tokenizer.size, on_read=on_read)
    return {name: found.get(name, []) for name in names}
