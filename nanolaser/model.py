"""
The language model: a Qwen2, Qwen3 or LLaMA decoder whose parameters carry Hugging Face's own
names, so that a checkpoint is loaded by name, strictly, with no table of renamings in between.

    hidden = model(input_ids)                  # (B, T) -> (B, T, C), after the final norm
    logits = hidden @ model.lm_head_weight.T   # only where somebody needs them: see readout.py

It returns hidden states, not logits: with a vocabulary of 152,064 the logits of a batch would be
by far its largest tensor, and nobody needs all of them.

Shapes, in the one alphabet that every file here uses:
    B rows          T tokens            C hidden size     L layers
    H query heads   K key-value heads   D head size       V vocabulary   S cached tokens

Rows are padded on the RIGHT.  A causal model never looks right, so padding cannot change a real
token: no padding mask, no position arithmetic, nothing to get wrong (left padding needs both).
In  12 7 5 9 / 8 6 _ _  hidden[1, 1] has seen 8 6, and hidden[1, 2:] is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, under the names of Hugging Face's config.json (see checkpoint.py)."""

    model_type: str  # "qwen2", "qwen3" or "llama"
    vocab_size: int  # V; may exceed the tokenizer's size (Qwen2.5-7B pads it to 152,064)
    hidden_size: int  # C
    intermediate_size: int  # width of the SwiGLU
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K; each is shared by H/K query heads (grouped-query attention)
    head_dim: int  # D; usually C/H, but checkpoints may say otherwise
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # None, or Llama 3's: see `inverse_frequencies`
    max_position_embeddings: int = 2048  # what it was trained on; no limit
    tie_word_embeddings: bool = False  # the output matrix IS the embedding matrix
    attention_bias: bool = False  # biases on q, k and v
    attention_output_bias: bool = False  # bias on o (LLaMA's attention_bias has it, Qwen2 not)
    qk_norm: bool = False  # Qwen3: a norm over each head's query and key
    mlp_bias: bool = False
    initializer_range: float = 0.02
    eos_token_id: tuple[int, ...] = ()  # config.json may name one or several
    bos_token_id: int | None = None


