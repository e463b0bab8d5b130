"""The batched, cached sampler against one row, one full forward pass a token; its dice; and the
reader of given solutions."""

import math

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from nanolaser.cache import KVCache
from nanolaser.judge import STRETCH, check_prompts
from nanolaser.packing import cut_by_tokens, pad
from nanolaser.sampler import generate, sample_next, uniforms
from nanolaser.scoring import read_last, score
from tests import plain
from tests.core import SIZE, VOCAB, FakeTokenizer, all_logprobs, random_model, read, slow_readout

TOKENIZER = FakeTokenizer()
PROMPTS = ["a", "bcdefghijk", "kk3", "0123456789abcdefg", "u1", "fed", "9"]


@pytest.fixture(scope="module")
def model():
    return random_model().requires_grad_(False)


@torch.no_grad()
def greedy(model, prompt, max_new_tokens):
    """Argmax over a full forward pass for every token: no cache, no batch, no padding."""
    response = []
    while len(response) < max_new_tokens:
        row = all_logprobs(model, prompt + response)[-1]
        response.append(row[: TOKENIZER.size].argmax().item())
        if response[-1] in TOKENIZER.stop_ids:
            break
    return response


def texts(rollouts):
    return [r.response_tokens for r in rollouts]


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("kind", ["qwen2, tied", "llama, untied"])
def test_greedy_equals_full_forward_argmax(kind):
    changes = {} if kind == "qwen2, tied" else dict(
        model_type="llama", attention_bias=False, tie_word_embeddings=False, head_dim=12)
    model = random_model(**changes)
    # 70 tokens: beyond the first block of the cache
    expected = [greedy(model, TOKENIZER.encode_prompt(text), 70) for text in PROMPTS]
    assert len(set(map(len, expected))) >= 3, "this model should stop early on some prompts"
    for max_rows in (1, 3, 256):
        rollouts = generate(model, TOKENIZER, PROMPTS, max_new_tokens=70, temperature=0.0,
                            max_rows=max_rows)
        assert texts(rollouts) == expected
        assert [r.prompt_tokens for r in rollouts] == [TOKENIZER.encode_prompt(p) for p in PROMPTS]


