"""config.py - the shape of a decoder, as a Hugging Face config.json gives it.

Whatever model.py does not compute is refused by name: other architectures, activations and rope types,
quantised weights, sliding windows. What differs from the paper: nothing.

    python -m pytest tests/test_model.py -k config
"""

from dataclasses import dataclass

from run import UserError
from schema import FLAG, OBJECT, TEXT, checked, integer, listing, optional, real

SWITCHES = dict(
    rope_parameters=optional(OBJECT),
    rope_scaling=optional(OBJECT),
    layer_types=optional(listing(TEXT)),
    tie_word_embeddings=optional(FLAG),
    attention_bias=optional(FLAG),
    mlp_bias=optional(FLAG),
    use_sliding_window=optional(FLAG),
)
# The limits are far beyond every model of these families, and keep a damaged file from taking all memory.
SIZES = dict(
    vocab_size=integer(1, 10**7),
    hidden_size=integer(1, 10**6),
    intermediate_size=integer(1, 10**7),
    num_hidden_layers=integer(1, 1000),
    num_attention_heads=integer(1, 10**4),
    num_key_value_heads=optional(integer(1, 10**4)),
    head_dim=optional(integer(2, 10**4)),
    rms_norm_eps=real(0, 1),
    rope_theta=optional(real(1, 1e15)),
    max_position_embeddings=optional(integer(1, 10**9)),
)
LLAMA3 = dict(
    factor=real(1e-3, 1e6),
    low_freq_factor=real(0, 1e6),
    high_freq_factor=real(0, 1e6),
    original_max_position_embeddings=integer(1, 10**9),
)


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
        """Read a config.json, in the spelling of transformers 5 or of earlier versions.

        Raises UserError, naming the file `where`, for whatever this decoder does not support: another
        model_type, activation or rope type, quantised weights, a sliding window that is switched on.
        """
        checked(raw, SWITCHES, where)
        refuse_unsupported(raw, where)
        checked(raw, SIZES, where)
        rope = rope_settings(raw)
        checked(rope, dict(rope_theta=SIZES["rope_theta"]), where)
        is_llama3 = rope.get("rope_type", rope.get("type")) == "llama3"
        if is_llama3:
            checked(rope, LLAMA3, where)
        kind, heads = raw["model_type"], raw["num_attention_heads"]
        default_head_dim = 128 if kind == "qwen3" else raw["hidden_size"] // heads
        attention_bias = bool(raw.get("attention_bias"))
        config = cls(
            model_type=kind,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or default_head_dim,
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
            rope_llama3={key: rope[key] for key in LLAMA3} if is_llama3 else None,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            qkv_bias=kind == "qwen2" or attention_bias,  # Qwen2 always has them and does not say so
            o_bias=kind != "qwen2" and attention_bias,
            mlp_bias=kind == "llama" and bool(raw.get("mlp_bias")),
            qk_norm=kind == "qwen3",
            max_position_embeddings=raw.get("max_position_embeddings") or 2048,
            raw=raw,
        )
        refuse_misfits(config, where)
        return config


def rope_settings(raw: dict) -> dict:
    """transformers 5 writes everything about rotary embeddings into rope_parameters; earlier versions write
    the scaling into rope_scaling (null for none) and leave rope_theta beside it."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def refuse_unsupported(raw: dict, where: str) -> None:
    """UserError where the configuration asks for something that this decoder does not compute."""
    kind, activation = raw.get("model_type"), raw.get("hidden_act", "silu")
    rope = rope_settings(raw)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    window = raw.get("sliding_window", 4096)  # transformers' default where the key is absent
    layer_types = raw.get("layer_types") or []
    unsupported = None
    if kind not in ("llama", "qwen2", "qwen3"):
        unsupported = f"model_type {kind!r} (llama, qwen2 and qwen3 are)"
    elif activation != "silu":
        unsupported = f"hidden_act {activation!r} (silu is)"
    elif raw.get("quantization_config"):
        unsupported = "quantization_config"
    elif "sliding_attention" in layer_types or (raw.get("use_sliding_window") and window):
        unsupported = f"a sliding window in use (sliding_window {window})"
    elif rope_type not in ("default", "llama3"):
        unsupported = f"rope type {rope_type!r} (default and llama3 are)"
    elif (raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0) != 1.0:
        unsupported = "partial_rotary_factor"
    if unsupported:
        raise UserError(f"{where}: {unsupported} is not supported (see the docstring of config.py)")


def refuse_misfits(config: Config, where: str) -> None:
    """UserError where numbers that are each possible do not go together."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    scaling = config.rope_llama3
    if heads % shared:
        raise UserError(f"{where}: {heads} heads can't share {shared} key and value heads evenly")
    if config.head_dim % 2 or not config.head_dim:
        raise UserError(f"{where}: heads of {config.head_dim} channels can't be rotated in pairs")
    if scaling and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"{where}: low_freq_factor must be below high_freq_factor")