# ---------------------------------------------------------------------------------------------
# rotary position embedding: where a token stands is told by turning its queries and keys


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """(D/2,) fp32 angular frequencies in radians per token, Llama 3's rescaling applied."""
    # From 1 radian a token (neighbours are told apart) down to about 1 / rope_theta (a whole book
    # is half a turn): theta ** (-2i / D) for i = 0 to D/2 - 1.
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    inv_freq = 1.0 / config.rope_theta ** (even / config.head_dim)
    if config.rope_scaling is None:
        return inv_freq
    # Llama 3.1+: a context longer than in pre-training, by slowing the slow waves only.  Those that
    # turn often within the old context stay; those that never complete a turn in it are stretched
    # by `factor`; between the two bounds a linear blend.
    s = config.rope_scaling
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = s["original_max_position_embeddings"] * inv_freq / (2 * torch.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretch fully, 1: leave alone
    return inv_freq * (blend + (1 - blend) / s["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x (B, heads, T, D) by its token's angles, see `_rope`."""
    # The textbook, with a and b the two halves of a head (Hugging Face pairs halves, not
    # neighbours, and the weights assume it):
    #     torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    # Rolling by half a head puts each number's partner in its place: two products, one sum.
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


# ---------------------------------------------------------------------------------------------
# the decoder, from its smallest part to the whole


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, the mean square taken in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # The textbook: x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight.  In fp32: a
        # bf16 mean over thousands of squares would lose the very digits that normalise.
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal grouped-query attention: H query heads share K key-value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        if H % K:
            raise ValueError(f"config.json: {H} query heads cannot share {K} key-value heads")
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_output_bias)
        # Qwen3 brings every query and key to one length before they meet: q . k can then not grow
        # with the weights, and softmax keeps its slope.  One weight of D numbers for all heads.
        self.q_norm, self.k_norm = (
            RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"
        )

    def forward(self, x: Tensor, rope, past, layer: int) -> Tensor:
        """(B, T, C) -> (B, T, C), over the T tokens alone or over those in a KV cache too."""
        B, T, _ = x.shape
        heads = lambda y: y.view(B, T, -1, self.head_dim)  # noqa: E731  side by side -> apart
        q = rotate(self.q_norm(heads(self.q_proj(x))).transpose(1, 2), *rope)  # (B, H, T, D)
        k = rotate(self.k_norm(heads(self.k_proj(x))).transpose(1, 2), *rope)  # (B, K, T, D)
        v = heads(self.v_proj(x)).transpose(1, 2)  # (B, K, T, D)
        if past is not None:
            y = past.attend(layer, q, k, v)
        else:
            # The textbook, each key-value head repeated for the H/K query heads that share it:
            #     scores = q @ k.mT / D**0.5                              # (B, H, T, T)
            #     scores = scores.masked_fill(ones(T, T).triu(1), -inf)   # nobody looks right
            #     y = scores.softmax(-1) @ v                              # (B, H, T, D)
            # Neither scores nor repeated heads exist here: a fast kernel skips what lies right.
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # heads side by side again


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(C, width, bias=bias)
        self.up_proj = nn.Linear(C, width, bias=bias)
        self.down_proj = nn.Linear(width, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm residual block: attention, then MLP, each added to the stream x."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope, past, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, past, layer)  # tokens exchange
        return x + self.mlp(self.post_attention_layernorm(x))  # each token thinks by itself


class Decoder(nn.Module):
    """Embedding, layers, final norm: what Hugging Face calls `model` inside the language model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """The language model; state_dict() has exactly the names of a Hugging Face checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # With LoRA, what z_c's row of the frozen output matrix has learned (1, C): see lora.py.
        self.register_parameter("z_c_row", None)
        # Recompute each layer in the backward pass instead of keeping its activations: a third more
        # arithmetic for memory that no longer grows with the number of layers.
        self.gradient_checkpointing = False
        # In fp32 whatever the model's dtype: bf16 cannot tell position 4096 from 4100.
        self._inv_freq: Tensor | None = None

    @property
    def lm_head_weight(self) -> Tensor:
        """The (V, C) output matrix, tied to the embedding or not."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the forward pass computes in."""
        return self.model.norm.weight.dtype

    def forward(self, input_ids: Tensor, past=None) -> Tensor:
        """(B, T) token ids, padded on the right -> (B, T, C) hidden states after the final norm.

        `past` says what the tokens look at besides their own row: a KVCache's `admit(...)`, which
        the rows fill, or its `decode()`, where each goes on by one token (cache.py has an example);
        or a Packing, one row of many texts that share their prompts (packing.py).
        """
        # 1. Where does each token stand in its text?
        positions = None if past is None else past.positions  # (B, 1) when decoding
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
        # 2. Every token id becomes a vector: the residual stream ...
        x = self.model.embed_tokens(input_ids)  # (B, T, C)
        rope = self._rope(positions, x.dtype)  # for all layers
        # 3. ... to which each layer adds what it found out.
        for i, layer in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, past, i, use_reentrant=False)
            else:
                x = layer(x, rope, past, i)
        # 4. The hidden state of token t is what the model expects after it.
        return self.model.norm(x)

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, D) of every token's angles, computed in fp32; see `rotate`."""
        if self._inv_freq is None or self._inv_freq.device != positions.device:
            self._inv_freq = inverse_frequencies(self.config).to(positions.device)
        angles = positions[..., None].float() * self._inv_freq  # (B, T, D/2)
        # Both halves of a head turn by the same angle; the first one backwards, which changes the
        # sign of sin, as `rotate` wants it, and not cos.
        angles = torch.cat((-angles, angles), dim=-1)[:, None]  # (B, 1, T, D)
        return angles.cos().to(dtype), angles.sin().to(dtype)
