"""model.py - Llama, Qwen2 and Qwen3 decoders in plain PyTorch. folder.py loads and saves them.

The decoder maps T tokens, laid end to end, to T hidden states. Only attention mixes tokens, so who attends
to whom is an argument, the *layout*: here `Packed`, groups of a prefix and the responses that share it, for
scoring and training; in sample.py the prompts and the single new tokens that a KV cache serves.

Parameters carry Hugging Face names, so loading is a strict load_state_dict and every checkpoint opens in
other tools. The model computes in the type of its matrices (`compute`): fp32, fp64, or bf16 with norms,
rotations and softmax in fp32. What differs from the paper: nothing; any decoder of these families will do.

Legend: T tokens, E hidden size, F feed-forward size, H query heads, G key/value heads, D head size,
        V vocabulary, N rows, m queries, n keys; P tokens of a prefix, R of a response.

    python -m pytest tests/test_model.py       compares it with transformers
"""

import functools
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fast
from config import Config
from fast import upcast


# ------------------------------------------------------------------------- rotary position embedding

def rotary_frequencies(config: Config, device: torch.device) -> Tensor:
    """The angle per position of each pair of channels, (D/2,) fp32."""
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequency = config.rope_theta ** -exponent  # (D/2,)
    if config.rope_llama3 is None:
        return frequency
    # Llama 3 slows long waves down: those with few turns over the original context (below `low`) are divided
    # by `factor`, those with many (above `high`) are kept, and those between are mixed.
    scaling = config.rope_llama3
    factor, original_length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original_length * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / factor


