"""model.py - Llama, Qwen2 and Qwen3 decoders in one file, loaded from and saved to Hugging Face folders.

The decoder never sees a batch. It maps a flat list of T tokens to T hidden states, token by token; only
attention mixes tokens, and who attends to whom is an argument, the *layout*:
    Packed   groups laid end to end, each a prefix and the responses that share it: scoring, training, prefill
    Cache    one new token for each of S slots, whose past keys and values the cache holds: sampling
Parameters carry Hugging Face names, so loading is a strict load_state_dict and every checkpoint opens
elsewhere. Weights are kept in `dtype` (fp32 masters for training), cast to `compute` where they are used;
norms, rotary tables and rotations run in fp32.

Legend: T packed tokens, E hidden size, F feed-forward size, H query heads, G key/value heads, D head size,
        V vocabulary, S cache slots, L cache length.

    python model.py DIR        prints the configuration and the parameter count, once every weight has loaded
"""

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from run import UserError, main, rank, read_json, write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "vocab.json", "merges.txt")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors",
               "model.safetensors.index.json", *TOKENIZER_FILES)


# -------------------------------------------------------------------------------- config

@dataclass(frozen=True)
class Config:
    """The parts of a Hugging Face config.json that shape the computation; `raw` is the file, for saving."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_llama3: dict | None  # factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    raw: dict

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> "Config":
        """Read both spellings in use (rope_scaling / rope_parameters); name whatever is not supported.

        Raises UserError for another model_type, rope type or activation, for quantised weights, and for a
        sliding window that is switched on.
        """

        def unsupported(what: str) -> UserError:
            return UserError(f"{where}: {what} is not supported (see the docstring of model.py)")

        kind = raw.get("model_type")
        if kind not in ("llama", "qwen2", "qwen3"):
            raise unsupported(f"model_type {kind!r} (llama, qwen2 and qwen3 are)")
        if raw.get("hidden_act", "silu") != "silu":
            raise unsupported(f"hidden_act {raw['hidden_act']!r} (silu is)")
        if raw.get("quantization_config"):
            raise unsupported("quantization_config")
        layer_types = raw.get("layer_types") or []
        window = raw.get("sliding_window", 4096)  # transformers' default where the key is absent
        if (raw.get("use_sliding_window") and window) or "sliding_attention" in layer_types:
            raise unsupported(f"a sliding window in use (sliding_window {window})")

        # transformers 5 writes {"rope_parameters": {"rope_type", "rope_theta", ...}}; before, the scaling
        # stood in rope_scaling (null for none, its kind under "rope_type" or "type") and rope_theta beside
        # it.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise unsupported(f"rope type {rope_type!r} (default and llama3 are)")
        if raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
            raise unsupported("partial_rotary_factor")
        try:
            heads = raw["num_attention_heads"]
            return cls(
                model_type=kind,
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or (128 if kind == "qwen3" else raw["hidden_size"] // heads),
                rms_norm_eps=raw["rms_norm_eps"],
                rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
                rope_llama3={k: rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor",
                                                  "original_max_position_embeddings")}
                if rope_type == "llama3" else None,
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                qkv_bias=kind == "qwen2" or raw.get("attention_bias", False),  # Qwen2: always
                o_bias=kind != "qwen2" and raw.get("attention_bias", False),
                mlp_bias=kind == "llama" and raw.get("mlp_bias", False),
                qk_norm=kind == "qwen3",
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
                raw=raw,
            )
        except KeyError as e:
            raise UserError(f"{where}: {e.args[0]!r} is missing") from None


# -------------------------------------------------------------------------------- rotary

def upcast(x: Tensor) -> Tensor:
    """fp32, or fp64 where x already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotary_frequencies(config: Config, device: torch.device) -> Tensor:
    """Angle per position of each pair of channels, (D/2,) fp32; llama3 scaling slows long waves down."""
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequency = config.rope_theta ** -exponent  # (D/2,)
    if config.rope_llama3 is None:
        return frequency
    factor, low, high, original = config.rope_llama3.values()
    # turns over the original context: few (below `low`) are divided by factor, many (above `high`) kept,
    # between mixed
    turns = original * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / factor


