"""Preconditioned attention: scale the rows of a head's output to lower its condition number.

For one head with output A = attention(Q, K, V), a (T, D) matrix whose row i belongs to token i,

    C  = scale diag((||A_i||_2 + eps)^-power),  C_ii = 0 where A_i = 0
    A' = C A

replaces A before the heads are concatenated and projected. power = 1 and scale = 1 are the paper's
preconditioner (rows of norm 1), power = 0 is plain attention. A scale changes no condition number;
scale = sqrt(D) with power = 1 and the gradient through C is RMSNorm without its gain.
H. Saratchandran, "Preconditioned Attention: Enhancing Efficiency in Transformers", AISTATS 2026,
arXiv 2603.27153.

    python precond.py    # kappa before and after, for softmax attention of several sharpnesses

This file needs nothing but PyTorch: take it along. With the folder precond_dropin beside it,
the drop-ins for models that are not this project's are names of this module too.
"""
import importlib
import math
import signal
import threading
from contextlib import contextmanager

import torch
import torch.nn.functional as F

LEARNED_FROM = 0.5  # where a learned power starts
LEARNED_SCALE_FROM = 1.0  # where a learned scale starts: at the paper's C
DROP_INS = ("preconditioned_attention", "precondition_sdpa", "register_transformers", "wrap",
            "check")  # of precond_dropin, loaded when one is asked for
_recordings: list[list] = []
_done = threading.local()  # .calls: how many calls of this thread were preconditioned


def __getattr__(name: str):
    if name in DROP_INS:
        return getattr(importlib.import_module("precond_dropin"), name)
    raise AttributeError(f"module 'precond' has no attribute {name!r}")


def precondition(a: torch.Tensor, *, grad: bool = False, eps: float = 1e-8,
                 power: float | torch.Tensor = 1.0, scale: float | str | torch.Tensor = 1.0
                 ) -> torch.Tensor:
    """C A for head outputs `a` (..., T, D); same shape and dtype, norms in fp32 (fp64 for fp64).

    grad=False, the paper's recipe, makes C a constant in the backward pass. power=0 with scale=1
    returns `a` itself. scale="sqrt_d" is sqrt(D). Powers and scales of shape (n_head,), for `a` of
    shape (B, n_head, T, D), get their gradient either way. A zero row stays zero and gets a zero
    gradient, for the whole training if it starts as one. A row too long for its norm to be a
    number (in fp32 from 1e19 on) becomes nan. ValueError for a power or a scale that is no number.
    """
    out = scale_rows(a, grad, eps, power, scale)
    note(a, out)
    return out


def scale_rows(a: torch.Tensor, grad: bool, eps: float, power: float | torch.Tensor,
               scale: float | str | torch.Tensor) -> torch.Tensor:
    learned = isinstance(power, torch.Tensor)
    scale = head_scale(scale, a.size(-1))
    if not learned:
        check_number("power", power)
        if power == 0 and not isinstance(scale, torch.Tensor) and scale == 1:
            return a
    # Half precision would lose small norms and overflow on large ones.
    dtype = torch.promote_types(a.dtype, torch.float32)
    rows = a if grad else a.detach()  # all of the difference between the paper's C and RMSNorm
    if grad or a.is_nested:
        # Unlike a norm, squares have a second derivative at 0, and serve jagged tensors (forward).
        square = rows.to(dtype).square().sum(dim=-1, keepdim=True)  # (..., T, 1)
        zero = square == 0
        norm = torch.where(zero, 1.0, square).sqrt()
    else:
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype)  # (..., T, 1)
        zero = norm == 0
        if learned:
            norm = norm.masked_fill(zero, 1.0)
    # Squares overflow before lengths do. Such a row would silently become 0.
    norm = norm.masked_fill(norm == torch.inf, torch.nan)
    if learned:
        power = power[:, None, None]  # (n_head, 1, 1)
    # The slope of norm^-power is infinite at 0: there was 1 there before, where it counts.
    c = (norm + eps).pow(-power).masked_fill(zero, 0.0)
    return (a * (c * scale)).to(a.dtype)


