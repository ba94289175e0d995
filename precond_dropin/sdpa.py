"""PyTorch's scaled_dot_product_attention, preconditioned: as a function, and in a context."""
import threading
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointFunction

from precond import check_constants, precondition

_sdpa = F.scaled_dot_product_attention  # PyTorch's, out of any context
_entered: list[dict] = []  # the options of all open contexts, of whatever thread
_entering = threading.Lock()
_before = {}  # what the outermost context found, to put it back


class _Inside(threading.local):
    """The options of this thread's open contexts, the innermost last."""

    def __init__(self):
        self.options: list[dict] = []
        # Autograd recomputes checkpoints in threads of its own: they follow whoever is inside.
        self.guest = isinstance(threading.current_thread(), threading._DummyThread)


_inside = _Inside()


def current_options() -> dict | None:
    """Of the innermost context that this thread is in, None outside of all."""
    options = _inside.options or (_entered if _inside.guest else [])
    return options[-1] if options else None


def preconditioned_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
                             scale=None, enable_gqa=False, *, grad: bool = False,
                             eps: float = 1e-8, power: float = 1.0,
                             row_scale: float | str = 1.0) -> torch.Tensor:
    """F.scaled_dot_product_attention, preconditioned: queries (..., T, D) -> (..., T, D).

    `scale` is that of the logits, as in PyTorch; `row_scale` is the preconditioner's.
    """
    a = _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
              enable_gqa=enable_gqa)
    return precondition(a, grad=grad, eps=eps, power=power, scale=row_scale)


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
            enable_gqa=False):
    """What F.scaled_dot_product_attention is while a context is open, in any thread."""
    a = _before["sdpa"](query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                        enable_gqa=enable_gqa)
    options = current_options()
    return a if options is None else precondition(a, **options)


def _checkpoint(run, *args):
    """CheckpointFunction.apply: the second forward pass may come when the context is closed."""
    options = current_options()

    def run_inside(*inputs):
        with precondition_sdpa(**options):
            return run(*inputs)

    return super(CheckpointFunction, CheckpointFunction).apply(
        run if options is None else run_inside, *args)


@contextmanager
def precondition_sdpa(*, grad: bool = False, eps: float = 1e-8, power: float = 1.0,
                      scale: float | str = 1.0):
    """Precondition every call of F.scaled_dot_product_attention that this thread makes inside.

    The innermost of several counts. Not reached: code that imported the function by name before,
    nn.MultiheadAttention with need_weights=True (its default), TorchScript, attention written out
    by hand, threads that the model starts itself (nn.DataParallel). `check` tells.
    """
    check_constants(power, scale)
    options = dict(grad=grad, eps=eps, power=power, scale=scale)
    with _entering:
        if not _entered:
            _before.update(sdpa=F.scaled_dot_product_attention,
                           fused=torch.backends.mha.get_fastpath_enabled())
            F.scaled_dot_product_attention = _attend
            CheckpointFunction.apply = _checkpoint
            # nn.TransformerEncoderLayer's fused inference path goes round that function.
            torch.backends.mha.set_fastpath_enabled(False)
        _entered.append(options)
    _inside.options.append(options)
    try:
        yield
    finally:
        _inside.options.pop()
        with _entering:
            # Threads need not leave in the order in which they entered.
            _entered[:] = [other for other in _entered if other is not options]
            if not _entered:
                F.scaled_dot_product_attention = _before["sdpa"]
                del CheckpointFunction.apply
                torch.backends.mha.set_fastpath_enabled(_before["fused"])