class _Rotate(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin); its gradient is the opposite rotation, for which nothing of
    the tokens is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = upcast(x)
        return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (T, heads, D), channel i paired with i + D/2.

    cos and sin (T, 1, D), the first half of sin negated.
    """
    return _Rotate.apply(x, cos, sin)


# -------------------------------------------------------------------------------- layouts

class _Attention(torch.autograd.Function):
    """softmax(q k' / sqrt(D) + bias) v spelled out, and its gradient: with o the output,
    d v = p' d o,   d s = p * (d o v' - rowsum(d o * o)),   d q = d s k,   d k = d s' q.

    Products run in the type of q, the softmax and its gradient in fp32 inside; of the (m, n) tables only p is
    kept.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        (groups, n, size), m = k.shape, q.shape[1]
        rows = q.reshape(groups, -1, size) * size**-0.5  # (G, H/G * m, D): heads that share a key become rows
        scores = (rows @ k.transpose(1, 2)).view(-1, m, n).add_(bias)  # (H, m, n)
        p = scores.softmax(-1).view(groups, -1, n)  # (G, H/G * m, n)
        out = p @ v  # (G, H/G * m, D)
        ctx.save_for_backward(rows, k, v, p, out)
        return out.view(-1, m, size)  # (H, m, D)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, k, v, p, out = ctx.saved_tensors
        g = grad.reshape(rows.shape)  # (G, H/G * m, D)
        mean = (upcast(g) * out).sum(-1, keepdim=True)  # (G, H/G * m, 1)
        d_s = (g @ v.transpose(1, 2) - mean).mul_(p).to(p.dtype)  # (G, H/G * m, n)
        d_q = (d_s @ k * k.shape[-1] ** -0.5).view(grad.shape)  # (H, m, D)
        return d_q, d_s.transpose(1, 2) @ rows, p.transpose(1, 2) @ g, None


def attention(q: Tensor, k: Tensor, v: Tensor, biases: dict[tuple[int, int], Tensor]) -> Tensor:
    """Causal grouped-query attention: q (H, m, D) of the last m tokens, k and v (G, n, D) of all n ->
    (H, m, D). biases: the tables (m, n) made so far, 0 where a row may look and -inf where not."""
    m, n = q.shape[1], k.shape[1]
    # Spelled out, the products run as bf16 matrix products: 2.5 times as fast as the CPU's flash kernel,
    # forward and backward. Beyond 1,024 x 1,024 the tables would cost too much memory.
    spelled_out = q.device.type == "cpu" and q.dtype == torch.bfloat16 and m * n <= 2**20
    if m == n and not spelled_out:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    if (m, n) not in biases:  # a GPU's flash attention takes no tables, but knows this one by its name
        biases[m, n] = causal_lower_right(m, n) if q.is_cuda else torch.full(
            (m, n), -math.inf, dtype=q.dtype, device=q.device).triu(n - m + 1)
    if spelled_out:
        return _Attention.apply(q, k, v, biases[m, n])
    return F.scaled_dot_product_attention(q[None], k[None], v[None], biases[m, n], enable_gqa=True)[0]


