"""memory.py - how much memory a run will need in each process, predicted from its shapes alone.

Every part is counted: what stands in the model, what autograd keeps, what the optimizer adds. Only what a
CPU's heap adds (PROGRAM, HOLES, FILLED) is fitted, on SmolLM2-135M-Instruct with glibc; tests/test_memory.py
holds the measurements, and says which the fit has not seen. What differs from the paper: it has nothing of
the kind.

Legend: T tokens of a pass, m tokens of one of its parts and n keys that they see, E hidden size, F
        feed-forward size, H query heads, G key/value heads, D head size, V vocabulary, r rank of adapters.

    python train.py --dry-run
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

import gpu_kernels
from config import Config
from fast import LOGITS_AT_ONCE
from losses import OBJECTIVES, Group, common_prefix_length
from model import Decoder
from run import UserError, default_device, world

PROGRAM = 0.45e9  # bytes of the interpreter and its libraries; on a GPU these are elsewhere
# The first number is for a step with one pass, the second for a step with several.
HOLES = 0.6, 1.2  # bytes of holes that a heap has after a pass, for each byte of its activations
FILLED = 0.6, 0.25  # the share of activations and holes in which gradients find room
USABLE = 0.9  # the share of a card's memory that tensors can fill
MAX_CARDS = 256
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Pass:
    """The tokens of one forward and backward pass: its groups, without their ids, and what all prefixes
    begin with."""

    groups: list[tuple[int, list[int]]]  # tokens of a prefix, the root among them, and of each response
    root: int = 0

    @classmethod
    def of(cls, groups: list[Group]) -> "Pass":
        """The pass in which losses.response_logps scores these groups."""
        root = common_prefix_length([prefix for prefix, _ in groups])
        return cls([(len(prefix), [len(ids) for ids in responses]) for prefix, responses in groups], root)

    def parts(self) -> list[tuple[int, int]]:
        """(m, n) of each part: the root, prefixes, and responses, whose last tokens are not fed."""
        parts = [(self.root, self.root)] if self.root else []
        for prefix, responses in self.groups:
            parts.append((prefix - self.root, prefix))
            parts += [(length - 1, prefix + length - 1) for length in responses if length > 1]
        return parts

    def tokens(self) -> int:
        """T: all tokens that are fed."""
        return sum(m for m, _ in self.parts())

    def predicted(self) -> int:
        """All tokens that are predicted."""
        return sum(sum(responses) for _, responses in self.groups)


@dataclass(frozen=True)
class Sizes:
    """Numbers in the weights: all of them, one block's, those outside of blocks, and all adapters'."""

    total: int
    block: int
    ends: int
    adapters: int

    @classmethod
    def of(cls, config: Config, r: int) -> "Sizes":
        """The sizes of a decoder with adapters of rank r, 0 for none: of one with a single block, from which
        those of any number follow."""
        with torch.device("meta"):
            model = Decoder(dataclasses.replace(config, num_hidden_layers=1))
        blocks, first = config.num_hidden_layers, model.model.layers[0]
        linear = [layer for layer in first.modules() if isinstance(layer, nn.Linear)]
        adapters = sum(r * (layer.in_features + layer.out_features) for layer in linear)
        block = sum(p.numel() for p in first.parameters())
        ends = sum(p.numel() for p in model.parameters()) - block
        return cls(blocks * block + ends, block, ends, blocks * adapters)


def predicted_memory(config: Config, args, passes: list[Pass], prompt: int, processes: int = 1,
                     device: str = "cpu") -> dict[str, float]:
    """The bytes that a process needs for each part of a run, which are not all needed at once: see peak.

    args: train.Args, resolved. passes: of the largest step, this process's share. prompt: tokens of the
    longest prompt that responses are sampled for; 0 where none are. processes share the weights with --shard.
    """
    largest = max(passes, key=Pass.tokens)
    itemsize = getattr(torch, args.dtype).itemsize
    sizes = Sizes.of(config, args.lora_rank)
    trained = sizes.adapters or sizes.total
    matrix = config.vocab_size * config.hidden_size  # the embedding's numbers
    share = processes if args.shard else 1

    # PPO trains a critic beside the model and, where no adapters can be switched off, keeps the start model.
    is_ppo = args.method not in OBJECTIVES
    models = 2 if is_ppo else 1
    reference = sizes.total * itemsize if is_ppo and not args.lora_rank else 0

    # Gradients add up in fp32. That of a tied embedding has two terms, which exist beside their sum.
    gradients = models * trained * FP32 / share
    if not args.lora_rank:
        gradients += matrix * itemsize * (2 if config.tie_word_embeddings else 1)
    master = FP32 if itemsize < FP32 else 0
    activations = activation_bytes(config, args, largest, device)
    whole = (sizes.total + sizes.adapters) * itemsize
    cache = cache_bytes(config, args, prompt, device)
    parts = dict(
        program=PROGRAM if device == "cpu" else 0.0,
        weights=models * (sizes.total + sizes.adapters) * itemsize / share + reference,
        gradients=gradients,
        optimizer=models * trained * (master + 2 * FP32) / share,
        activations=activations,
        heap=heap_bytes(config, args, passes, gradients) if device == "cpu" else 0.0,
        cache=0.0 if is_ppo else cache,
        copies=0.0 if args.shard else saving_bytes(args, sizes, itemsize),  # sharded: one matrix at a time
        file=sizes.total * BF16 if device == "cpu" else 0.0,  # mapped into memory while it is read
    )
    if args.shard:
        # FSDP gathers the ends and, while one block computes, the next one. Whatever needs no gradient runs
        # on a gathered copy.
        parts["gathered"] = (sizes.ends + 2 * sizes.block) * itemsize
        parts["copy"] = whole if prompt and not is_ppo else 0.0
    if is_ppo:  # what it samples with stays while it trains: with --shard copies of actor and reference too
        parts["sampler"] = cache + (2 * whole if args.shard else 0.0)
    return parts


def peak(parts: dict[str, float], device: str = "cpu") -> float:
    """The most bytes at a time: in reading the model, in sampling, in training, or in saving."""
    loaded = parts["program"] + parts["weights"]
    sampling = parts["cache"] + parts.get("copy", 0.0)
    training = parts["gradients"] + parts["activations"] + parts["heap"]
    training += parts.get("gathered", 0.0) + parts.get("sampler", 0.0)
    later = max(training, parts["copies"])
    if device == "cpu":  # the room that the cache had stays in the process, and later tensors do not fit in
        return loaded + max(parts["file"], parts["optimizer"] + sampling + later)
    return loaded + parts["optimizer"] + max(sampling, later)  # the optimizer is there before the first pair


def heap_bytes(config: Config, args, passes: list[Pass], gradients: float) -> float:
    """What a CPU's heap adds to the gradients and activations of a step.

    A pass leaves holes behind, which later tensors do not fill: as many where activations are computed a
    second time. Gradients come as activations go, and fill a part of their place.
    """
    several = len(passes) > 1
    largest = max(passes, key=Pass.tokens)
    plain = dataclasses.replace(args, checkpoint_activations=False)
    holes = HOLES[several] * activation_bytes(config, plain, largest, "cpu")
    room = activation_bytes(config, args, largest, "cpu") + holes
    return holes - min(FILLED[several] * room, gradients)


def activation_bytes(config: Config, args, largest: Pass, device: str) -> float:
    """What autograd keeps of one pass until its backward pass, and the logits that exist at a time."""
    itemsize = getattr(torch, args.dtype).itemsize
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    queries, keys = heads * config.head_dim, kv_heads * config.head_dim
    tokens, parts = largest.tokens(), largest.parts()

    # Each of a block's two norms keeps its input and a scale; the layers after it keep its output.
    a_token = 4 * hidden * itemsize + 2 * FP32
    # Attention keeps q, k, v and its output, which is stored once more for the layer after it where attention
    # goes part by part (fast.packed_attention does not).
    is_packed = device == "cuda" and itemsize == BF16
    a_token += ((2 if is_packed else 3) * queries + 2 * keys) * itemsize
    if config.qk_norm:
        a_token += (queries + keys) * itemsize + (heads + kv_heads) * FP32
    a_token += 3 * inner * itemsize  # of the feed-forward layer: gate, up and their product
    a_token += 7 * args.lora_rank * itemsize  # x A of each of the seven adapters
    # A part that continues another one has all the keys and values that it sees side by side; packed, every
    # part has, and no others are kept.
    copied = sum(n - m if is_packed else n for m, n in parts if n > m)
    block = tokens * a_token + copied * 2 * keys * itemsize
    is_table = device == "cpu" and itemsize == BF16  # fast.attention keeps its weights, other kernels a sum
    block += heads * sum(m * n * BF16 if is_table and m * n <= 2**20 else m * FP32 for m, n in parts)
    if device == "cuda" and not is_packed and heads > kv_heads:
        # No fused kernel takes shared key heads in fp32: PyTorch keeps all weights, and each head's k and v.
        block += itemsize * sum(heads * m * n + 2 * n * queries for m, n in parts)

    blocks = config.num_hidden_layers * block
    if args.checkpoint_activations:
        blocks = config.num_hidden_layers * tokens * hidden * itemsize + block
    ends = tokens * (hidden * itemsize + 2 * config.head_dim * FP32) + largest.predicted() * hidden * itemsize
    logits = 2 * LOGITS_AT_ONCE[device] * itemsize  # and their gradient
    return blocks + ends + logits


def cache_bytes(config: Config, args, prompt: int, device: str) -> float:
    """Keys and values of --slots responses, and the distributions that their next tokens are drawn from."""
    if not prompt:
        return 0.0
    itemsize = getattr(torch, args.dtype).itemsize
    length = -(-(prompt + args.max_new_tokens) // 64) * 64
    has_kernel = device == "cuda" and config.head_dim in gpu_kernels.HEAD_SIZES
    key = itemsize if has_kernel else FP32
    a_token = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (key + itemsize)
    return args.slots * (length * a_token + 4 * config.vocab_size * FP32)


def saving_bytes(args, sizes: Sizes, itemsize: int) -> float:
    """What selection.save_model holds beside the model: the weights in the type of the file, where they are
    not the model's own; in bf16 also an fp32 model that shows what was lost, and the merged weights."""
    is_bf16 = args.save_dtype == "bfloat16"
    saved = BF16 if is_bf16 else FP32
    copies = saved if args.lora_rank or saved != itemsize else 0
    if is_bf16:
        copies += FP32 + (FP32 if args.lora_rank else BF16)
    return copies * sizes.total


