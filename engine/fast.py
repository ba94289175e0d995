"""The clever parts, each with the measurement that keeps it here. Everything works without them, slower or larger.

    head_loss        output head and cross entropy in one go, without the (B T, V) logits: model.py uses it for large vocabularies
    for_sampling     the model's weights in a form that is read fast for one token at a time: sample.py calls it
    tune_allocator   keep freed memory in the process (glibc): trainer.py calls it before training on a CPU

The numbers are in BENCHMARKS.md; `python bench.py` measures them anew.
"""
import ctypes

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORED = -1  # a target that does not count, as in nanoGPT
LARGE_VOCABULARY = 4096  # from here head_loss is no slower than plain cross entropy on a CPU; below, the logits are small anyway
ROWS = 1024  # tokens whose logits exist at one time: long enough for full speed of the products with the embedding
FEW_ROWS = 8  # tokens at one time up to which Packed's own kernel is the faster one
SLICE = 32  # of them in the softmax at one time: 32 x 50,257 fp32 values, 6 MB, stay in the cache


@torch.compiler.disable  # a loop over chunks, with in-place products: compiled code would unroll it
def head_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    """F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1), the mean in nats, with `rows` tokens' logits in memory at a time.

    x (..., C), weight (V, C), targets (...) in [0, V) or IGNORED -> scalar; nan where every target is ignored, as in F.cross_entropy.

    With logits Z = X W^T, P = softmax(Z) by rows and Y the targets one-hot, the gradient of the summed loss is G = P - Y in Z, G W in X
    and G^T X in W. All three are made in the forward pass, chunk by chunk, while the chunk's logits are there; the backward pass only
    multiplies them with a number. So memory is rows x V instead of 3 to 4 times B T x V, and no logit is written or read more often than
    softmax needs.

    Under autocast the matrix products run in its dtype. The logits are rounded to it, as by F.linear; softmax, the loss and the sum of W's
    gradient over chunks are fp32. In float16, G is not scaled by the number of tokens before it is rounded, so it does not underflow.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return _HeadLoss.apply(x, weight, targets, dtype, rows, torch.is_grad_enabled())


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, dtype, rows, grad):
        X, W, targets = x.reshape(-1, x.size(-1)).to(dtype), weight.to(dtype), targets.reshape(-1, 1)
        valid = targets != IGNORED
        grad_x = torch.empty_like(X) if grad and ctx.needs_input_grad[0] else None
        grad_w = None
        wide = torch.promote_types(dtype, torch.float32)
        total, minus_one = torch.zeros((), dtype=wide, device=x.device), torch.full((), -1, dtype=wide, device=x.device)
        buffer = torch.empty(min(rows, len(X)), len(W), dtype=dtype, device=x.device)
        for start in range(0, len(X), rows):
            chunk = X[start:start + rows]
            logits = torch.mm(chunk, W.T, out=buffer[:len(chunk)])
            for part, target, counts in zip(logits.split(SLICE), targets[start:start + rows].split(SLICE),
                                            valid[start:start + rows].to(wide).split(SLICE)):
                z, target = part.to(wide), target.clamp(min=0)
                p = z.softmax(dim=-1)
                # log sum exp(z): the largest probability is at least 1/V, so its logarithm is safe; exp of log_softmax costs a third more
                log_sum = z.amax(dim=-1, keepdim=True) - p.amax(dim=-1, keepdim=True).log()
                total += ((log_sum - z.gather(1, target)) * counts).sum()
                if grad:
                    p.scatter_add_(1, target, minus_one.expand_as(target)).mul_(counts)
                    part.copy_(p)  # G, in the place of the logits; an operation with out=part would cast slowly
            if grad_x is not None:
                torch.mm(logits, W, out=grad_x[start:start + rows])
            if grad and ctx.needs_input_grad[1]:
                of_chunk = logits.T @ chunk
                grad_w = of_chunk.to(weight.dtype) if grad_w is None else grad_w.add_(of_chunk)
        n = valid.sum()
        ctx.save_for_backward(grad_x, grad_w, n)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return total / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad_x, grad_w, n = ctx.saved_tensors
        scale = grad_output / n  # applied in place: the gradients are made once, so a second backward pass is an error
        if grad_x is not None:
            grad_x = grad_x.to(ctx.dtype).mul_(scale).view(ctx.shape)
        return grad_x, None if grad_w is None else grad_w.mul_(scale), None, None, None, None


def for_sampling(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model for sample.generate, changed in place: on `device`, its weights cast to `dtype` once or, on a CPU, packed (see Packed)."""
    packs = torch.backends.quantized.engine in ("x86", "fbgemm")  # where PyTorch has the kernel: not on ARM
    return pack(model, dtype) if device.type == "cpu" and dtype != torch.float32 and packs else model.to(device, dtype)


def pack(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace the model's linear layers and its head by `Packed` ones; all else, the cache too, stays float32."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Packed(child.weight, child.bias, dtype))
    model.head = Packed(model.wte.weight, None, dtype)
    return model


class Packed(nn.Module):
    """F.linear of float32 rows with half-precision weights, for inference.

    One token's product with a matrix does one multiplication for each weight it reads, so its time is that of reading. F.linear reads a
    row-major float32 matrix at 28 to 61% of the speed at which its bytes can be summed, and a bfloat16 one at 18 to 39%, so that halving
    the bytes gains little. FBGEMM's kernel for float32 rows and float16 weights, which it stores in its own order, reads at 46 (384 x 384)
    to 100% (768 x 50,257): 2.5 to 4.7 times as fast as F.linear in float32 and 2.2 to 3.2 times as in bfloat16 (eight rows: 2.3 to 3.9
    and 1.1 to 1.6). Float16 keeps three bits more of a weight than bfloat16 does, down to 6e-5; below, its error is 3e-8 at most; weights
    beyond 65,504 are clipped. Keys and values in float32 suit attention: SDPA with a single query takes 2 to 5 times as long in bfloat16.

    With more rows (a prompt) arithmetic counts, not reading: there the product is F.linear's in `dtype`, rounded to it as by autocast.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() <= FEW_ROWS * x.size(-1):
            return torch.ops.quantized.linear_dynamic_fp16.default(x, self.packed)
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def tune_allocator() -> bool:
    """Let glibc's malloc keep freed memory for this process's next allocation; True where that was possible (glibc only).

    By default each block above 32 MB is mapped anew and given back when it is freed, so that every training step pays the page faults
    of its large temporaries again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; TypeError: Windows has no CDLL(None)
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1