def test_sampled_rollouts_are_well_formed(model):
    rollouts = generate(model, TOKENIZER, PROMPTS, n=8, max_new_tokens=12, seed=3)
    assert [r.prompt_id for r in rollouts] == [i for i in range(len(PROMPTS)) for _ in range(8)]
    for r in rollouts:
        assert 1 <= len(r.response_tokens) <= 12 and len(r.logprobs) == len(r.response_tokens)
        # the stop token is kept, comes last, and only there
        stops = [t in TOKENIZER.stop_ids for t in r.response_tokens]
        assert not any(stops[:-1]) and stops[-1] == r.finished
        assert (r.logp_zc is not None) == r.finished
        assert r.finished or len(r.response_tokens) == 12
    # every stop id ends a solution, and the one that did is kept
    assert {r.response_tokens[-1] for r in rollouts if r.finished} == set(TOKENIZER.stop_ids)
    # stop tokens in the last allowed place: an end like any other
    assert any(r.finished and len(r.response_tokens) == 12 for r in rollouts)
    assert any(not r.finished for r in rollouts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_readout_equal_the_training_forward(model, temperature):
    """The r_s of sampling is the r_s of training: one z_c, read after the stop token, at
    temperature 1; the tokens' log-probs carry the sampling temperature."""
    rollouts = generate(model, TOKENIZER, PROMPTS, n=6, max_new_tokens=14, seed=1,
                        temperature=temperature, max_rows=9)
    logprobs, logp_zc = read(model, rollouts, TOKENIZER.z_c_id, temperature)
    sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
    assert_close(sampled, logprobs, atol=2e-5, rtol=0)
    ended = [r for r in rollouts if r.finished]
    assert 0 < len(ended) < len(rollouts) and len(logp_zc) == len(ended)
    assert_close(torch.tensor([r.logp_zc for r in ended]), logp_zc, atol=2e-5, rtol=0)
    given = score(model, TOKENIZER.z_c_id, [r.prompt_tokens for r in ended],
                  [r.response_tokens for r in ended], batch_tokens=50)
    assert_close(torch.tensor(given), logp_zc, atol=2e-5, rtol=0)
    for r in rollouts[::5]:  # and both equal the definition
        expected, expected_zc = slow_readout(model, r, temperature=temperature)
        assert_close(torch.tensor(r.logprobs).double(), expected, atol=2e-5, rtol=0)
        assert r.logp_zc is None or r.logp_zc == pytest.approx(expected_zc.item(), abs=2e-5)


def test_bf16_model_samples_and_scores_alike():
    model = random_model().bfloat16().requires_grad_(False)
    rollouts = generate(model, TOKENIZER, PROMPTS, n=4, max_new_tokens=10)
    logprobs, logp_zc = read(model, rollouts, TOKENIZER.z_c_id, 1.0)
    sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
    # rounding differs between cached and full attention, but no position is off by one
    assert (sampled - logprobs).abs().mean() < 0.05 and logprobs.dtype == torch.float32


# ---------------------------------------------------------------- which rows share a batch


def test_same_seed_same_rollouts_whatever_the_batch(model):
    options = dict(n=5, max_new_tokens=20, seed=11)
    all_at_once = generate(model, TOKENIZER, PROMPTS, **options)
    for max_rows in (1, 3, 5, 34):
        slots = generate(model, TOKENIZER, PROMPTS, max_rows=max_rows, **options)
        assert texts(slots) == texts(all_at_once)
        ours, theirs = ([r.logp_zc or 0.0 for r in x] for x in (slots, all_at_once))
        assert ours == pytest.approx(theirs, abs=2e-5)
    # prompts that come later change nothing about the first ones; ids or text are the same
    fewer = generate(model, TOKENIZER, [TOKENIZER.encode_prompt(p) for p in PROMPTS[:3]], **options)
    assert texts(fewer) == texts(all_at_once)[:15]
    other = generate(model, TOKENIZER, PROMPTS, **{**options, "seed": 12})
    assert sum(a == b for a, b in zip(texts(other), texts(all_at_once))) < 10


def test_a_stream_keeps_its_text_in_any_order(model):
    """Prompts in another order, and only some of them, each with the stream it had."""
    options = dict(n=5, max_new_tokens=20, seed=11)
    usual = texts(generate(model, TOKENIZER, PROMPTS, **options))
    order = [5, 0, 3, 2]
    picked = generate(model, TOKENIZER, [PROMPTS[i] for i in order], max_rows=6,
                      streams=[5 * i for i in order], **options)
    assert texts(picked) == [t for i in order for t in usual[5 * i : 5 * i + 5]]
    assert [r.prompt_id for r in picked] == [i for i in range(4) for _ in range(5)]


def test_on_step_shows_solutions_as_they_grow(model):
    seen = []
    look = lambda flying: seen.append([len(r.response_tokens) for r in flying])  # noqa: E731
    rollouts = generate(model, TOKENIZER, PROMPTS, max_new_tokens=9, on_step=look)
    assert seen[0] == [1] * len(PROMPTS) and all(map(all, seen))
    # a row runs for each of its tokens, and one step more where its end is read
    assert sum(map(len, seen)) == sum(len(r.response_tokens) + r.finished for r in rollouts)


def test_same_tokens_within_any_budget(model, monkeypatch):
    """A budget makes prompts wait and young rows give way; no token depends on it, and the cache
    never takes more."""
    options = dict(n=4, max_new_tokens=150, seed=4)
    prompts = ["a", "u1", "0123456789abcdefg" * 5, "kk3"]
    slow = random_model(seed=1, std=0.12).requires_grad_(False)  # solutions of all lengths
    free = generate(slow, TOKENIZER, prompts, **options)
    c = slow.config
    row = KVCache(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, 64).bytes_for(1)
    assert {len(r.prompt_tokens + r.response_tokens) // 64 for r in free} >= {0, 1, 2}
    most, dropped, reserve, drop = [], [], KVCache.reserve, KVCache.drop

    def watched_reserve(cache):
        most.append(cache.bytes)
        return reserve(cache)

    def watched_drop(cache, sequences):
        drop(cache, sequences)
        most.append(cache.bytes)
        dropped.extend(sequences)

    monkeypatch.setattr(KVCache, "reserve", watched_reserve)
    monkeypatch.setattr(KVCache, "drop", watched_drop)
    for rows in (4, 5, 9, 40):  # the longest row alone is 4
        most.clear(), dropped.clear()
        tight = generate(slow, TOKENIZER, prompts, kv_cache_gb=rows * row / 1e9, **options)
        assert texts(tight) == texts(free)
        ours, theirs = ([r.logp_zc or 0.0 for r in x] for x in (tight, free))
        assert ours == pytest.approx(theirs, abs=2e-5)
        assert 0 < max(most) <= rows * row
        # each row leaves once when it ends, and again each time it gives way
        assert (len(dropped) > len(free)) == (rows <= 5)
    with pytest.raises(ValueError, match="235 tokens.*--kv-cache-gb"):
        generate(slow, TOKENIZER, prompts, kv_cache_gb=3.9 * row / 1e9, **options)


def test_rows_of_a_group_differ(model):
    rollouts = generate(model, TOKENIZER, ["abc", "abc"], n=8, max_new_tokens=12)
    assert len({tuple(t) for t in texts(rollouts)}) > 12  # two problems of one text differ too


def test_continuous_batching(model):
    """Waiting prompts take the places of rows that ended: never more than max_rows, full while
    somebody waits, each problem prefilled once, and far fewer steps than waves would take."""
    shapes, told = [], []
    forward = model.forward

    def spy(tokens, past):
        shapes.append((tokens.shape[0], tokens.shape[1] > 1))  # no prompt has one token here
        return forward(tokens, past)

    model.forward = spy
    try:
        rollouts = generate(model, TOKENIZER, ["a" + text for text in PROMPTS * 4], n=4,
                            max_new_tokens=30, max_rows=16, on_finish=told.append)
    finally:
        del model.forward
    decodes = [rows for rows, prefill in shapes if not prefill]
    assert max(decodes) <= 16
    # while somebody waits, about a quarter of the slots is free at worst
    last_prefill = max(i for i, (_, prefill) in enumerate(shapes) if prefill)
    busy = [rows for rows, prefill in shapes[:last_prefill] if not prefill]
    assert len(busy) > 20 and sum(busy) / len(busy) > 12
    # groups of 4 cut by the slots are prefilled anew: at most once more for each prefill
    prefills = [rows for rows, prefill in shapes if prefill]
    assert sum(prefills) <= len(PROMPTS) * 4 + len(prefills)
    # every row's tokens, and one more for its end, pass the model once; nothing else does
    needed = sum(len(r.response_tokens) - (not r.finished) for r in rollouts)
    assert sum(decodes) == needed
    assert sorted(map(id, told)) == sorted(map(id, rollouts)) and told != rollouts


def test_one_token_budget(model):
    rollouts = generate(model, TOKENIZER, PROMPTS, n=20, max_new_tokens=1)
    assert all(len(r.response_tokens) == 1 for r in rollouts)
    assert {r.finished for r in rollouts} == {True, False}


def test_degenerate_requests(model):
    assert generate(model, TOKENIZER, []) == []
    for bad in (dict(n=0), dict(max_new_tokens=0), dict(max_rows=0)):
        with pytest.raises(ValueError, match="at least 1"):
            generate(model, TOKENIZER, ["a"], **bad)


def test_an_empty_prompt_is_refused(model):
    """Its first token would be drawn from the hidden state of a longer neighbour's padding."""
    for call in (lambda: generate(model, TOKENIZER, [[5, 6], []]),
                 lambda: score(model, 3, [[5, 6], []], [[7], [7]])):  # fmt: skip
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            call()


def test_problems_longer_than_the_model_are_said_and_refused_where_absurd(model, capsys):
    longest = model.config.max_position_embeddings
    length = len(TOKENIZER.encode_prompt("a" * longest))
    fits = "a" * (2 * longest - length)  # a prompt is as long as its text and a constant
    check_prompts(model, TOKENIZER, ["a", fits])
    assert capsys.readouterr().err == ""
    check_prompts(model, TOKENIZER, ["a", fits + "a"])
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and said.count("\n") == 1
    assert all(word in said for word in ("problem 2", str(longest), str(longest + 1), "aa"))
    most = fits + "a" * (STRETCH - 1) * longest
    check_prompts(model, TOKENIZER, [most])
    with pytest.raises(ValueError, match=f"problem 1.*{STRETCH * longest + 1}.*aa"):
        check_prompts(model, TOKENIZER, [most + "a"])


def test_score_batches_change_nothing(model):
    rows = [([4 + i] * (1 + i % 5), [9] * (i % 4) + [1]) for i in range(9)]
    prompts, responses = map(list, zip(*rows))
    whole = score(model, 3, prompts, responses)
    assert score(model, 3, prompts, responses, batch_tokens=1) == pytest.approx(whole, abs=2e-5)
    expected = [all_logprobs(model, p + r)[-1, 3].item() for p, r in rows]
    assert whole == pytest.approx(expected, abs=2e-5)
    assert score(model, 3, [], []) == []
    # many tokens' log-probs at once, z_c's among them: the same, whatever shares a batch
    heard, ids = [], [7, 3, 39, 0]
    many = read_last(model, prompts, responses, ids, batch_tokens=20, on_read=heard.append)
    assert many.shape == (9, 4) and sum(heard) == 9
    assert many[:, 1].tolist() == pytest.approx(whole, abs=2e-5)
    expected = torch.stack([all_logprobs(model, p + r)[-1, ids] for p, r in rows])
    assert_close(many.double(), expected, atol=2e-5, rtol=0)


def test_pad():
    tokens, lengths = pad([[5, 6, 7], [8]])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]] and lengths.tolist() == [3, 1]


