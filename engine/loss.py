"""Output head and cross entropy in one go, for large vocabularies: no (B T, V) logits in memory.

model.GPT works without it, slower or larger. The numbers are in BENCHMARKS.md; `python bench.py`
measures them anew.
"""
import torch

IGNORED = -1  # a target that does not count, as in nanoGPT
# From here on head_loss is no slower than plain cross entropy on a CPU. Below, the logits are
# small anyway.
LARGE_VOCABULARY = 4096
ROWS = 1024  # tokens whose logits exist at one time: enough for full speed of the products
SLICE = 32  # of them in the softmax at one time: 32 x 50,257 fp32 values, 6 MB, stay in the cache


def head_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
              rows: int = ROWS) -> torch.Tensor:
    """F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1), the mean in nats.

    x (..., C), weight (V, C), targets (...) in [0, V) or IGNORED -> scalar. nan where every target
    is ignored, as in F.cross_entropy. `rows` tokens' logits are in memory at a time.

    With logits Z = X W^T, P = softmax(Z) by rows and Y the targets one-hot, the gradient of the
    summed loss is G = P - Y in Z, G W in X and G^T X in W. All three are made in the forward pass,
    chunk by chunk, while the chunk's logits are there. The backward pass only multiplies them with
    a number. So memory is rows x V instead of 3 to 4 times B T x V, and no logit is written or
    read more often than softmax needs.

    Under autocast the matrix products run in its dtype, and the logits are rounded to it, as by
    F.linear. Softmax, the loss and the sum of W's gradient over chunks are fp32. In float16, G is
    not scaled by the number of tokens before it is rounded, so it does not underflow.
    """
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
    # Compiled code would unroll the loop over chunks. As a decorator this would load the compiler,
    # half of a command's start.
    apply = torch.compiler.disable(_HeadLoss.apply)
    return apply(x, weight, targets, dtype, rows, torch.is_grad_enabled())


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, dtype, rows, grad):
        X = x.reshape(-1, x.size(-1)).to(dtype)  # (N, C)
        W = weight.to(dtype)  # (V, C)
        targets = targets.reshape(-1, 1)
        valid = targets != IGNORED
        wide = torch.promote_types(dtype, torch.float32)
        counted = valid.to(wide)
        minus_one = torch.full((), -1, dtype=wide, device=x.device)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(X) if grad and ctx.needs_input_grad[0] else None
        grad_w = None
        buffer = torch.empty(min(rows, len(X)), len(W), dtype=dtype, device=x.device)
        for start in range(0, len(X), rows):
            here = slice(start, start + rows)
            chunk = X[here]
            logits = torch.mm(chunk, W.T, out=buffer[:len(chunk)])  # (rows, V)
            parts = logits.split(SLICE), targets[here].split(SLICE), counted[here].split(SLICE)
            for part, target, counts in zip(*parts):
                z = part.to(wide)
                target = target.clamp(min=0)
                p = z.softmax(dim=-1)
                # log sum exp(z). The largest probability is at least 1/V, so its logarithm is
                # safe; exp of log_softmax costs a third more.
                log_sum = z.amax(dim=-1, keepdim=True) - p.amax(dim=-1, keepdim=True).log()
                total += ((log_sum - z.gather(1, target)) * counts).sum()
                if grad:
                    p.scatter_add_(1, target, minus_one.expand_as(target)).mul_(counts)
                    part.copy_(p)  # G in the place of the logits; with out=part the cast is slow
            if grad_x is not None:
                torch.mm(logits, W, out=grad_x[here])
            if grad and ctx.needs_input_grad[1]:
                product = logits.T @ chunk
                grad_w = product.to(weight.dtype) if grad_w is None else grad_w.add_(product)
        n = valid.sum()
        ctx.save_for_backward(grad_x, grad_w, n)
        ctx.shape = x.shape
        ctx.dtype = x.dtype
        return total / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad_x, grad_w, n = ctx.saved_tensors
        # In place: the gradients are made once, so a second backward pass is an error.
        scale = grad_output / n
        if grad_x is not None:
            grad_x = grad_x.to(ctx.dtype).mul_(scale).view(ctx.shape)
        if grad_w is not None:
            grad_w = grad_w.mul_(scale)
        return grad_x, grad_w, None, None, None, None
