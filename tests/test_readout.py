"""token_logprobs and loss_backward against log_softmax and gather in float64, in blocks that do
not divide."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from nanolaser import readout
from nanolaser.readout import loss_backward, token_logprobs

N, C, V = 23, 16, 101
# (rows of a block, rows of the output matrix widened at a time)
CHUNKS = [(2048, 8192), (23, 101), (5, 17), (1, 1), (7, 100), (22, 102)]


@pytest.fixture
def chunks(monkeypatch):
    def set_chunks(tokens, vocabulary, v=V):
        # not a multiple of v: the rows of a block are rounded down
        monkeypatch.setattr(readout, "BLOCK_LOGITS", tokens * v + v - 1)
        monkeypatch.setattr(readout, "CHUNK_VOCAB", vocabulary)

    return set_chunks


def inputs(seed=0, dtype=torch.float32, scale=1.0, n=N, c=C, v=V):
    """Hidden states, an output matrix, targets and one incoming gradient a target."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, c, generator=g).mul(scale).to(dtype).requires_grad_()
    weight = torch.randn(v, c, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    targets[:2] = torch.tensor([0, v - 1])  # both ends of the vocabulary
    return hidden, weight, targets, torch.randn(n, generator=g)


def reference(hidden, weight, targets, temperature=1.0):
    """The definition, in float64: (log-probs, entropies)."""
    T = torch.as_tensor(temperature, dtype=torch.float64).expand(targets.shape)
    logits = hidden.double() @ weight.double().T / T[..., None]
    table = torch.log_softmax(logits, -1)
    return table.gather(-1, targets[..., None])[..., 0], -(table.exp() * table).sum(-1)


def gradients(function, hidden, weight, targets, upstream, **options):
    """Value, gradient by hidden and by weight; leaves .grad as it found it."""
    h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    value = function(h, w, targets, **options)
    value = value[0] if isinstance(value, tuple) else value
    value.backward(upstream.to(value.dtype))
    return value.detach(), h.grad, w.grad


def fused(hidden, weight, targets, upstream, temperature=1.0):
    """What `gradients` gives, by way of loss_backward."""
    h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    value, _ = loss_backward(
        h, w, targets, lambda x, rows: (x * upstream[rows]).sum(), temperature=temperature
    )
    return value, h.grad, w.grad


@pytest.mark.parametrize("way", ["token_logprobs", "loss_backward"])
@pytest.mark.parametrize("tokens, vocabulary", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per row"])
def test_equals_float64_reference(chunks, way, tokens, vocabulary, temperature):
    chunks(tokens, vocabulary)
    case = inputs()
    T = torch.linspace(0.3, 2.0, N) if temperature == "per row" else temperature
    mine = fused if way == "loss_backward" else lambda *x, **o: gradients(token_logprobs, *x, **o)
    got = mine(*case, temperature=T)
    expected = gradients(reference, *case, temperature=T)
    for mine, theirs in zip(got, expected):
        assert mine.dtype == torch.float32
        assert_close(mine.double(), theirs.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens, vocabulary", [(4, 7), (2048, 8192)])
def test_gradcheck_in_float64(chunks, tokens, vocabulary):
    chunks(tokens, vocabulary, v=11)
    hidden, weight, targets, _ = inputs(dtype=torch.float64, n=6, c=4, v=11)
    T = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7, 1.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, T), (hidden, weight))


def test_extreme_logits_stay_exact(chunks):
    # logits of some thousands: exp() of any of them alone would overflow
    chunks(5, 17)
    hidden, weight, targets, upstream = inputs(scale=1000.0)
    got = gradients(token_logprobs, hidden, weight, targets, upstream)
    expected = gradients(reference, hidden, weight, targets, upstream)
    for mine, theirs in zip(got, expected):
        assert mine.isfinite().all()
        assert_close(mine.double(), theirs.double(), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("tokens, vocabulary", CHUNKS)
def test_entropy(chunks, tokens, vocabulary):
    chunks(tokens, vocabulary)
    hidden, weight, targets, _ = inputs()
    T = torch.linspace(0.3, 2.0, N)
    logprobs, entropy = loss_backward(hidden, weight, targets, lambda x, _: x.sum(), T)
    expected, expected_entropy = reference(hidden, weight, targets, T)
    assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)
    assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad and not logprobs.requires_grad


def test_entropy_of_the_uniform_distribution():
    zeros, targets = torch.zeros(3, C, requires_grad=True), torch.zeros(3, dtype=torch.long)
    logprobs, entropy = loss_backward(zeros, torch.randn(V, C), targets, lambda x, _: x.sum())
    assert_close(entropy, torch.full((3,), V).log())
    assert_close(logprobs, -entropy)


def test_a_loss_that_bends_is_differentiated_where_it_is(chunks):
    """Squares, clipped, with a factor of each target's own: no linear loss would notice if the
    derivative were taken at another block's log-probs, or twice."""
    chunks(5, 17)
    hidden, weight, targets, upstream = inputs()
    seen = []

    def loss(logprobs, rows):
        seen.append(rows)
        return (upstream[rows] * logprobs.clamp(min=-5) ** 2).sum()

    exact_h, exact_w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss(reference(exact_h, exact_w, targets)[0], slice(None)).backward()
    seen.clear()
    loss_backward(hidden, weight, targets, loss)
    assert_close(hidden.grad.double(), exact_h.grad, atol=1e-5, rtol=1e-5)
    assert_close(weight.grad.double(), exact_w.grad, atol=1e-5, rtol=1e-5)
    # the stretches follow each other and leave out nothing
    assert [i for rows in seen for i in range(N)[rows]] == list(range(N)) and len(seen) == 5


def test_bf16_inputs_are_summed_in_fp32(chunks):
    """Against float64 on the same bf16 numbers: a bf16 logit near 20 has a step of 0.125 nats,
    so agreement to 1e-4 shows that no logit was ever rounded to bf16."""
    chunks(5, 17)
    case = inputs(dtype=torch.bfloat16, scale=2.0)
    assert (case[0] @ case[1].T).abs().max() > 20
    value, by_hidden, by_weight = gradients(token_logprobs, *case)
    expected, expected_hidden, expected_weight = gradients(reference, *case)
    assert value.dtype == torch.float32
    assert_close(value.double(), expected, atol=1e-4, rtol=1e-5)
    # the gradients come back in bf16; hidden's is rounded once, weight's once a chunk of tokens
    assert by_hidden.dtype == by_weight.dtype == torch.bfloat16
    assert_close(by_hidden.double(), expected_hidden.double(), atol=1e-2, rtol=2**-7)
    assert_close(by_weight.double(), expected_weight.double(), atol=2e-2, rtol=2**-6)


def test_shapes_follow_the_targets():
    hidden, weight, targets, _ = inputs(n=12)
    flat = token_logprobs(hidden, weight, targets)
    grid = hidden.view(3, 4, C), weight, targets.view(3, 4)
    assert torch.equal(token_logprobs(*grid), flat.view(3, 4))
    rows = torch.tensor([0.5, 1.0, 2.0])[:, None]  # (B, 1): a temperature a row
    heated = token_logprobs(*grid, temperature=rows)
    expected, _ = reference(hidden, weight, targets, rows.expand(3, 4).reshape(-1))
    assert_close(heated.double().view(-1), expected, atol=1e-5, rtol=1e-5)
    assert token_logprobs(hidden[0], weight, targets[0]).shape == ()


def test_no_targets_is_fine():
    hidden, weight, targets, _ = inputs()
    logprobs = token_logprobs(hidden[:0], weight, targets[:0])
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and not weight.grad.any()
    logprobs, entropy = loss_backward(hidden[:0], weight, targets[:0], lambda x, _: x.sum())
    assert logprobs.shape == entropy.shape == (0,) and not weight.grad.any()


def test_shape_mismatch_is_refused():
    hidden, weight, targets, _ = inputs()
    with pytest.raises(AssertionError, match="hidden"):
        token_logprobs(hidden, weight, targets[:-1])


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_only_one_side_needs_a_gradient(which):
    hidden, weight, targets, upstream = inputs()
    _, by_hidden, by_weight = gradients(reference, hidden, weight, targets, upstream)
    leaf, expected = (hidden, by_hidden) if which == "hidden" else (weight, by_weight)
    other = weight if which == "hidden" else hidden
    other.requires_grad_(False)
    token_logprobs(hidden, weight, targets).backward(upstream)
    assert_close(leaf.grad, expected, atol=1e-5, rtol=1e-5)
    leaf.grad = None
    loss_backward(hidden, weight, targets, lambda x, rows: (x * upstream[rows]).sum())
    assert_close(leaf.grad, expected, atol=1e-5, rtol=1e-5)
    assert other.grad is None


@pytest.mark.parametrize("target", [-1, V])
def test_a_target_outside_the_vocabulary_is_refused(target):
    hidden, weight, targets, _ = inputs()
    targets[5] = target
    with pytest.raises(ValueError, match="vocabulary"):
        token_logprobs(hidden, weight, targets)
    with pytest.raises(ValueError, match="vocabulary"):
        loss_backward(hidden, weight, targets, lambda x, _: x.sum())


@pytest.mark.parametrize("tied", [False, True])
def test_accumulation_in_place_equals_autograds_sum(chunks, tied):
    """Three micro-batches added up in weight.grad against one pass over all of them; tied, the
    same matrix is also the embedding and gets a second gradient from autograd itself."""
    chunks(4, 13)
    _, weight, targets, upstream = inputs()
    mix = torch.randn(N, C, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(N) % 11

    def hidden_of(w, rows):
        return mix[rows].to(w.dtype) * (w[ids[rows]] if tied else 1.0)

    exact = weight.detach().double().requires_grad_()
    (reference(hidden_of(exact, slice(None)), exact, targets)[0] * upstream).sum().backward()
    buffer = None
    for rows in (slice(0, 9), slice(9, 10), slice(10, N)):
        t, u = targets[rows], upstream[rows]
        loss_backward(hidden_of(weight, rows), weight, t, lambda x, at: (x * u[at]).sum())
        buffer = weight.grad if buffer is None else buffer
    assert weight.grad is buffer
    assert_close(weight.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hook", "after", "not a leaf", "bf16"])
def test_a_gradient_that_somebody_waits_for_comes_by_autograd(kind):
    """In-place accumulation would pass by hooks, and by the graph behind a gathered matrix."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    hidden, leaf, targets, upstream = inputs(dtype=dtype)
    _, _, once = gradients(reference, hidden, leaf, targets, upstream)
    leaf.grad, seen = torch.ones_like(leaf), []
    if kind == "hook":
        leaf.register_hook(lambda g: seen.append(g.clone()))
    if kind == "after":
        leaf.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad - 1))
    weight = 2 * leaf if kind == "not a leaf" else leaf
    loss_backward(hidden, weight, targets, lambda x, at: (x * upstream[at]).sum())
    if kind == "not a leaf":
        _, _, once = gradients(reference, hidden, 2 * leaf, targets, upstream)
        once = 2 * once
    tolerance = dict(atol=2e-2, rtol=2**-6) if kind == "bf16" else dict(atol=1e-5, rtol=1e-5)
    assert leaf.grad.dtype == dtype
    assert_close(leaf.grad, once + 1, **tolerance)
    assert len(seen) == (kind in ("hook", "after"))
    for gradient in seen:
        assert_close(gradient, once, **tolerance)


# ---------------------------------------------------------------- memory


def peak_bytes(function):
    """The most memory that torch held at one time inside `function`, beyond what it held before:
    the running sum of the allocator's own reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        function()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0, "the profiler reported no allocation"
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_what_the_docstring_says(chunks, dtype):
    n, c, v, rows, vocabulary = 1024, 64, 4096, 96, 1024
    chunks(rows, vocabulary, v)
    hidden, weight, targets, upstream = inputs(dtype=dtype, n=n, c=c, v=v)
    weight.grad = torch.zeros_like(weight)
    block = 4 * rows * v + 4 * 3 * rows * c
    # the gradient in fp32, then rounded; two pieces widened, the old one and the new one
    narrow = 4 * v * c + 2 * v * c + 2 * 4 * vocabulary * c if dtype == torch.bfloat16 else 0
    # "a few numbers a token", and the hidden states' own gradient: fp32 sums, then in their dtype
    small, gradient = 64 * n, n * c * (4 + hidden.element_size())
    made = []

    def forward():
        made.append(token_logprobs(hidden, weight, targets).sum())

    def fused():
        loss_backward(hidden, weight, targets, lambda x, at: (x * upstream[at]).sum())

    ahead, both = peak_bytes(forward), peak_bytes(fused)
    assert 4 * rows * v < ahead <= block + narrow + small
    assert 4 * rows * v < both <= block + narrow + gradient + small
    # as a plain function it returns a gradient of its own: one more matrix
    back = peak_bytes(lambda: made[0].backward())
    assert back <= block + max(narrow, 4 * v * c) + gradient + small
    # beside it the table of logits that never was: (N, V) in fp32, once
    assert max(ahead, both, back) < 4 * n * v / 4


# ---------------------------------------------------------------- products of bf16 numbers


def test_bf16_products_of_a_gpu_are_as_good_as_widening(monkeypatch):
    """With stand-ins for the GPU's products, which take bf16 and nothing else and sum in fp32: the
    log-probs are the same, gradients are off by less than the 0.4 % of rounding them to bf16, and
    no weight is ever widened."""
    g = torch.Generator().manual_seed(0)
    N, C, V = 37, 64, 500
    make = lambda *shape: torch.randn(*shape, generator=g).bfloat16()  # noqa: E731
    hidden, weight = make(N, C), make(V, C) / 4
    targets = torch.randint(V, (N,), generator=g)
    temperature = torch.where(torch.arange(N) % 2 == 0, 1.0, 0.7)
    scale = torch.randn(N, generator=g)

    def learn():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = readout.loss_backward(
            h, w, targets, lambda x, rows: (x * scale[rows]).sum(), temperature)
        w_there = w.detach() if readout.mixed(w) else w.detach().float()
        sampled = readout.logits_of(h.detach(), w_there)
        return logprobs, entropy, h.grad.float(), w.grad.float(), sampled

    expected = learn()[:4] + (hidden.float() @ weight.float().T,)
    mm, addmm = torch.mm, torch.addmm
    narrow = lambda *x: [y.float() for y in x if y.dtype == torch.bfloat16]  # noqa: E731

    def gpu_mm(a, b, out_dtype, out=None):
        result = mm(*narrow(a, b))
        return result if out is None else out.copy_(result)

    def gpu_addmm(total, a, b, out_dtype, alpha, out):
        return out.copy_(addmm(total, *narrow(a, b), alpha=alpha))

    monkeypatch.setattr(readout, "mixed", lambda weight: True)
    monkeypatch.setattr(readout, "_widened", None)
    monkeypatch.setattr(torch, "mm", gpu_mm)
    monkeypatch.setattr(torch, "addmm", gpu_addmm)
    monkeypatch.setattr(readout, "BLOCK_LOGITS", 10 * V)
    found = learn()
    bounds = (1e-5, 2e-3, 4e-3, 4e-3, 1e-5)
    for a, b, bound in zip(found, expected, bounds):
        assert (a - b).norm() < bound * b.norm()