def test_rows_are_cut_by_tokens():
    """Every row once, neighbours in length together, no batch over the budget, none too small."""
    assert list(cut_by_tokens([3, 9, 4, 8], 20)) == [[1, 3], [2, 0]]  # as the docstring says
    assert list(cut_by_tokens([], 10)) == []
    lengths = torch.randint(1, 30, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    for budget in (1, 29, 100, 10**6):
        cuts = list(cut_by_tokens(lengths, budget))
        in_order = [i for rows in cuts for i in rows]
        assert in_order == sorted(range(50), key=lambda i: (-lengths[i], i))
        for rows, following in zip(cuts, [*cuts[1:], None]):
            longest = lengths[rows[0]]
            assert len(rows) == 1 or longest * len(rows) <= budget
            assert following is None or longest * (len(rows) + 1) > budget


# ---------------------------------------------------------------- frequencies


@torch.no_grad()
def frequencies(model, temperature, top_p, count=4000):
    """How often each token was drawn first, and how often it should be."""
    rollouts = generate(model, TOKENIZER, ["ab1"], n=count, max_new_tokens=1, seed=5,
                        temperature=temperature, top_p=top_p, max_rows=count)
    counts = torch.zeros(VOCAB)
    for r in rollouts:
        counts[r.response_tokens[0]] += 1
    logits = all_logprobs(model, TOKENIZER.encode_prompt("ab1"))[-1, :SIZE]
    probs = torch.softmax(logits / temperature, -1)
    ranked, order = probs.sort(descending=True)
    nucleus = order[: int((ranked.cumsum(0) < top_p).sum()) + 1] if top_p < 1 else order
    expected = torch.zeros(VOCAB, dtype=torch.float64)
    expected[nucleus] = probs[nucleus] / probs[nucleus].sum()
    return counts, expected


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8), (1.0, 0.3)])
def test_frequencies_pass_chi_square(temperature, top_p):
    """A fixed seed, so no flake; a wrong temperature or nucleus fails by hundreds of sigmas."""
    counts, expected = frequencies(random_model(std=0.15), temperature, top_p)
    assert not counts[expected == 0].any()
    common = expected * counts.sum() >= 5
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None])) * counts.sum()
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert len(wanted) > 2
    assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3


