"""The clever parts, each with the measurement that keeps it here. Everything works without them, slower or larger.

    head_loss        output head and cross entropy in one go, without the (B T, V) logits: model.py uses it for large vocabularies
    tune_allocator   keep freed memory in the process (glibc): trainer.py calls it before training on a CPU

The numbers are in BENCHMARKS.md; `python bench.py` measures them anew.
"""
import ctypes

import torch

IGNORED = -1  # a target that does not count, as in nanoGPT
LARGE_VOCABULARY = 4096  # from here head_loss is no slower than plain cross entropy on a CPU; below, the logits are small anyway
ROWS = 1024  # tokens whose logits exist at one time: long enough for full speed of the products with the embedding
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
