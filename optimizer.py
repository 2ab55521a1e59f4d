"""optimizer.py - AdamW on fp32 masters, the working copy that the model computes with, and the schedule.

MIPO trains at learning rates of 1e-7 to 1e-6 (appendix E), where an update is far smaller than the distance
between two bf16 numbers: 1e-6 beside a weight of 0.02 is 1/122 of that distance. Rounded to the nearest bf16
number, nearly everything that was learned would vanish from the forward pass and from the saved folder.
Rounded up or down at random, the nearer number the likelier, it survives on average over the weights. With
--shard (shard.py) masters and moments are divided as the weights are, by rows, and each process updates its
own. Rounding noise is drawn for the whole tensor, and each process uses its rows' part (a GPU makes each
number's noise from a seed and its place), so every weight is rounded as in an undivided run. A checkpoint
holds whole tensors, and fits any number of processes.
What differs from the paper: it names only the rate, batch size, beta and epochs (appendix E). AdamW, its
betas of (0.9, 0.95), no weight decay, warm-up over 3% of the steps, a cosine to 10% and the clip at 1 are
those of the authors' scripts; masters and rounding are ours.

    python -m pytest tests/test_optimizer.py
"""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

import gpu_kernels
from fast import runs_triton
from lora import ADAPTER, adapted_layers
from run import seed_from, world
from shard import accumulate_in, collect, copy_own, is_sharded, local, shards, span, whole