def test_ids_beyond_the_tokenizer_are_never_drawn():
    model = random_model(tie_word_embeddings=False)
    prompt = TOKENIZER.encode_prompt("abc")
    with torch.no_grad():  # padding rows of the matrix that would win every draw
        model.lm_head.weight[SIZE:] = 50 * model(torch.tensor([prompt]))[0, -1]
    for temperature in (0.0, 1.0):
        for r in generate(model, TOKENIZER, [prompt], n=50, max_new_tokens=1,
                          temperature=temperature):
            assert r.response_tokens[0] < SIZE


def test_tokens_of_probability_zero_are_never_drawn():
    """Uniforms at both ends of [0, 1), where rounding in fp32 could step over an edge."""
    u = torch.cat((torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53, 1 - 2.0**-30]),
                   torch.rand(2000, generator=torch.Generator().manual_seed(0)).double()))
    g = torch.Generator().manual_seed(1)
    for top_p in (1.0, 0.9):
        for _ in range(20):
            logits = torch.randn(1, 50, generator=g) * 3
            dead = torch.rand(1, 50, generator=g) < 0.4
            dead[0, [0, -1]] = True  # also the first and the last
            logits[dead] = -torch.inf
            tokens = sample_next(logits.expand(len(u), -1), u, 1.0, top_p)[0]
            assert not dead[0, tokens].any()


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    u = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    drawn = lambda p: set(sample_next(logits.expand(1000, -1), u, 1.0, p)[0].tolist())  # noqa: E731
    assert drawn(0.4) == {1} and drawn(0.6) == {1, 3} and drawn(0.8) == {1, 2, 3}
    assert drawn(1e-9) == {1} and drawn(0.95) == drawn(1.0) == {0, 1, 2, 3}


