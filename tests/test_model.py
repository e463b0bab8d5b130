"""The decoder against transformers', over the grid of what a config may say; cached decoding."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from nanolaser.checkpoint import config_from_hf, config_to_hf, load_pretrained, save_pretrained
from nanolaser.cache import KVCache
from nanolaser.model import CausalLM, ModelConfig, inverse_frequencies
from nanolaser.tiny.__main__ import init_weights
from nanolaser.tokenizer import Tokenizer

from .conftest import TINY, write_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    # so short that the test's texts are far beyond it: on short texts unscaled rope looks right
    "original_max_position_embeddings": 16,
}  # fmt: skip
# Qwen2 has its q, k, v biases always; LLaMA's switches are attention_bias and mlp_bias, Qwen3's the
# first of them.
FAMILIES = [("qwen2", False), ("qwen3", False), ("qwen3", True), ("llama", False), ("llama", True)]
QWEN3 = {"model_type": "qwen3", "attention_bias": False, "qk_norm": True}
NO_YES = [False, True]
GRID = list(itertools.product(FAMILIES, NO_YES, [None, 24], NO_YES, NO_YES, NO_YES))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def reference_model(transformers, kind, bias, tied, head_dim, llama3):
    """A random transformers model; every parameter random, the biases and norms too."""
    config_class = getattr(transformers, f"{kind.capitalize()}Config")
    shape = {k: v for k, v in TINY.items() if k.startswith(("num_", "vocab_", "hidden_", "inter"))}
    rope = {"rope_theta": 500.0, **(LLAMA3 if llama3 else {"rope_type": "default"})}
    more = {"head_dim": head_dim} if head_dim else {}
    if kind != "qwen2":
        more["attention_bias"] = bias
    if kind == "llama":
        more["mlp_bias"] = bias
    config = config_class(
        **shape, **more, tie_word_embeddings=tied, rope_parameters=rope, rms_norm_eps=1e-5,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=258, pad_token_id=None,
    )  # fmt: skip
    with torch.device("cpu"):
        model = getattr(transformers, f"{kind.capitalize()}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.dim() == 2 else 0.5, 0.2, generator=generator)
    return model


def to_old_dialect(path) -> None:
    """Rewrite a config.json of transformers 5 as transformers 4 wrote it."""
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    llama3 = rope["rope_type"] == "llama3"
    raw["rope_scaling"] = rope if llama3 else None
    raw["torch_dtype"] = raw.pop("dtype", "float32")
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("cell", GRID, ids=str)
def test_logits_equal_those_of_transformers(tmp_path, transformers, cell):
    family, tied, head_dim, llama3, many, old = cell
    theirs = reference_model(transformers, *family, tied, head_dim, llama3)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if many else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == many
    if old:
        to_old_dialect(tmp_path / "config.json")
    write_tokenizer(tmp_path)
    ours, _ = load_pretrained(tmp_path)
    tokens = torch.randint(0, 272, (2, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
        logits = ours(tokens) @ ours.lm_head_weight.T
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    # and the cell is no trifle: attention and rope do change the numbers
    assert expected.std() > 0.1


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_inverse_frequencies_equal_those_of_transformers(transformers, factor):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # the numbers of Llama 3.1 and 3.2
    rope = {**LLAMA3, "factor": factor, "original_max_position_embeddings": 8192}
    theirs = transformers.LlamaConfig(
        hidden_size=2048, num_attention_heads=32, rope_parameters={"rope_theta": 5e5, **rope}
    )
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    ours = ModelConfig(**{**TINY, "head_dim": 64, "rope_theta": 5e5, "rope_scaling": rope})
    torch.testing.assert_close(inverse_frequencies(ours), expected, rtol=1e-6, atol=0)
    assert scale == 1.0


@pytest.mark.parametrize("changes", [
    {},
    {"tie_word_embeddings": False},
    {"model_type": "llama", "attention_bias": False, "rope_scaling": LLAMA3},
    {"model_type": "llama", "attention_output_bias": True, "mlp_bias": True, "head_dim": 16},
    {**QWEN3, "head_dim": 16}, {**QWEN3, "tie_word_embeddings": False},
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_we_save(tmp_path, transformers, changes, dtype):
    model = init_weights(CausalLM(ModelConfig(**{**TINY, **changes})), 3).to(getattr(torch, dtype))
    write_tokenizer(tmp_path / "t")
    tokenizer = Tokenizer.from_folder(tmp_path / "t")
    save_pretrained(model, tokenizer, tmp_path / "m")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True, dtype="auto"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.dtype == model.dtype  # read from config.json
    tokens = torch.arange(40)[None] * 5 % TINY["vocab_size"]
    with torch.no_grad():
        expected = theirs.float().eval()(tokens).logits
        ours = model.float()
        logits = ours(tokens) @ ours.lm_head_weight.T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert theirs.generation_config.eos_token_id == [258, 256]


# ---------------------------------------------------------------------------------------------
# cache and padding: position by position what the plain forward pass gives


@pytest.mark.parametrize("changes", [
    {}, {"model_type": "llama", "attention_bias": False, "rope_scaling": LLAMA3},
    {**QWEN3, "head_dim": 12},
], ids=["qwen2", "llama", "qwen3"])  # fmt: skip
def test_cached_decoding_of_unequal_prompts_equals_the_full_forward(changes):
    model = init_weights(CausalLM(ModelConfig(**{**TINY, **changes})), 4)
    generator = torch.Generator().manual_seed(5)
    lengths, steps = [3, 60, 9, 70], 12
    rows = [torch.randint(0, 272, (n + steps,), generator=generator) for n in lengths]
    c = model.config
    cache = KVCache(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, longest=200)
    prompts = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, (row, n) in enumerate(zip(rows, lengths)):
        prompts[i, :n] = row[:n]
    with torch.no_grad():
        model(prompts, cache.admit([0, 1, 2, 3], [0, 1, 2, 3], lengths))
        for step in range(steps):
            assert cache.reserve()
            order = cache.running  # by length, not by number
            newest = torch.stack([rows[i][lengths[i] + step] for i in order])[:, None]
            hidden = model(newest, cache.decode())[:, 0]
            for i, state in zip(order, hidden):
                alone = model(rows[i][None, : lengths[i] + step + 1])[0, -1]
                torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-5)
    # one began beyond the shortest rows, one moved on to longer ones, two never left them
    assert set(cache.running[:2]) == {0, 2}


def test_what_lies_in_the_padding_changes_nothing(tiny):
    model, _ = tiny
    tokens = torch.arange(24).reshape(2, 12)
    other = tokens.clone()
    other[0, 7:] = 99
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0, :7], model(other)[0, :7], rtol=0, atol=0)


def test_gradient_checkpointing_changes_no_gradient(tiny):
    model, _ = tiny
    tokens = torch.arange(20)[None]
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(tokens).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain)


# ---------------------------------------------------------------------------------------------
# what is refused, by name


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "'mixtral'"),
    ({"model_type": "qwen2_moe"}, "'qwen2_moe'"),
    ({"model_type": None}, "model_type None"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"use_sliding_window": True, "sliding_window": 64}, "sliding-window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ({"rope_parameters": {**LLAMA3, "factor": None}}, "factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rot"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ({"hidden_size": None}, "hidden_size"),
    ({"vocab_size": "many"}, "vocab_size"),
    ({"num_attention_heads": 3, "head_dim": None}, "heads"),
    ({"head_dim": 7}, "head_dim"),
    # sizes with which the arithmetic of sizes fails, and values of no sense
    ({"hidden_size": 2**62}, "hidden_size"), ({"vocab_size": 2**62}, "vocab_size"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"), ({"head_dim": 2**62}, "head_dim"),
    ({"num_attention_heads": 2**62}, "num_attention_heads"), ({"hidden_size": True}, "hidden_"),
    ({"max_position_embeddings": 2**62}, "max_position_embeddings"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"), ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ({"rope_parameters": [1]}, "rope"), ({"rope_theta": "x", "rope_parameters": None}, "rope"),
    ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"model_type": ["x"], "architectures": 5}, "model_"), ({"layer_types": 5}, "layer_types"),
])  # fmt: skip
def test_configurations_that_are_refused(changes, message):
    raw = config_to_hf(ModelConfig(**TINY))
    with pytest.raises(ValueError, match=message) as error:
        config_from_hf({**raw, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    # Qwen2.5 as published: a window is named, and switched off
    {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
    {"layer_types": ["full_attention"] * 2, "sliding_window": None},
    {"rope_scaling": None, "rope_parameters": None},
])  # fmt: skip
def test_configurations_that_only_look_odd(changes):
    raw = config_to_hf(ModelConfig(**TINY))
    assert config_from_hf({**raw, **changes}) == ModelConfig(**TINY)


def test_a_configuration_survives_both_directions():
    several = {"eos_token_id": (1, 2), "bos_token_id": 3}
    for changes in ({}, QWEN3, {"rope_scaling": LLAMA3}, several):
        config = ModelConfig(**{**TINY, **changes})
        assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_a_head_of_qwen3_has_128_numbers_where_its_config_does_not_say():
    raw = config_to_hf(ModelConfig(**{**TINY, **QWEN3}))
    del raw["head_dim"]
    assert config_from_hf(raw).head_dim == 128