class Packed:
    """Groups laid end to end: a prefix of P tokens, then n responses of R_1..R_n tokens that all continue it.
    What all prefixes begin with may stand once before them, as their root.

    The root attends to itself, a prefix to the root and itself, each response to all three, causally: exactly
    what every root + prefix + response alone would see, with the root and the prefix computed once. A plain
    sequence is a group without responses.

    With shapes [(2, [2, 1])] the five tokens have positions 0 1 2 3 2 and see (x)

        prefix      x . . . .
                    x x . . .
        response 1  x x x . .
                    x x x x .
        response 2  x x . . x
    """

    def __init__(self, shapes: list[tuple[int, list[int]]], device: torch.device | str = "cpu",
                 cache: "Cache | None" = None, slots: list[list[int] | None] = (), root: int = 0):
        """shapes: (P, [R_1..R_n]) a group; root: tokens before all of them. With a cache all that continues
        the cache's root, and slots says where each group, a plain sequence, is also written: into some slots,
        or, None, as the cache's root itself.
        """
        self.cache, self.slots = cache, [*[[]] * bool(root), *slots]
        self.past = cache.shared if cache else 0
        parts = [(root, None, self.past)] if root else []  # (length, which part it continues, first position)
        for prefix, responses in shapes:
            here, start = len(parts), self.past + root
            parts.append((prefix, 0 if root else None, start))
            parts += [(n, here, start + prefix) for n in responses if n]
        self.lengths, self.parents, starts = map(list, zip(*parts, strict=True))
        positions = [torch.arange(s, s + n) for n, s in zip(self.lengths, starts, strict=True)]
        self.positions = torch.cat(positions).to(device)  # (T,)
        self.biases: dict[tuple[int, int], Tensor] = {}

    def begin(self, n: int) -> Tensor:
        """Positions of the n tokens, (T,)."""
        return self.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, D), k and v (T, G, D) -> (T, H, D)."""
        out = []
        seen = {None: self.cache.root[layer]} if self.past else {}  # part -> all its keys and values
        parts = zip(*(x.transpose(0, 1).split(self.lengths, dim=1) for x in (q, k, v)), strict=True)
        for i, (qi, ki, vi) in enumerate(parts):  # (H, n, D) and twice (G, n, D)
            if self.parents[i] in seen:
                before_k, before_v = seen[self.parents[i]]
                ki, vi = torch.cat((before_k, ki), 1), torch.cat((before_v, vi), 1)  # (G, start + n, D)
            if self.cache:
                self.cache.write(layer, self.slots[i], ki, vi)
            if i in self.parents:
                seen[i] = ki, vi
            out.append(attention(qi, ki, vi, self.biases))  # (H, n, D)
        return torch.cat(out, 1).transpose(0, 1)  # (T, H, D)


class Cache:
    """Static keys and values of S slots with room for L tokens each, which all continue one root of A tokens
    that is kept once (A may be 0); as a layout, one new token for each of the first n slots.

    `lengths` (S,) says how many tokens each slot holds after the root: the new token lands there, sees the
    root and 0..lengths, and the caller adds one when it moves on. A slot is reused by writing over it: what
    it sees follows its length. Every product reads all L places: slices of them would be copied first, which
    costs more. Values are kept transposed: each product then reads along the dimension it sums over.
    """

    def __init__(self, config: Config, slots: int, length: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu"):
        size, made = config.head_dim, dict(dtype=dtype, device=device)
        shape = (slots, config.num_key_value_heads)
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(*shape, length, size, **made) for _ in layers]  # (S, G, L, D) a layer
        self.v = [torch.zeros(*shape, size, length, **made) for _ in layers]  # (S, G, D, L) a layer
        self.root: list[tuple[Tensor, Tensor]] = []  # (G, A, D) and (G, A, D) a layer, once there is one
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)  # (S,)
        self.rows = torch.arange(slots, device=device)
        self.bias: Tensor | None = None

    @property
    def shared(self) -> int:
        """A, the tokens of the root."""
        return self.root[0][0].shape[1] if self.root else 0

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy what some slots hold into others."""
        for x in (*self.k, *self.v, self.lengths):
            x[target] = x[source]

    def write(self, layer: int, slots: list[int] | None, k: Tensor, v: Tensor) -> None:
        """Store keys and values (G, A + n, D) of a sequence: what follows the root in every slot named, or,
        None, all of it as the root."""
        if slots is None:
            self.root.append((k.contiguous(), v.contiguous()))
        elif slots:
            n = k.shape[1] - self.shared
            self.k[layer][slots, :, :n] = k[:, self.shared :]
            self.v[layer][slots, :, :, :n] = v[:, self.shared :].transpose(1, 2)

    def begin(self, n: int) -> Tensor:
        """Positions of the first n slots' new tokens, (n,)."""
        columns = torch.arange(self.v[0].shape[-1], device=self.rows.device)  # (L,)
        hidden = (columns > self.lengths[:n, None])[:, None, None]  # (n, 1, 1, L)
        self.bias = torch.zeros_like(hidden, dtype=self.v[0].dtype).masked_fill_(hidden, -math.inf)
        return self.lengths[:n] + self.shared

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (n, H, D), k and v (n, G, D), the new token's -> (n, H, D)."""
        (n, heads, size), groups = q.shape, k.shape[1]
        self.k[layer][self.rows[:n], :, self.lengths[:n]] = k
        self.v[layer][self.rows[:n], :, :, self.lengths[:n]] = v
        # the H/G query heads that share a key/value head become its query rows: nothing is repeated
        q = q.view(n, groups, -1, size) * size**-0.5  # (n, G, H/G, D)
        scores = (q @ self.k[layer][:n].transpose(2, 3)).add_(self.bias)  # (n, G, H/G, L)
        if not self.root:
            return (scores.softmax(-1) @ self.v[layer][:n].transpose(2, 3)).view(n, heads, size)  # (n, H, D)
        # and those of all slots become rows of the root's, which is read once
        root_k, root_v = self.root[layer]
        rows = q.transpose(0, 1).reshape(groups, -1, size)  # (G, n * H/G, D)
        far = (rows @ root_k.transpose(1, 2)).view(groups, n, -1, self.shared)  # (G, n, H/G, A)
        probs = torch.cat((far.transpose(0, 1), scores), -1).softmax(-1)  # (n, G, H/G, A + L)
        far, near = probs.split((self.shared, scores.shape[-1]), -1)  # (n, G, H/G, A), (n, G, H/G, L)
        far = far.transpose(0, 1).reshape(groups, -1, self.shared) @ root_v  # (G, n * H/G, D)
        near = near @ self.v[layer][:n].transpose(2, 3)  # (n, G, H/G, D)
        return near.add_(far.view(groups, n, -1, size).transpose(0, 1)).view(n, heads, size)  # (n, H, D)