def rotary_tables(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, (T, 1, D) each: both halves of the channels share an angle."""
    frequency = rotary_frequencies(config, positions.device)  # (D/2,)
    angle = positions[:, None, None] * frequency  # (T, 1, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (T, 1, D)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, in fp32: channels i and i + D/2 are the coordinates of a point in the plane,
    which is turned by its token's angle. x (T, heads, D), cos and sin (T, 1, D) -> (T, heads, D)."""
    if fast.runs_triton(x):
        return fast.Rotation.apply(x, cos, sin)
    wide = upcast(x)
    a, b = wide.chunk(2, dim=-1)  # (T, heads, D/2) each
    quarter_turn = torch.cat((-b, a), dim=-1)  # (T, heads, D)
    turned = wide * cos + quarter_turn * sin
    return turned.to(x.dtype)


# ------------------------------------------------------------------------- attention over packed groups

@functools.lru_cache(maxsize=8)  # parts of one length use the same one in all layers
@torch.inference_mode(False)  # training could not use one that sampling has made
def causal_mask(m: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(m, n): 0 where one of the last m of n tokens may look, -inf at the tokens that come after it."""
    mask = torch.full((m, n), -math.inf, dtype=dtype, device=device)
    return mask.triu(n - m + 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention of the last m of n tokens: softmax(q k.T / sqrt(D)) v.

    q (H, m, D), k and v (G, n, D) -> (H, m, D). Scores and softmax are fp32 inside.
    """
    m, n = q.shape[1], k.shape[1]
    # fast.attention keeps scores in fp32. Above 2^20 of them their table takes too much memory;
    # scaled_dot_product_attention does not store it.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and m * n <= 2**20:
        return fast.attention(q, k, v, causal_mask(m, n, torch.float32, q.device))
    q, k, v = q[None], k[None], v[None]  # (1, heads, tokens, D)
    if m == n:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (1, H, m, D)
        return out.squeeze(0)
    # is_causal would let query i see the first i keys, but the queries are the last m tokens. CUDA flash
    # attention accepts no explicit mask; causal_lower_right is the one it recognises.
    if q.is_cuda:
        from torch.nn.attention.bias import causal_lower_right  # here, because it loads torch's compiler
        mask = causal_lower_right(m, n)
    else:
        mask = causal_mask(m, n, q.dtype, q.device)
    out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)  # (1, H, m, D)
    return out.squeeze(0)


class Layout(Protocol):
    """The tokens of a pass: where each stands, and which it attends to."""

    positions: Tensor  # (T,)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a layer: q (T, H, D), k and v (T, G, D) -> (T, H, D)."""


class Packed:
    """The layout of groups laid end to end: a prefix of P tokens, then the R_1..R_n tokens of n responses
    that all continue it. A prefix shared by all groups (the root) can be stored once, first.

    The root attends to itself, a prefix to the root and itself, each response to all three, causally: exactly
    what every root + prefix + response alone would see, with the root and the prefix computed once. A plain
    sequence is a group without responses. P and R count the tokens that are fed: a response's last token is
    predicted, not fed (losses.states_before).

    With shapes [(2, [2, 1])] the five tokens have positions 0 1 2 3 2 and see (x)

        prefix      x . . . .
                    x x . . .
        response 1  x x x . .
                    x x x x .
        response 2  x x . . x
    """

    def __init__(
        self,
        shapes: list[tuple[int, list[int]]],
        root: int = 0,
        past: int = 0,
        device: torch.device | str = "cpu",
    ):
        """shapes: (P, [R_1..R_n]) of each group; root: tokens before all of them; past: tokens before even
        those, whose keys and values `past_keys` knows."""
        self.past, self.device = past, device
        # Every root, prefix and response is a part; `parents` names the part that it continues, if any.
        self.lengths: list[int] = []
        self.parents: list[int | None] = []
        starts: list[int] = []

        def add(length: int, parent: int | None, start: int) -> int:
            self.lengths.append(length)
            self.parents.append(parent)
            starts.append(start)
            return len(starts) - 1

        root_part = add(root, None, past) if root else None
        for prefix, responses in shapes:
            prefix_part = add(prefix, root_part, past + root)
            for response in filter(None, responses):  # of a response of one token nothing is fed
                add(response, prefix_part, past + root + prefix)
        positions = [
            torch.arange(start, start + length)
            for start, length in zip(starts, self.lengths, strict=True)
        ]
        self.positions = fast.sent(torch.cat(positions), device)  # (T,)

    @functools.cached_property
    def seen_keys(self) -> fast.SeenKeys:
        """Which keys each part sees: looked up once a pass, by all layers."""
        return fast.SeenKeys.of(self.lengths, self.parents, self.past, self.device)

    def past_keys(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values (G, past, D) that all parts continue: none, unless sampling overrides this."""
        return None

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Called with the keys and values (T, G, D) of all parts: sampling keeps them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, D), k and v (T, G, D) -> (T, H, D): attention part by part; on a GPU all of it at once."""
        self.keep(layer, k, v)
        past = self.past_keys(layer)
        if not fast.runs_flash(q):
            return self.attend_by_parts(past, q, k, v)
        if past:
            past_k, past_v = past
            k = torch.cat((past_k.transpose(0, 1), k))  # (past + T, G, D)
            v = torch.cat((past_v.transpose(0, 1), v))  # (past + T, G, D)
        return fast.packed_attention(q, k, v, self.seen_keys)

    def attend_by_parts(self, past: tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What `attend` returns, in a loop. past: what `past_keys` returns."""
        parts = zip(*(x.transpose(0, 1).split(self.lengths, dim=1) for x in (q, k, v)), strict=True)
        # Part -> all keys and values that its continuations see; None stands for what precedes every part.
        seen: dict[int | None, tuple[Tensor, Tensor] | None] = {None: past}
        outputs = []
        for i, (part_q, part_k, part_v) in enumerate(parts):  # (H, R, D), (G, R, D), (G, R, D)
            if before := seen[self.parents[i]]:
                before_k, before_v = before
                part_k = torch.cat((before_k, part_k), dim=1)  # (G, n, D)
                part_v = torch.cat((before_v, part_v), dim=1)  # (G, n, D)
            if i in self.parents:
                seen[i] = part_k, part_v
            outputs.append(causal_attention(part_q, part_k, part_v))  # (H, R, D)
        out = torch.cat(outputs, dim=1)  # (H, T, D)
        return out.transpose(0, 1)  # (T, H, D)


# ------------------------------------------------------------------------- decoder

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return fast.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; who sees whom is the layout's business."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, head_dim
        self.q_proj = nn.Linear(size, heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, kv_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, size, bias=config.o_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, G, D)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        out = layout.attend(self.layer, q, k, v)  # (T, H, D)
        return self.o_proj(out.flatten(1))  # (T, E)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias)
        self.up_proj = nn.Linear(size, inner, bias)
        self.down_proj = nn.Linear(inner, size, bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = fast.swiglu(self.gate_proj(x), self.up_proj(x))  # (T, F)
        return self.down_proj(inner)  # (T, E)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, layout)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids -> final hidden states; `head` is the matrix that turns those into logits."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep only each block's input, and compute the rest again
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))  # fmt: skip
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """(V, E): the output matrix, which is the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def compute(self) -> torch.dtype:
        """The type of the matrices, in which products run and hidden states are returned."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        return self.head.device

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """ids (T,) -> final hidden states (T, E) in the compute type."""
        cos, sin = rotary_tables(layout.positions, self.config)  # (T, 1, D) each
        x = self.model.embed_tokens(ids)  # (T, E)
        for block in self.model.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no random state to bring back.
                x = checkpoint(block, x, cos, sin, layout, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, layout)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, E) -> (N, V) in fp32: for sampling. Training never holds these (losses.token_logps)."""
        return upcast(F.linear(hidden, self.head))