def cards_needed(config: Config, args, passes: list[Pass], card: float) -> int | None:
    """How many GPUs of `card` bytes training takes with the weights sharded, sampling left out; None where
    MAX_CARDS are not enough: what each process needs for its own pass is then too much."""
    sharded = dataclasses.replace(args, shard=True)
    for processes in range(1, MAX_CARDS + 1):
        parts = predicted_memory(config, sharded, passes, 0, processes, "cuda")
        if peak(parts, "cuda") <= USABLE * card:
            return processes
    return None


def out_of_reach(config: Config, args, card: float) -> list[str]:
    """What GPUs of `card` bytes can't do with this model however many there are, a line each."""
    sizes = Sizes.of(config, args.lora_rank)
    whole = sizes.total * getattr(torch, args.dtype).itemsize
    lines = []
    if whole > USABLE * card:
        lines.append(f"sampling, context gain, validation: each card would hold a whole copy of the weights, "
                     f"{gb(whole)}; make the pairs elsewhere and give --pairs")
    if sizes.total * FP32 > USABLE * card:
        lines.append(f"measuring what the saved folder keeps: it takes all weights in fp32, "
                     f"{gb(sizes.total * FP32)}")
    return lines


def require_fit(args, config: Config, source: str) -> None:
    """UserError where this process's GPU can't hold what training keeps for every step, however small; a
    warning where a full pass might be too much beside it. A CPU's memory is not checked.

    args: train.Args, resolved. source: the model's name.
    """
    card = card_memory()
    if card is None:
        return
    half = args.pass_tokens // 2
    full = Pass([(args.pass_tokens - half, [half])])
    parts = predicted_memory(config, args, [full], 0, world(), "cuda")
    always = "weights", "gradients", "optimizer", "gathered", "sampler"
    kept = {name: parts.get(name, 0.0) for name in always}
    total = sum(kept.values())
    listed = ", ".join(f"{name} {gb(size)}" for name, size in kept.items() if size)
    if total > USABLE * card:
        raise UserError(f"{source}: training takes {gb(total)} on every GPU ({listed}), and this one has "
                        f"{gb(card)}: {way_out(args, config, card)}")
    if total + parts["activations"] > USABLE * card:
        print(f"warning: a pass of --pass-tokens {args.pass_tokens} takes about {gb(parts['activations'])} "
              f"beside {gb(total)} ({listed}), and this GPU has {gb(card)}: should memory run out, lower "
              "--pass-tokens or give --checkpoint-activations")


