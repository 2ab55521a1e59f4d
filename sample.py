"""sample.py - batched sampling with a KV cache.

`generate` is the only way from prompt ids to new ids, and sampled ids are kept as they are: nothing is
decoded and tokenised again. Temperature, top-p and top-k are the caller's.
What differs from the paper, which does not describe its sampler: the random numbers of a response depend on
(seed, row, sample) alone, not on what is sampled beside it. So does its text, except for rounding: the size
of a batch can change how a sum is rounded and so, rarely in fp32 and more often in bf16, which token is drawn
(results/agreement.py measures how often).

Legend: S slots, n of them that compute, L cache length, A tokens that all prompts share, T tokens of a
        prefill, E hidden size, V vocabulary, H query heads, G key/value heads, D head size.

    python sample.py --model DIR "What is inflation?"
"""

import collections
import math
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fast
import gpu_kernels
from config import Config
from fast import upcast
from folder import load
from losses import common_prefix_length
from model import Decoder, Packed
from run import UserError, default_device, default_dtype, main, option, parse, seed_from
from tokenizer import TEMPLATE_DATE, TEMPLATE_HELP, Tokenizer

SLOTS = 128  # how many responses are decoded together, unless the caller says so
PREFILL_TOKENS = 8192  # prompts are prefilled in passes of about this many tokens
WINDOW = 128  # prompts are sorted by length only within this many rows, so that early rows finish early


# ------------------------------------------------------------------------- one token

@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy, top_p 1 and top_k 0 switch the filters off."""

    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 0

    def __post_init__(self):
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1 or self.top_k < 0:
            raise UserError(f"temperature, top_k must be >= 0, top_p in (0, 1], max_new_tokens >= 1: {self}")
        if 0 < self.temperature < 1e-6:
            raise UserError(f"temperature {self.temperature:g} is too small to divide by: 0 takes the "
                            "likeliest token")


@dataclass
class Sample:
    """One response: ids, with the end token if the model emitted it, and the log-probs of these ids under the
    model itself, without temperature and filters. Training computes its own; these are for comparison."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False


def uniform_numbers(seed: int, row: int, sample: int, count: int) -> Tensor:
    """The `count` uniform numbers in [0, 1) that decide one response, whatever is sampled beside it. (count,)

    Each response has a stream of its own, of a counter-based generator with a key of 63 bits: torch's CPU
    generator reads only 32 bits of a seed, so that of 40,000 streams two would often be equal.
    """
    generator = np.random.Generator(np.random.Philox(key=seed_from(seed, row, sample)))
    return torch.from_numpy(generator.random(count, dtype=np.float32))


def filtered_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (n, V) -> tempered, top-k and top-p filtered probabilities, not normalised again. (n, V)

    The nucleus of top-p is the smallest set of most likely tokens whose mass reaches top_p; ties with its
    least likely token are all kept.
    """
    probs = torch.softmax(logits / sampling.temperature, dim=-1)  # (n, V)
    vocabulary = probs.shape[-1]
    if sampling.top_k:
        k = min(sampling.top_k, vocabulary)
        likely = probs.topk(k).values  # (n, k), descending
        least = likely[:, -1:]  # (n, 1)
        probs = torch.where(probs >= least, probs, 0)
    if sampling.top_p < 1:
        mass = sampling.top_p * probs.sum(-1, keepdim=True)  # (n, 1)
        probs = torch.where(probs >= fast.least_of_nucleus(probs, mass), probs, 0)
    return probs


def sample_token(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the cumulative distribution at `uniform` in [0, 1).

    logits (n, V) fp32, uniform (n,) -> ids (n,), and the log-probs of those ids under softmax(logits), (n,).
    """
    probs = logits.softmax(-1)  # (n, V)
    if sampling.temperature == 0:
        ids = logits.argmax(-1)  # (n,)
    elif sampling.temperature == sampling.top_p == 1 and not sampling.top_k:
        ids = fast.invert_cumulative(probs, uniform)  # (n,)
    else:
        kept = filtered_probs(logits, sampling)  # (n, V): `uniform` is a share of each row's mass
        ids = fast.invert_cumulative(kept, uniform)  # (n,)
    logps = probs.gather(1, ids[:, None]).squeeze(1).log()  # (n,)
    return ids, logps