def test_sampling_inverts_the_cdf_exactly():
    probs = torch.tensor([0.125, 0.25, 0.5, 0.125])
    u = torch.tensor([0.0, 0.1249, 0.1251, 0.37, 0.38, 0.87, 0.88, 0.999], dtype=torch.float64)
    drawn = sample_next(probs.log().expand(8, -1), u, 1.0, 1.0)[0]
    assert drawn.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# ---------------------------------------------------------------- the dice


def test_uniforms_equal_whole_number_arithmetic():
    streams, steps = torch.tensor([0, 0, 1, 7, 10**6]), torch.tensor([0, 1, 0, 8191, 3])
    for seed in (0, 1, 123_456_789_012):
        pairs = zip(streams.tolist(), steps.tolist())
        expected = [plain.uniform(seed, stream, step) for stream, step in pairs]
        assert uniforms(seed, streams, steps).tolist() == expected


def test_uniforms_are_uniform_and_independent():
    rows, steps = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    u = uniforms(0, rows, steps)
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    assert len(u.unique()) == u.numel()
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    # neighbours in step, in row, along the diagonal, under the next seed: no correlation
    others = [u.roll(1, 1), u.roll(1, 0), u.roll((1, 1), (0, 1)), uniforms(1, rows, steps)]
    pairs = [(u, other) for other in others]
    pairs.append((u[rows > steps], u.T[rows > steps]))  # row and step do not change places
    for pair in pairs:
        r = torch.corrcoef(torch.stack([x.flatten() for x in pair]))[0, 1]
        assert abs(r) < 4.5 / math.sqrt(u.numel() / 2)
    # pairs of successive numbers fill the square evenly: 16 x 16 boxes
    boxes = (u[:, :-1] * 16).long() * 16 + (u[:, 1:] * 16).long()
    assert stats.chisquare(torch.bincount(boxes.flatten(), minlength=256).numpy()).pvalue > 1e-3
