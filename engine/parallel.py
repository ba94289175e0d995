"""One model, trained by several processes: DistributedDataParallel's copies or FSDP2's shards.

With copies each process holds the whole model and its optimizer, and gradients are averaged. With
shards (--shard=True) each parameter, its gradient and its optimizer state are cut along their first
dimension, and a process keeps its piece. A block's parameters are whole only while it computes.
Checkpoints hold whole tensors in either case, so each kind of run goes on from the other's.
"""
import contextlib
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from engine.device import Compute
from engine.options import UserError


def check_shard(compute: Compute):
    """Raises UserError where --shard cannot work."""
    if not compute.ddp:
        raise UserError("--shard splits a model over processes: start them with torchrun, or use "
                        "--shard=False")
    if compute.dtype == "float16":
        raise UserError("--shard works in bfloat16 and float32: float16's scaler does not know "
                        "shards")


def copies(model: nn.Module, compute: Compute) -> nn.Module:
    """The model behind DistributedDataParallel, where there are several processes."""
    if not compute.ddp:
        return model
    devices = [compute.device] if compute.device.type == "cuda" else None
    # Buffers are constants here: nothing to send in each forward pass.
    # A depthwise filter's gradient has other strides than its bucket: nothing to speak of.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Gradients as views of the buckets that travel: one copy less of them in memory.
    return DistributedDataParallel(model, device_ids=devices, forward_sync_buffers=False,
                                   gradient_as_bucket_view=True)


def shard(model: nn.Module, compute: Compute, compiled: bool):
    """Split the parameters over the processes, in place: each block apart, then the rest.

    Blocks are compiled apart, too: of the whole model the gathering of weights, and the
    checkpointing of activations, would leave little in one graph.
    """
    # Loaded here: it takes a second, which most runs do not need.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # All built the model from one seed. As with copies, rank 0's numbers count.
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    # FSDP cannot cut a parameter without elements, which a vision model without register tokens
    # has. It stays as it is, and its gradient is not mixed with those of shards.
    empty = {p for p in model.parameters() if not p.numel()}
    for p in empty:
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    mesh = init_device_mesh(compute.device.type, (compute.world,))
    options = {"mesh": mesh, "ignored_params": empty}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # Parameters travel in float32, whatever autocast makes of them: kappa is measured without it.
    for block in max(lists, key=weight):
        if compiled:
            block.compile()
        fully_shard(block, **options)
    fully_shard(model, **options)
    # Our models change no output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def weight(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gradients(model: nn.Module, last: bool):
    """A context for the forward and backward pass of a part of a step; is it the last part?

    Copies add up their own gradients, which travel once a step, with the last part. DDP decides
    that in the forward pass. Shards send every part's: whole gradients would not fit.
    """
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def whole(value, compute: Compute | None = None):
    """A tensor with all its shards; in a dict, list or tuple each of them. Others as they are.

    All processes take part, and each gets the result. With `compute`, for what is saved, rank 0
    alone gets it, in its CPU's memory: a GPU that needs shards has no room for all of them.
    """
    if hasattr(value, "full_tensor"):  # a DTensor, a shard with its place in the whole
        tensor = value.full_tensor()
        if compute:
            return tensor.cpu() if compute.main else None
        return tensor
    if isinstance(value, dict):
        return {key: whole(part, compute) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(part, compute) for part in value)
    return value


def like(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """This process's shard of a whole tensor, cut as `parameter` is; whole, if that is."""
    if not hasattr(parameter, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    # Every process has the whole: nothing is sent.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def divided(work: Callable, stack: torch.Tensor) -> torch.Tensor:
    """work(stack), (n, ...) -> the same shape and dtype; each process works on its share of the n.

    All processes have the same stack, take part, and get the whole result.
    """
    if not dist.is_initialized():
        return work(stack)
    world = dist.get_world_size()
    missing = -len(stack) % world
    result = torch.cat([stack, stack.new_zeros(missing, *stack.shape[1:])])
    shares = list(result.chunk(world))
    mine = work(shares[dist.get_rank()])
    dist.all_gather(shares, mine.contiguous())  # shares are parts of `result`
    return result[:len(stack)]