# -------------------------------------------------------------------------------- decoder

class _Linear(torch.autograd.Function):
    """y = x W' + b in the type of x, to which fp32 masters are cast here and once more in backward: no cast
    is kept.   d x = d y W,   d W = d y' x,   d b = sum of d y; a frozen weight needs no x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        d_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        d_weight = (grad.T @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_bias = upcast(grad).sum(0) if ctx.needs_input_grad[2] else None
        return d_x, d_weight, d_bias


class Linear(nn.Linear):
    """nn.Linear (T, in) -> (T, out) that computes in its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias)


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * weight in fp32. Of the tokens only x is kept, in its own type, and 1 / rms(x).

    With n = x / rms(x), h = d y * weight:   d x = (h - n mean(h n)) / rms(x),   d weight = sum of d y * n
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = upcast(x)  # (..., E)
        scale = (torch.linalg.vecdot(y, y)[..., None] / y.shape[-1] + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (y * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        g, n = upcast(grad), upcast(x) * scale  # (..., E)
        d_weight = (g * n).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None  # (E,)
        h = g * weight  # (..., E)
        mean = torch.linalg.vecdot(h, n)[..., None] / n.shape[-1]  # (..., 1)
        d_x = h.sub_(n.mul_(mean)).mul_(scale)  # (..., E)
        return d_x.to(x.dtype), d_weight, None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        c = config
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Packed | Cache) -> Tensor:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # (T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))  # (T, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, G, D)
        out = layout.attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)  # (T, H, D)
        return self.o_proj(out.flatten(1))  # (T, E)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up with silu(z) = z s(z), s the logistic function; only the two arguments are kept.
    d gate = d y * up * s(gate) (1 + gate (1 - s(gate))),   d up = d y * silu(gate)"""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        c = config
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))  # (T, E) via (T, F)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Packed | Cache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Tied(torch.autograd.Function):
    """Rows of an embedding, and the whole of it to serve as the head: in backward the gradient of the rows is
    added into the head's, where autograd alone would add two tensors of V x E. So what uses this head must
    hand it a gradient tensor that nothing else holds, as token_logps does."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        return weight[ids], weight.view_as(weight)  # (T, E), (V, E)

    @staticmethod
    def backward(ctx, d_rows: Tensor, d_head: Tensor):
        ids, = ctx.saved_tensors
        return None, d_head.index_add_(0, ids, d_rows) if ctx.needs_input_grad[1] else None


