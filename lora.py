"""lora.py - LoRA: the model's matrices are frozen, and each gets a trained low-rank update.

    y = x W^T + (alpha / r) (x A^T) B^T          Hu et al., 2021 (arXiv 2106.09685), Eq. 3

on all linear layers of the blocks (what PEFT calls "all-linear"): neither the embedding nor the output layer.
A starts as PEFT's does, Kaiming-uniform, and B at 0, so training starts from the very model. Only A and B
have gradients and optimizer state, and with these adapters off the model is its own reference.
The paper trains its 70B model so, at rank 32, and all weights of the others.
What differs from the paper: it does not say how adapters start; ours start as PEFT's.

Legend: T tokens, I inputs and O outputs of a layer, r rank.

    python train.py --lora-rank 32
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import upcast
from run import seed_from

ADAPTER = ("lora_A", "lora_B")  # what the two matrices are called, here and in PEFT's files


class LoRALinear(nn.Module):
    """A linear layer with an adapter, in the place and under the names of the plain layer."""

    def __init__(self, layer: nn.Linear, r: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.alpha, self.scale = alpha, alpha / r
        self.enabled = True
        a, b = torch.empty(r, layer.in_features), torch.zeros(layer.out_features, r)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # between -1/sqrt(I) and 1/sqrt(I)
        self.lora_A = nn.Parameter(a.to(layer.weight))  # (r, I)
        self.lora_B = nn.Parameter(b.to(layer.weight))  # (O, r)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (T, O)
        if self.enabled:
            down = F.linear(x, self.lora_A)  # (T, r)
            # y + scale * down B^T, added in place: more tensors of y's size would fragment memory.
            y.addmm_(down, self.lora_B.T, alpha=self.scale)
        return y

    def merged(self, master_of: Callable[[Tensor], Tensor]) -> Tensor:
        """W + (alpha / r) B A, in fp32 at least: the matrix of a plain layer that computes the same (O, I).

        master_of: parameter -> its master, whole; see optimizer.MasterAdamW.
        """
        a, b = upcast(master_of(self.lora_A)), upcast(master_of(self.lora_B))
        return torch.addmm(upcast(master_of(self.weight).detach()), b, a, alpha=self.scale)


def add_adapters(model: nn.Module, r: int, alpha: float, seed: int) -> None:
    """Freeze a model.Decoder, and give every linear layer of its blocks an adapter of rank r.

    The adapters are in the type of the matrices; their masters are the optimizer's business.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed_from("lora", seed))
    blocks = model.model.layers
    for name, layer in list(blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            blocks.set_submodule(name, LoRALinear(layer, r, alpha, generator))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by name; none of a plain model."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is the one that training started from, to the last bit."""
    layers = adapted_layers(model).values()
    if not layers:
        raise ValueError("adapters_off: the model has no adapters, so it is not its own reference")
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer in layers:
            layer.enabled = True