def way_out(args, config: Config, card: float) -> str:
    """What would make training fit on a GPU of `card` bytes."""
    smallest = [Pass([(1, [1])])]
    ways = []
    if not args.lora_rank:
        adapters = dataclasses.replace(args, lora_rank=32)
        parts = predicted_memory(config, adapters, smallest, 0, world(), "cuda")
        size = peak(parts | dict(copies=0.0), "cuda")  # a saved model's copies can be made elsewhere
        if size <= USABLE * card:
            ways.append(f"give --lora-rank 32, which takes {gb(size)} and a pass")
    processes = cards_needed(config, args, smallest, card)
    if processes:
        ways.append(f"take at least {processes} GPUs, with torchrun and --shard")
    return ", or ".join(ways) or "take GPUs with more memory, or a smaller model"


def require_copy(args, config: Config, what: str, remedy: str) -> None:
    """UserError where `what` would take a copy of the whole model for which this process's GPU has no room
    beside its share of the weights and of the optimizer."""
    card, sizes = card_memory(), Sizes.of(config, args.lora_rank)
    if card is None:
        return
    parts = predicted_memory(config, args, [Pass([(1, [1])])], 0, world(), "cuda")
    shares = parts["weights"] + parts["optimizer"]
    copy = (sizes.total + sizes.adapters) * getattr(torch, args.dtype).itemsize
    if shares + copy > USABLE * card:
        raise UserError(f"--shard: {what} takes a copy of the whole model in every process, {gb(copy)} "
                        f"beside {gb(shares)} of its shares, more than this GPU holds: {remedy}")


def fits_whole(config: Config, itemsize: int) -> bool:
    """Whether this process's GPU, if it has one, can hold all weights, of `itemsize` bytes each."""
    card = card_memory()
    return card is None or Sizes.of(config, 0).total * itemsize <= USABLE * card


def card_memory() -> int | None:
    """The bytes of this process's GPU; None on a CPU, whose memory is not read."""
    device = default_device()
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def gb(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.3g} GB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