WATCHED = 2**20  # how many weights `share_changed` looks at


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3% of the steps, then a cosine down to 10% of the peak, which the last
    step has; a run of a single step has the peak. step from 0."""
    warmup = max(1, math.ceil(0.03 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step + 1 - warmup) / (steps - warmup)  # in (0, 1]
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def round_stochastically(x: Tensor, generator: torch.Generator, out: Tensor | None = None) -> Tensor:
    """fp32 -> one of the two nearest bf16 numbers, the nearer one with the higher probability, so that the
    result is unbiased. The generator is a CPU's: one seed gives one rounding on CPUs and another one on GPUs.
    Of a sharded tensor only this process's rows are rounded, with the numbers that an undivided run would
    draw for them. out: where the result goes, else a new tensor.

    A bf16 number is the upper half of an fp32 number's bits. A random 16-bit number, added to the lower half,
    carries into the upper one with just the probability that is wanted.
    """
    own = local(x)
    out = torch.empty_like(own, dtype=torch.bfloat16) if out is None else out
    if runs_triton(own):
        seed = torch.randint(2**31, (), generator=generator).item()
        gpu_kernels.round_up_or_down(own, out, seed, span(x).start)
        return out
    # Four 16-bit numbers are cut out of every 64 random bits, which a CPU draws one after another.
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits.random_(-(2**63), None, generator=generator)
    noise = bits.view(torch.int16)[span(x)].view(own.shape)  # from -2^15 to 2^15 - 1
    carried = own.view(torch.int32) + noise + 2**15
    return out.copy_(carried.bitwise_and_(-(2**16)).view(torch.float32))


class MasterAdamW:
    """AdamW on fp32 master weights, of which the model holds a working copy in its own type.

    Forward, backward, validation and sampling read the copy, which is rounded from the masters anew after
    every step. A model in fp32 is its own master.
    """

    def __init__(self, model: nn.Module, lr: float, seed: int, rounding: str = "stochastic"):
        """rounding: "nearest" is there only to show what it loses."""
        self.model, self.seed, self.rounding = model, seed, rounding
        self.weights = [p for p in model.parameters() if p.requires_grad]
        exact = (torch.float32, torch.float64)
        self.masters = [p if p.dtype in exact else p.detach().float() for p in self.weights]
        for weight, master in zip(self.weights, self.masters, strict=True):
            accumulate_in(master.dtype, weight)  # micro-batches add up in fp32
        self.adamw = torch.optim.AdamW(self.masters, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
                                       fused=True)
        # The moments are made now, side by side: scattered among a step's tensors they would fragment memory.
        for master in self.masters:
            zeros = dict(exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
            self.adamw.state[master] = dict(step=torch.zeros((), device=master.device), **zeros)
        self.masters_by_weight = dict(zip(self.weights, self.masters, strict=True))
        # About WATCHED weights, whose bf16 values are compared with those at the start. A stride with a
        # factor in common with a matrix's width would miss most of its columns.
        self.stride = max(1, sum(weight.numel() for weight in self.weights) // WATCHED)
        while any(math.gcd(self.stride, weight.shape[-1]) > 1 for weight in self.weights):
            self.stride += 1
        self.watched: dict[torch.dtype, list[Tensor]] = {}
        for weight in self.weights:
            first = -span(weight).start % self.stride  # of this process's numbers
            watched = local(weight.detach()).view(-1)[first :: self.stride]
            self.watched.setdefault(weight.dtype, []).append(watched)
        self.start = self.watched_values()

    @torch.no_grad()
    def step(self, number: int, lr: float, norm: Tensor) -> None:
        """Update the masters by the weights' gradients, clipped to norm 1, then round them into the weights.

        number: from 0. norm: what `gradient_norm` gives; where it is not finite, masters and moments stay as
        they are, and the weights are rounded anew from the same masters.
        """
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = weight.grad
        self.adamw.param_groups[0]["lr"] = lr
        # AdamW divides gradients by grad_scale as it reads them, and does nothing where found_inf is 1. So
        # clipping and skipping need no pass over the gradients, and on a GPU the host need not know the norm.
        self.adamw.grad_scale = (norm.float() + 1e-6).clamp(min=1)
        self.adamw.found_inf = (~norm.isfinite()).float()
        self.adamw.step()
        self.round_weights(number)

    def round_weights(self, number: int) -> None:
        """Bring the working copy up to the masters, after step `number`."""
        # Seeded by seed and step, so that runs repeat and all processes hold the same copy.
        generator = torch.Generator()
        generator.manual_seed(seed_from("rounding", self.seed, number))
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is master:
                continue
            if self.rounding == "nearest":
                local(weight).copy_(local(master))
            else:
                round_stochastically(master, generator, out=local(weight))

    def watched_values(self) -> Tensor:
        """The bf16 values of about WATCHED evenly spread weights, (about WATCHED,); of a sharded model those
        that this process holds."""
        return torch.cat([torch.cat(values).bfloat16() for values in self.watched.values()])

    def share_changed(self) -> Tensor:
        """The share of the trained weights whose bf16 value is no longer that of the start, a scalar."""
        changed = (self.watched_values() != self.start).float()
        if not is_sharded(self.model):
            return changed.mean()
        counts = torch.stack([changed.sum(), changed.new_full((), changed.numel())])  # (2,)
        dist.all_reduce(counts)
        return counts[0] / counts[1]

    def zero_grad(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.grad = master.grad = None

    def master_of(self, weight: Tensor) -> Tensor:
        """The master of one of the model's parameters, whole; a frozen one is its own."""
        return whole(self.masters_by_weight.get(weight, weight).detach())

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """All that a run needs to go on from here, by name: masters, moments, the working copy."""
        for i, (weight, master) in enumerate(zip(self.weights, self.masters, strict=True)):
            if weight is not master:
                yield f"{i}.weight", weight.detach()
            yield f"{i}.master", master.detach()
            for name, value in self.adamw.state[master].items():
                yield f"{i}.{name}", value

    def tensors(self) -> dict[str, Tensor]:
        """All that a run needs to go on from here, bit for bit; of a sharded model, see shard.collect."""
        return collect(self.state(), self.model)

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave. KeyError where they are another model's."""
        for name, tensor in self.state():
            copy_own(tensor, tensors[name])

    def weights_to_save(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights of the plain model in `dtype`: the copy that validation scored if it has that type,
        else the masters, rounded stochastically if need be. Adapters are merged into the weights that they
        belong to, from their masters. Of a sharded model, see shard.collect."""
        return collect(self.rounded_weights(dtype), self.model)

    def rounded_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """What `weights_to_save` gives, one weight after another, each whole."""
        generator = torch.Generator()
        generator.manual_seed(seed_from("saving", self.seed))
        adapted = adapted_layers(self.model)
        for name, weight in shards(self.model):
            if name.endswith(ADAPTER):
                continue
            value = whole(weight.detach()) if weight.dtype == dtype else self.master_of(weight)
            if layer := adapted.get(name.removesuffix(".weight")):
                value = layer.merged(self.master_of)
            if dtype == torch.bfloat16 and value.dtype != dtype:
                value = round_stochastically(value, generator)
            yield name, value.to(dtype)


def gradient_norm(weights: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients, over all processes' rows, a scalar; not finite if any gradient is not."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return whole(get_total_norm(gradients))


def all_reduce_gradients(model: nn.Module) -> None:
    """Sum gradients over processes; each loss is already divided by the whole batch. Those of a sharded model
    were summed as they came."""
    if world() == 1 or is_sharded(model):
        return
    for p in model.parameters():
        if not p.requires_grad:  # frozen
            continue
        if p.grad is None:  # a last batch may leave a process without pairs
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        dist.all_reduce(p.grad)
