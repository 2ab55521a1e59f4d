"""shard.py - one model divided among processes: weights, gradients and moments, by rows (FSDP2).

Each of W processes holds 1/W of every tensor. A pass gathers one block's weights at a time, computes, and
frees them; gradients are summed over all processes, and each keeps those of its own rows (Rajbhandari et al.,
2020, arXiv 1910.02054, stage 3; Zhao et al., 2023, arXiv 2304.11277). So all processes run every pass
together, and all make equally many: batches.py pads.

Sampling, context gain, mutual information and validation need different numbers of passes, and run on a copy
of the whole model in each process, `gathered`. What is saved is gathered too, a tensor at a time, and on
loading cut again, so files do not depend on W.
What differs from the paper: it has nothing of the kind; results equal those of whole weights, but for the
order in which gradients are added up and, in bf16, one more rounding of what each pass adds.

    torchrun --nproc_per_node 2 train.py --shard
"""

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from run import default_device, rank, world

# ------------------------------------------------------------------------- models

def shard_weights(model: nn.Module) -> nn.Module:
    """Divide a model.Decoder's weights among all processes, in place; a single process keeps them whole.

    The model may stand in main memory: its blocks move to the device one at a time.
    """
    if world() == 1:
        print("--shard: there is one process, so nothing is divided; torchrun starts several")
        return model.to(default_device())
    model.skeleton = [skeleton_of(model)]  # in a list, or it would become a part of the model
    mesh = init_device_mesh(default_device().type, (world(),))
    compute = model.compute
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(compute, torch.float32),
                                  cast_forward_inputs=False)  # cosines stay in fp32
    # Weights that travel together are of one type. Beside bf16 matrices norms are in fp32, and go alone.
    norms = [module for module in model.modules()
             if any(p.dtype != compute for p in module.parameters(recurse=False))]
    for module in (*norms, *model.model.layers, model):
        # The ends of the model stay whole between forward and backward: the loss reads the head.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model)
        # Losses are already divided by the whole batch, so gradients are summed. A factor alone would not do:
        # gloo refuses it in fp32.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    return model


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of a model whose weights have shapes and types, but no memory."""
    weights = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo=weights)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def shards(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's parameters by name. A sharded model is divided again first: a forward pass without a
    backward one leaves its ends whole."""
    if is_sharded(model):
        model.reshard()
    return model.named_parameters()


@torch.no_grad()
def gathered(model: nn.Module) -> nn.Module:
    """A copy of a sharded model with whole weights, for work without gradient; any other model itself.

    All processes have to call this at the same time, and `refresh` too.
    """
    if not is_sharded(model):
        return model
    whole_model = copy.deepcopy(model.skeleton[0])
    whole_model.load_state_dict({name: whole(p) for name, p in shards(model)}, assign=True)
    return whole_model.requires_grad_(False)


@torch.no_grad()
def refresh(whole_model: nn.Module, model: nn.Module) -> None:
    """Update in place what `gathered` returned to the model's present weights."""
    if is_sharded(model):
        for name, p in shards(model):
            whole_model.get_parameter(name).copy_(whole(p))


# ------------------------------------------------------------------------- tensors

def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this process holds; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor, gathered by all processes at once; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def span(tensor: Tensor) -> slice:
    """Where the numbers that this process holds of a tensor stand among all its numbers."""
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.numel())
    most = -(-len(tensor) // world())  # rows; the last processes may have fewer, or none
    first = min(rank() * most, len(tensor))
    start = first * (tensor.numel() // len(tensor))
    return slice(start, start + tensor.to_local().numel())


def copy_own(tensor: Tensor, whole_tensor: Tensor) -> None:
    """Set a tensor, sharded or not, to what the whole one holds."""
    own = local(tensor)
    own.copy_(whole_tensor.reshape(-1)[span(tensor)].view(own.shape))


def collect(named: Iterable[tuple[str, Tensor]], model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a model, or of its optimizer, by name and whole. Those of a sharded model are moved to
    process 0's main memory one after another; the other processes take part, and get none."""
    if not is_sharded(model):
        return dict(named)
    tensors = {}
    for name, tensor in named:
        tensor = whole(tensor)
        if not rank():
            tensors[name] = tensor.cpu()
    return tensors


def accumulate_in(dtype: torch.dtype, weight: nn.Parameter) -> None:
    """Accumulate a parameter's gradients in `dtype` (torch 2.10 and later)."""
    def widen(weight: nn.Parameter) -> None:
        if weight.grad.dtype != dtype:
            weight.grad = weight.grad.to(dtype)

    if not isinstance(weight, DTensor):
        weight.grad_dtype = dtype
        return
    # FSDP brings the first pass's gradient in the weight's type, and adds the others to what it finds there.
    weight.grad_dtype = None  # any type
    weight.register_post_accumulate_grad_hook(widen)