class Decoder(nn.Module):
    """ids -> hidden states; `head` is the matrix that turns them into logits."""

    def __init__(self, config: Config, compute: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute = config, compute
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))  # fmt: skip
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """(V, E): the output matrix, which is the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.head.device

    def pack(self, shapes: list[tuple[int, list[int]]], root: int = 0) -> Packed:
        """The layout of groups of (prefix length, response lengths) on this model's device."""
        return Packed(shapes, self.device, root=root)

    def forward(self, ids: Tensor, layout: Packed | Cache,
                read: Callable[[Tensor, Tensor], Tensor] = lambda hidden, head: hidden) -> Tensor:
        """ids (T,) -> final hidden states (T, E) in the compute type, or what `read` makes of them and of the
        head (V, E): used through this argument, a tied embedding gets one gradient tensor, not two (_Tied).
        """
        frequencies = rotary_frequencies(self.config, ids.device)  # (D/2,)
        angle = layout.begin(len(ids))[:, None, None] * frequencies  # (T, 1, D/2)
        cos = torch.cat((angle.cos(), angle.cos()), dim=-1)  # (T, 1, D)
        sin = torch.cat((-angle.sin(), angle.sin()), dim=-1)  # (T, 1, D)
        if self.config.tie_word_embeddings:
            x, head = _Tied.apply(ids, self.head)  # (T, E), (V, E)
        else:
            x, head = self.model.embed_tokens(ids), self.head  # (T, E), (V, E)
        x = x.to(self.compute)
        for layer in self.model.layers:
            x = layer(x, cos, sin, layout)
        return read(self.model.norm(x), head)

    def snapshot(self) -> "Decoder":
        """A copy with its matrices in the compute type: what sampling from a model in training reads."""
        with torch.device("meta"):
            copy = Decoder(self.config, self.compute)
        weights = {key: p.detach().to(self.compute if p.dim() > 1 else p.dtype, copy=True)
                   for key, p in self.state_dict().items()}
        copy.load_state_dict(weights, strict=True, assign=True)
        return copy

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, E) -> (N, V), fp32: for sampling. Training never builds these (losses.token_logps)."""
        return upcast(F.linear(hidden, self.head.to(hidden.dtype)))


# -------------------------------------------------------------------------------- load, save

def find(name: str | Path) -> Path:
    """A local folder as it is, or a hub id ("owner/name") downloaded: only the files a model needs.

    "tiny" is the embedded model, assets/tiny.
    """
    path = Path(name).expanduser()
    if str(name) and path.is_dir():
        return path
    if str(name) == "tiny":
        return Path(__file__).parent / "assets" / "tiny"
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~") or path.exists():
        raise UserError(f"model {str(name)!r} is neither a folder nor a hub id (owner/name)")
    return download(str(name), MODEL_FILES)


def download(name: str, patterns: tuple[str, ...], kind: str = "model") -> Path:
    """The folder of a hub repository's files that match the patterns; kind is model or dataset."""
    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type=kind, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise UserError(f"{name} is gated: accept its licence on the hub and set HF_TOKEN") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{kind} {name!r} is neither a folder nor a repository on the hub: check the name, "
                        "and set HF_TOKEN if it is private") from None
    except (HTTPError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None and not isinstance(e, ConnectionError):
            raise  # the disk, not the hub
        raise UserError(f"{name} is not a folder here, and the hub cannot be reached ({type(e).__name__}): "
                        "name a folder, or try again on line") from None


def load(name: str | Path, dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None,
         device: torch.device | str = "cpu") -> Decoder:
    """A decoder from a Hugging Face folder or hub id.

    dtype: what the matrices are kept in (norms and biases in fp32 at least); compute: what it computes in,
    by default dtype. Strict: a missing, superfluous or wrongly shaped tensor is a UserError that names it.
    """
    folder = find(name)
    config = Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        model = Decoder(config, compute or dtype)
    expected = {key: tuple(p.shape) for key, p in model.state_dict().items()}
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    for file in (folder / n for n in names):
        try:
            with safe_open(file, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118 - safe_open is no mapping
                    if key.endswith("rotary_emb.inv_freq"):
                        continue  # a table that older files store
                    if config.tie_word_embeddings and key == "lm_head.weight":
                        continue  # the tied head, which some store twice
                    shape = tuple(f.get_slice(key).get_shape())
                    if expected.get(key, shape) != shape:
                        raise UserError(f"{file}: {key} is {shape}, config.json asks for {expected[key]}")
                    # norms (and biases) are computed in fp32, so they are kept in it whatever the type
                    kept = dtype if len(shape) > 1 else torch.promote_types(dtype, torch.float32)
                    weights[key] = f.get_tensor(key).to(device=device, dtype=kept)
        except FileNotFoundError:
            raise UserError(f"{file} does not exist (weights are read from safetensors only)") from None
        except SafetensorError as e:
            raise UserError(f"{file} is not a whole safetensors file: {e}") from None
    if missing := expected.keys() - weights.keys():
        raise UserError(f"{folder} lacks {len(missing)} of the model's tensors, for example {min(missing)}")
    if unknown := weights.keys() - expected.keys():
        raise UserError(f"{folder} holds {len(unknown)} unknown tensors, for example {min(unknown)}")
    model.load_state_dict(weights, strict=True, assign=True)
    return model


def save(model: Decoder, folder: Path, source: Path, dtype: torch.dtype = torch.bfloat16,
         shard: str = "5GB") -> None:
    """Write a folder that transformers opens: weights in `dtype`, config, `source`'s tokenizer files.

    Weights above `shard` go into several files and an index. The folder appears whole, in the place of one
    that is there; process 0 alone writes.
    """
    if rank():
        return
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = model.state_dict()
    sizes = {key: torch.empty(p.shape, dtype=dtype, device="meta") for key, p in state.items()}
    plan = huggingface_hub.split_torch_state_dict_into_shards(sizes, max_shard_size=shard)
    for file, keys in plan.filename_to_tensors.items():
        weights = {key: state[key].detach().to("cpu", dtype).contiguous() for key in keys}
        try:
            save_file(weights, temporary / file, metadata={"format": "pt"})
        except SafetensorError as e:
            raise UserError(f"{temporary / file} could not be written: {e}") from None
    if plan.is_sharded:
        write_json(temporary / "model.safetensors.index.json",
                   dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename))
    spelling = "torch_dtype" if "torch_dtype" in model.config.raw else "dtype"
    write_json(temporary / "config.json", {**model.config.raw, spelling: str(dtype).removeprefix("torch.")})
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, temporary / name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def show() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python model.py DIR")
    model = load(sys.argv[1])
    shown = {k: v for k, v in vars(model.config).items() if k != "raw"}
    print(json.dumps(shown, indent=1))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, every tensor of config.json found")


if __name__ == "__main__":
    main(show)
