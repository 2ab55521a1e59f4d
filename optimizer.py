"""optimizer.py - AdamW on fp32 masters, the working copy that the model computes with, and the schedule.

MIPO trains at learning rates of 1e-7 to 1e-6 (section 5.2), where an update is far smaller than the distance
between two bf16 numbers: 1e-6 beside a weight of 0.02 is 1/122 of that distance. Rounded to the nearest bf16
number, nearly everything that was learned would vanish from the forward pass and from the saved folder.
Rounded up or down at random, with the nearer number the likelier, it is there in the mean over the weights.
What differs from the paper: it says AdamW, linear warm-up over 3% of the steps and a cosine. That the cosine
ends at 10%, betas of (0.9, 0.95), no weight decay and the clip at 1 are from the authors' scripts; masters
and rounding are ours.

    python -m pytest tests/test_optimizer.py
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora import ADAPTER, adapted_layers
from run import seed_from, world

WATCHED = 2**20  # of how many weights `share_changed` looks at

def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3% of the steps, then a cosine down to 10% of the peak, which the last
    step has. step from 0."""
    warmup = max(1, math.ceil(0.03 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step + 1 - warmup) / (steps - warmup)  # in (0, 1]
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> one of the two nearest bf16 numbers, the nearer one with the higher probability, so that the
    result is right in the mean. On a generator's device; seeded alike, it rounds alike.

    A bf16 number is the upper half of an fp32 number's bits. A random 16-bit number, added to the lower half,
    carries into the upper one with just the probability that is wanted.
    """
    # Four 16-bit numbers are cut out of every 64 random bits, which a CPU draws one after another.
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits.random_(-(2**63), None, generator=generator)
    noise = bits.view(torch.int16)[: x.numel()].view(x.shape)  # from -2^15 to 2^15 - 1
    carried = x.view(torch.int32) + noise + 2**15
    return carried.bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


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
            # A gradient in another type than its parameter: micro-batches add up in fp32 (torch 2.10 and
            # later).
            weight.grad_dtype = master.dtype
        self.adamw = torch.optim.AdamW(self.masters, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
                                       fused=True)
        # The moments are made now, side by side: scattered among a step's tensors they would break up memory.
        for master in self.masters:
            zeros = dict(exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
            self.adamw.state[master] = dict(step=torch.zeros((), device=master.device), **zeros)
        self.masters_by_weight = dict(zip(self.weights, self.masters, strict=True))
        # About WATCHED weights, evenly spread, whose bf16 values are compared with those at the start.
        stride = max(1, sum(weight.numel() for weight in self.weights) // WATCHED)
        self.watched = [weight.detach().view(-1)[::stride] for weight in self.weights]
        self.start = self.watched_values()

    @torch.no_grad()
    def step(self, number: int, lr: float) -> None:
        """Update the masters by the weights' gradients, then round them into the weights; number from 0."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = weight.grad
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        # Seeded by seed and step, so that runs repeat and all processes hold the same copy.
        generator = torch.Generator(self.masters[0].device)
        generator.manual_seed(seed_from("rounding", self.seed, number))
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is master:
                continue
            rounded = master if self.rounding == "nearest" else round_stochastically(master, generator)
            weight.copy_(rounded)  # which rounds to the nearest, where it still has to

    def watched_values(self) -> Tensor:
        return torch.cat([values.bfloat16() for values in self.watched])  # (about WATCHED,)

    def share_changed(self) -> float:
        """The share of the trained weights whose bf16 value is no longer that of the start."""
        return (self.watched_values() != self.start).float().mean().item()

    def zero_grad(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.grad = master.grad = None

    def master_of(self, weight: Tensor) -> Tensor:
        """The master of one of the model's parameters; a frozen one is its own."""
        return self.masters_by_weight.get(weight, weight).detach()

    def tensors(self) -> dict[str, Tensor]:
        """All that a run needs to go on from here, bit for bit: masters, moments, the working copy."""
        tensors = dict(start=self.start)
        for i, (weight, master) in enumerate(zip(self.weights, self.masters, strict=True)):
            tensors |= {f"{i}.weight": weight, f"{i}.master": master} if weight is not master else {
                f"{i}.master": master}
            tensors |= {f"{i}.{name}": value for name, value in self.adamw.state[master].items()}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave. KeyError where they are another model's."""
        own = self.tensors()
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def weights_to_save(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights of the plain model in `dtype`: in its own type the copy that validation has scored,
        else the masters, rounded stochastically where they have to be. Adapters are merged into the weights
        that they belong to, from their masters."""
        generator = torch.Generator(self.masters[0].device)
        generator.manual_seed(seed_from("saving", self.seed))
        adapted = adapted_layers(self.model)
        state = {}
        for name, weight in self.model.named_parameters():
            if name.endswith(ADAPTER):
                continue
            value = weight.detach() if weight.dtype == dtype else self.master_of(weight)
            if layer := adapted.get(name.removesuffix(".weight")):
                value = layer.merged(self.master_of)
            if dtype == torch.bfloat16 and value.dtype != dtype:
                value = round_stochastically(value, generator)
            state[name] = value.to(dtype)
        return state


def all_reduce_gradients(model: nn.Module) -> None:
    """Sum gradients over processes; each loss is already divided by the whole batch."""
    if world() == 1:
        return
    for p in model.parameters():
        if not p.requires_grad:  # frozen: it has no gradient, and is to have none
            continue
        if p.grad is None:  # a last batch may leave a process without pairs
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        dist.all_reduce(p.grad)