def head_scale(scale: float | str | torch.Tensor, D: int) -> float | torch.Tensor:
    """The s of C = s diag(...) as a factor of (B, n_head, T, D): a number or (n_head, 1, 1)."""
    if isinstance(scale, torch.Tensor):
        return scale[:, None, None]
    check_number("scale", scale, "sqrt_d")
    return D**0.5 if scale == "sqrt_d" else scale


def check_constants(power: float, scale: float | str):
    """What a model's C may be given: no tensors. Raises ValueError."""
    check_number("power", power)
    check_number("scale", scale, "sqrt_d")


def check_number(name: str, value: float | str, word: str | None = None):
    """Raises ValueError unless it is a finite number, or the word that may stand for one."""
    finite = not isinstance(value, str | torch.Tensor) and abs(value) < math.inf
    if not finite and value != word:
        also = f" or {word!r}" if word else ""
        raise ValueError(f"{name}={value!r} of the preconditioner must be a finite number{also}")


def note(a: torch.Tensor, out: torch.Tensor):
    """Give (A, C A), (..., T, D), to every `record`; one tensor twice where nothing was done."""
    if not torch.compiler.is_compiling():  # counting would be a reason to compile again
        _done.calls = calls_done() + (out is not a)
    for recording in _recordings:
        if torch._C._functorch.is_functorch_wrapped_tensor(a):
            raise RuntimeError("record() cannot keep what is inside torch.vmap or torch.func.grad: "
                               "record a call outside of it")
        before = a.detach()
        recording.append((before, before if out is a else out.detach()))


def calls_done() -> int:
    """How many attention calls this thread has preconditioned, those of compiled code left out."""
    return getattr(_done, "calls", 0)


@contextmanager
def record():
    """Collect (A, C A) of every attention call made inside: `with record() as calls: model(x)`."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    _recordings.append(calls)
    try:
        yield calls
    finally:
        _recordings[:] = [r for r in _recordings if r is not calls]


def condition_number(a: torch.Tensor) -> torch.Tensor:
    """sigma_max / sigma_min of min(T, D) singular values: (..., T, D) -> (...) fp32 on the CPU.

    A is taken in fp32 and its singular values in fp64. inf where sigma_min <= 2^-23 sigma_max,
    which is rank-deficient to fp32; nan where A is not finite or has no entries.
    """
    a = a.detach().float().cpu().double()
    if 0 in a.shape[-2:]:
        return torch.full(a.shape[:-2], torch.nan)
    finite = a.isfinite().all(dim=-1).all(dim=-1)
    s = torch.linalg.svdvals(torch.where(finite[..., None, None], a, 0.0))
    largest, smallest = s[..., 0], s[..., -1]
    kappa = torch.where(smallest <= 2.0**-23 * largest, torch.inf, largest / smallest)
    return torch.where(finite, kappa, torch.nan).float()


def _demonstrate(T: int = 197, D: int = 64, heads: int = 16):
    print(f"median kappa of softmax attention's output, {heads} heads of {T} x {D}, Gaussian input")
    print(f"{'logit scale':>12} {'A':>10} {'C A':>10}")
    generator = torch.Generator().manual_seed(0)
    for sharpness in (0.1, 1.0, 3.0, 10.0, 30.0):
        q, k, v = torch.randn(3, heads, T, D, generator=generator, dtype=torch.float64)
        a = F.scaled_dot_product_attention(sharpness * q, k, v)
        before, after = (condition_number(x).median() for x in (a, precondition(a)))
        print(f"{sharpness:12g} {before:10.2f} {after:10.2f}")
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]] + 195 * [[1e-3, 0.0]])
    print(f"{'by hand':>12} {condition_number(a):10.2f} {condition_number(precondition(a)):10.2f}")
    print("Even rows lower kappa where uneven ones were the trouble. Where short rows point the\n"
          "same way (last line: e1, e2, 195 copies of e1/1000) they gain weight, and kappa rises.")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    _demonstrate()