# ------------------------------------------------------------------------- KV cache

class Cache:
    """Keys and values of S slots with room for L tokens each. All slots continue the same A shared
    tokens (A may be 0), which are stored once.

    `lengths` (S,) says how many tokens each slot holds after the shared ones; whoever feeds a slot increments
    it. A slot is reused by writing over it: stale entries beyond its length are masked. All L entries are
    read, used or not: a product would first copy a slice. Keys are fp32, as the scores are. Values are stored
    transposed, so that each product reads along the dimension it sums over.
    Where a GPU has a kernel for it (`has_kernel`), keys are in the model's type, keys and values are laid out
    alike, and a step reads only what each slot holds.
    """

    def __init__(
        self,
        config: Config,
        slots: int,
        length: int,
        shared_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        layers = config.num_hidden_layers
        heads = config.num_key_value_heads
        size = config.head_dim
        self.score_dtype = torch.promote_types(dtype, torch.float32)
        self.shared_k = torch.zeros(layers, heads, shared_length, size, dtype=dtype, device=device)
        self.shared_v = torch.zeros_like(self.shared_k)
        self.has_kernel = fast.decodes_by_kernel(self.shared_k)
        shape = layers, slots, heads, length, size  # (layers, S, G, L, D)
        if self.has_kernel:
            self.k = torch.zeros(shape, dtype=dtype, device=device)
            self.v = torch.zeros(shape, dtype=dtype, device=device).transpose(3, 4)  # (layers, S, G, D, L)
        else:
            self.k = torch.zeros(shape, dtype=self.score_dtype, device=device)
            self.v = torch.zeros(layers, slots, heads, size, length, dtype=dtype, device=device)
        self.shared_length = shared_length
        self.length = length
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)  # (S,)
        self.slots = torch.arange(slots, device=device)  # (S,)

    def write(self, layer: int, slots: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Store the keys and values (n, G, D) of n tokens, each at a place (n,) of a slot (n,)."""
        layer_k, layer_v = self.k[layer], self.v[layer]
        layer_k[slots, :, places] = k.to(layer_k.dtype)
        layer_v[slots, :, :, places] = v

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy what some slots hold into others."""
        for tensor in (self.k, self.v):
            tensor[:, target] = tensor[:, source]
        self.lengths[target] = self.lengths[source]


class SharedPrefill(Packed):
    """The layout of the shared tokens themselves: their keys and values become the cache's shared ones."""

    def __init__(self, cache: Cache):
        super().__init__([(cache.shared_length, [])], device=cache.lengths.device)
        self.cache = cache

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.cache.shared_k[layer].copy_(k.transpose(0, 1))
        self.cache.shared_v[layer].copy_(v.transpose(0, 1))


class Prefill(Packed):
    """The layout of prompts that continue the shared tokens; what each computes is copied to its slots."""

    def __init__(self, cache: Cache, lengths: list[int], slots: list[list[int]], root: int):
        """lengths, slots: of each prompt, the tokens after the shared ones, and which slots start from it.
        root: how many of those tokens these prompts have in common: they are laid once, before the others."""
        own = [length - root for length in lengths]
        super().__init__([(n, []) for n in own], root, cache.shared_length, cache.lengths.device)
        self.cache = cache
        # Which tokens of the pass are kept, in which slot, at which place.
        common, *rest = torch.arange(root + sum(own)).split([root, *own])
        kept, targets, places = [], [], []
        for tokens, group in zip(rest, slots, strict=True):
            prompt = torch.cat((common, tokens))
            for slot in group:
                kept.append(prompt)
                targets.append(torch.full_like(prompt, slot))
                places.append(torch.arange(len(prompt)))
        index = torch.stack((torch.cat(kept), torch.cat(targets), torch.cat(places)))
        self.kept, self.targets, self.places = fast.sent(index, self.device)

    def past_keys(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.shared_k[layer], self.cache.shared_v[layer]

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.cache.write(layer, self.targets, self.places, k[self.kept], v[self.kept])


class Decode:
    """The layout of one new token in each of the cache's first n slots. It sees the shared tokens and what
    its slot holds."""

    def __init__(self, cache: Cache, n: int):
        self.cache, self.n = cache, n
        lengths = cache.lengths[:n]
        self.positions = cache.shared_length + lengths  # (n,)
        if cache.has_kernel:
            return
        places = torch.arange(cache.length, device=lengths.device)  # (L,)
        unused = places > lengths[:, None]  # (n, L): the new token's own place is seen
        mask = torch.zeros_like(unused, dtype=cache.score_dtype)  # (n, L)
        mask.masked_fill_(unused, -math.inf)
        self.mask = mask[:, None, None]  # (n, 1, 1, L)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (n, H, D), the new tokens' k and v (n, G, D) -> (n, H, D). Scores and softmax are fp32."""
        n, cache = self.n, self.cache
        slot_k = cache.k[layer][:n]  # (n, G, L, D)
        slot_v = cache.v[layer][:n].transpose(2, 3)  # (n, G, L, D)
        shared_k = cache.shared_k[layer]  # (G, A, D)
        shared_v = cache.shared_v[layer]  # (G, A, D)
        if cache.has_kernel:
            return gpu_kernels.decode_attention(q, k, v, slot_k, slot_v, cache.lengths, shared_k, shared_v)
        cache.write(layer, cache.slots[:n], cache.lengths[:n], k, v)

        # The H/G query heads that share a key/value head become rows of one product, so nothing is repeated.
        # The queries of all slots become rows of one product with the shared keys, which are read once.
        q = upcast(q.unflatten(1, (k.shape[1], -1))) * k.shape[2] ** -0.5  # (n, G, H/G, D)
        scores = (q @ slot_k.transpose(2, 3)).add_(self.mask)  # (n, G, H/G, L)
        if cache.shared_length:
            rows = q.transpose(0, 1).flatten(1, 2)  # (G, n * H/G, D)
            shared_scores = rows @ upcast(shared_k).transpose(1, 2)  # (G, n * H/G, A)
            shared_scores = shared_scores.unflatten(1, (n, -1)).transpose(0, 1)  # (n, G, H/G, A)
            scores = torch.cat((scores, shared_scores), dim=-1)  # (n, G, H/G, L + A)

        weights = scores.softmax(-1).to(v.dtype)
        slot_weights = weights[..., : cache.length]  # (n, G, H/G, L)
        out = slot_weights @ slot_v  # (n, G, H/G, D)
        if cache.shared_length:
            shared_weights = weights[..., cache.length :]  # (n, G, H/G, A)
            out = out + torch.einsum("ngra,gad->ngrd", shared_weights, shared_v)
        return out.flatten(1, 2)  # (n, H, D)


# ------------------------------------------------------------------------- sampling

def generate(
    model: Decoder,
    prompts: list[list[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    seed: int,
    keys: list[tuple[int, int]] | None = None,
    slots: int = SLOTS,
    bar: tqdm | None = None,
    on_finished: Callable[[int, Sample], None] = lambda i, sample: None,
) -> list[Sample]:
    """Sample one response for every prompt.

    keys: (row, sample index) of each prompt, which with `seed` decide its randomness; default (i, 0). slots:
    how many responses are decoded together; a slot whose response has ended takes the next prompt. bar: a
    progress bar that counts responses. `on_finished(i, sample)` is called as prompt i's response ends.
    Raises UserError where the longest prompt and its response take more positions than the model has.
    """
    if not prompts:
        return []
    sampler = Sampler(model, prompts, sampling, stop_ids, slots)
    return sampler.sample(prompts, seed, keys, bar, on_finished)


class Sampler:
    """S slots that decode together: prompts are admitted, tokens drawn, and slots compacted at the end.

    It is made once and may sample many times: the cache, and on a GPU the captured graph, outlive a call. The
    model's weights may be changed in place between two calls; nothing that was computed with them is kept.
    """

    @torch.inference_mode()
    def __init__(self, model: Decoder, prompts: list[list[int]], sampling: Sampling,
                 stop_ids: frozenset[int], slots: int = SLOTS):
        """prompts: all that will ever be sampled; they set the cache's size, and what they all begin with is
        computed once per call. The rest is as in `generate`."""
        positions = model.config.max_position_embeddings
        max_tokens = sampling.max_new_tokens
        longest = max(map(len, prompts)) + max_tokens
        if longest > positions:
            raise UserError(f"the longest prompt and {max_tokens} new tokens take {longest} positions, "
                            f"the model has {positions}")
        self.model, self.sampling = model, sampling
        self.slots = slots = min(slots, len(prompts))

        # What all prompts begin with (worked examples, say) is computed, kept and read once, in blocks of 64
        # tokens; room for the rest is a multiple of 64 too, because products of round shapes are faster.
        shared_length = common_prefix_length(prompts) // 64 * 64
        self.shared_ids = prompts[0][:shared_length]
        room = 64 * math.ceil((longest - shared_length) / 64)
        self.cache = Cache(model.config, slots, room, shared_length, model.compute, model.device)

        self.stops = self.tensor(sorted(stop_ids))
        self.ids = torch.zeros(slots, max_tokens, dtype=torch.long,
                               device=model.device)  # (S, max_new_tokens)
        self.logps = torch.zeros_like(self.ids, dtype=self.cache.score_dtype)  # (S, max_new_tokens)
        self.uniform = torch.zeros_like(self.logps)  # (S, max_new_tokens)
        self.drawn = torch.zeros_like(self.ids[:, 0])  # (S,) tokens drawn so far
        self.decoders: dict[int, Callable[[], Tensor]] = {}  # width -> one decoding step

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[list[int]],
        seed: int,
        keys: list[tuple[int, int]] | None = None,
        bar: tqdm | None = None,
        on_finished: Callable[[int, Sample], None] = lambda i, sample: None,
    ) -> list[Sample]:
        """One response for every prompt, as `generate` gives it."""
        begin_alike = all(prompt[: len(self.shared_ids)] == self.shared_ids for prompt in prompts)
        longest = max(map(len, prompts), default=0) + self.sampling.max_new_tokens
        if not begin_alike or longest > len(self.shared_ids) + self.cache.length:
            raise ValueError("Sampler.sample: a prompt is longer, or starts differently, than those that the "
                             "sampler was made for")
        self.prompts, self.seed, self.bar, self.on_finished = prompts, seed, bar, on_finished
        self.keys = keys or [(i, 0) for i in range(len(prompts))]

        # Within each window of rows the longest prompts come first, and equal ones side by side, so that they
        # are prefilled once.
        def order(i: int) -> tuple:
            window = self.keys[i][0] // WINDOW
            return window, -len(prompts[i]), prompts[i]

        self.waiting = collections.deque(sorted(range(len(prompts)), key=order))
        self.results = [Sample() for _ in prompts]
        self.owner: list[int | None] = [None] * self.slots  # which prompt each slot works on
        self.busy = self.width = 0  # slots that work on a prompt, the first ones; slots that compute
        self.changed = True  # whether a response has ended since the slots were last refilled
        self.token_count = 0
        self.started = time.perf_counter()

        self.cache.lengths.zero_()
        if self.shared_ids and prompts:
            self.model(self.tensor(self.shared_ids), SharedPrefill(self.cache))
        while self.refill():
            self.step()
        return self.results

    def tensor(self, values: list) -> Tensor:
        """Integers on the model's device."""
        return fast.sent(values, self.model.device)

    def refill(self) -> bool:
        """Give free slots the next prompts when it is time to, and compact the others. False at the end."""
        if not self.changed:
            return True
        while self.waiting and self.is_time_to_admit():
            self.admit()
        self.close_up()
        self.changed = False
        return self.busy > 0

    def is_time_to_admit(self) -> bool:
        """Whether an eighth of the slots is free, or enough for all that wait.

        With many slots a response ends after almost every token, and on a GPU prefilling a single prompt
        takes about as long as decoding a token in all slots.
        """
        free = self.owner.count(None)
        return 8 * free >= self.slots or free >= len(self.waiting)

    def admit(self) -> None:
        """Prefill waiting prompts into free slots, each distinct one once, and draw their first tokens."""
        shared_length = self.cache.shared_length
        taken: dict[tuple[int, ...], list[int]] = {}  # prompt -> the slots that start from it
        free = [slot for slot, i in enumerate(self.owner) if i is None]
        for slot in free:
            tokens = sum(len(prompt) - shared_length for prompt in taken)
            if not self.waiting or tokens >= PREFILL_TOKENS:
                break
            i = self.waiting.popleft()
            self.owner[slot] = i
            taken.setdefault(tuple(self.prompts[i]), []).append(slot)

        # What these prompts have in common beyond the shared tokens is computed once, before the rest.
        prompts = [list(prompt[shared_length:]) for prompt in taken]
        slots_of = list(taken.values())
        lengths = [len(prompt) for prompt in prompts]
        root = common_prefix_length(prompts)
        ids = prompts[0][:root]
        for prompt in prompts:
            ids += prompt[root:]
        hidden = self.model(self.tensor(ids), Prefill(self.cache, lengths, slots_of, root))  # (T, E)

        lengths = self.tensor(lengths)  # (prompts,)
        last = (lengths - root).cumsum(0) + root - 1  # (prompts,): where each one's last token is
        logits = self.model.logits(hidden[last])  # (prompts, V)
        started, starts = [], []  # slots, and the number of the prompt that each starts from
        for j, group in enumerate(slots_of):
            started += group
            starts += [j] * len(group)
        slots, prompt_of = self.tensor([started, starts])  # (n,) each
        self.uniform[slots] = self.uniforms_of(started)
        self.cache.lengths[slots] = lengths[prompt_of]
        self.drawn[slots] = 0
        self.finish_ended(self.draw(slots, logits[prompt_of]))

    def uniforms_of(self, slots: list[int]) -> Tensor:
        """The uniform numbers of the responses that some slots work on. (n, max_new_tokens)"""
        count = self.sampling.max_new_tokens
        rows = [uniform_numbers(self.seed, *self.keys[self.owner[slot]], count) for slot in slots]
        return fast.sent(torch.stack(rows).to(self.uniform.dtype), self.model.device)

    def close_up(self) -> None:
        """Compact the busy slots: move the last ones into gaps, so that fewer slots are computed."""
        owner = self.owner
        self.busy = sum(i is not None for i in owner)
        gaps = [slot for slot in range(self.busy) if owner[slot] is None]
        last = [slot for slot in range(self.busy, self.slots) if owner[slot] is not None]
        if gaps:
            source, target = self.tensor([last, gaps])
            self.cache.move(source, target)
            for tensor in (self.drawn, self.uniform, self.ids, self.logps):
                tensor[target] = tensor[source]
        for gap, slot in zip(gaps, last, strict=True):
            owner[gap] = owner[slot]
            owner[slot] = None
        # Idle slots still run: they begin again at 0, so that none comes to the end of its room before a busy
        # slot ends and this is done again.
        self.cache.lengths[self.busy :] = 0
        self.drawn[self.busy :] = 0
        # On a CPU widths are multiples of 8, to reuse compiled kernels; on a GPU there is one, for one graph.
        self.width = self.slots
        if self.model.device.type == "cpu":
            self.width = min(self.slots, 8 * math.ceil(self.busy / 8))

    def step(self) -> None:
        """Feed the latest token of every busy slot and draw the next one."""
        width = self.width
        own = weakref.proxy(self)  # else a cycle of sampler and step would keep the cache alive

        def advance() -> Tensor:
            slots = own.cache.slots[:width]  # (width,)
            latest = own.ids[slots, own.drawn[:width] - 1]  # (width,)
            hidden = own.model(latest, Decode(own.cache, width))  # (width, E)
            own.cache.lengths[:width] += 1
            return own.draw(slots, own.model.logits(hidden))

        # A CUDA graph works on the memory it was captured with: all that it changes is written in place.
        if width not in self.decoders:
            self.decoders[width] = fast.graphed(advance, self.model.device)
        self.finish_ended(self.decoders[width]())

    def draw(self, slots: Tensor, logits: Tensor) -> Tensor:
        """Draw one token for each of the slots (n,) from logits (n, V). Returns for `finish_ended` (n, 3):
        the slot, how many tokens it has drawn, and whether the last one ends the response."""
        column = self.drawn[slots]  # (n,)
        token, logp = sample_token(logits, self.uniform[slots, column], self.sampling)  # (n,) each
        self.ids[slots, column] = token
        self.logps[slots, column] = logp
        self.drawn[slots] = column + 1
        is_stop = (token[:, None] == self.stops).any(-1)  # (n,)
        return torch.stack((slots, column + 1, is_stop), dim=1)  # (n, 3)

    def finish_ended(self, drawn: Tensor) -> None:
        """Finish the responses that end with the tokens just drawn. drawn: what `draw` returns."""
        # Apart from `finish`, only here does the host wait for the device within a step.
        for slot, count, is_stop in drawn.tolist():
            is_busy = self.owner[slot] is not None
            if is_busy and (is_stop or count == self.sampling.max_new_tokens):
                self.finish(slot, bool(is_stop), count)

    def finish(self, slot: int, finished: bool, count: int) -> None:
        """Hand over the response of `count` tokens that a slot holds, and free the slot."""
        i = self.owner[slot]
        ids, logps = self.ids[slot, :count].tolist(), self.logps[slot, :count].tolist()
        if any(map(math.isnan, logps)):
            raise UserError("the model's log-probs are not numbers: its weights have diverged, or --dtype is "
                            "too narrow for them")
        self.results[i] = Sample(ids, logps, finished)
        self.owner[slot] = None
        self.changed = True
        self.token_count += count
        if self.bar is not None:
            speed = self.token_count / (time.perf_counter() - self.started)
            self.bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            self.bar.update(1)
        self.on_finished(i, self.results[i])


# ------------------------------------------------------------------------- command line

@dataclass
class Args:
    prompt: str = option("", "the user's message", positional=True)
    model: str = option("", "Hugging Face folder or hub id")
    system: str | None = option(None, "system prompt, instead of the template's own")
    template: tuple = option((), TEMPLATE_HELP)
    temperature: float = option(1.0, "0 is greedy", "sampling")
    top_p: float = option(1.0, "nucleus mass", "sampling")
    top_k: int = option(0, "keep the k most likely tokens, 0 for all", "sampling")
    max_new_tokens: int = option(256, "longest response, in tokens", "sampling")
    samples: int = option(1, "responses to draw", "sampling")
    seed: int = option(0, "with row and sample index, decides every draw", "sampling")
    date: str = option(TEMPLATE_DATE, "date for chat templates that print one", "sampling")
    dtype: str = option(default_dtype(), "arithmetic; bfloat16 where its products are fast", "sampling",
                        ("bfloat16", "float32"))


def program() -> None:
    args = parse(Args, usage=__doc__)
    if not args.prompt or not args.model:
        raise UserError('usage: python sample.py --model DIR "prompt"; --template goes after the prompt')
    if args.samples < 1:
        raise UserError(f"--samples {args.samples} must be at least 1")
    tokenizer = Tokenizer(args.model, args.date, args.template)
    model = load(args.model, getattr(torch, args.dtype), default_device())
    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.top_k)
    prompts = [tokenizer.chat(args.prompt, args.system)] * args.samples
    keys = [(0, sample) for sample in range(args.samples)]
    start = time.perf_counter()
    samples = generate(model, prompts, sampling, tokenizer.stop_ids, args.seed, keys)
    seconds = time.perf_counter() - start
    for sample in samples:
        end = "" if sample.finished else " [unfinished]"
        print(tokenizer.decode(sample.ids) + end)
    count = sum(len(sample.ids) for sample in samples)
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main(program)
