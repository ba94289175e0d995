"""Whether C reaches every attention of a model."""
import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from precond import record


class Watch(TorchDispatchMode):
    """Notices each softmax over three or more dimensions, and PyTorch's own attention kernels.

    Several in one call of a module, as in Nystrom's attention, are one attention. It is reached if
    something is preconditioned before another module's turn comes.
    """

    def __init__(self, calls: list):
        super().__init__()
        self.calls = calls  # of record()
        self.running: list[tuple[str, torch.nn.Module, tuple]] = []  # one entry a module call
        self.pending = None  # the module call whose attention has not been seen to be reached
        self.before = 0  # how many were preconditioned before it
        self.missed: dict[str, None] = {}  # names in their order
        self.channels: dict[str, None] = {}

    def done(self) -> int:
        return sum(before is not after for before, after in self.calls)  # power=0: one twice

    def settle(self):
        if self.pending is None:
            return
        name, module, args = self.pending
        if self.done() == self.before:
            self.missed[name] = None
        elif rows_are_channels(args, self.calls[-1][0]):
            self.channels[name] = None
        self.pending = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_attention(func, args):
            # A softmax that is a module belongs to the one that holds it.
            call = next((call for call in reversed(self.running)
                         if not isinstance(call[1], torch.nn.Softmax)), None)
            if call is not self.pending or self.done() > self.before:
                self.settle()
                self.pending = call
                self.before = self.done()
        return func(*args, **kwargs or {})


def is_attention(func, args: tuple) -> bool:
    name = func._schema.name
    if "backward" in name:
        return False
    kernel = any(part in name for part in ("scaled_dot_product", "native_multi_head_attention",
                                           "transformer_encoder_layer_fwd"))
    return kernel or (name in ("aten::_softmax", "aten::_safe_softmax") and args[0].dim() >= 3)


def rows_are_channels(args: tuple, a: torch.Tensor) -> bool:
    """A module got tokens (B, N, C) and its head outputs (..., n_head, T, D) have T n_head = C."""
    x = next((x for x in args if isinstance(x, torch.Tensor)), None)
    if x is None or x.dim() != 3 or a.dim() < 4:
        return False
    N, C = x.shape[1:]
    heads, T, D = a.shape[-3:]
    return T != N and D == N and heads * T == C


def check(model: torch.nn.Module, *args, **inputs) -> int:
    """Run model(*args, **inputs); how many attention calls were preconditioned.

    RuntimeError where none was; power=0 does not count. A module that computed a softmax over three
    or more dimensions, or called a kernel of PyTorch's, without C after it, is a warning; so are
    head outputs whose rows are channels. Attention without a softmax (linear attention) is not
    seen. It says nothing about another mode than the present one (train or eval, gradients, inside
    precondition_sdpa).
    """
    hooks = []

    def leave(*_):
        watch.running.pop()

    with record() as calls:
        watch = Watch(calls)
        for name, module in model.named_modules():
            def enter(module, inputs, name=name):
                watch.running.append((name or type(module).__name__, module, inputs))

            hooks.append(module.register_forward_pre_hook(enter, prepend=True))
            hooks.append(module.register_forward_hook(leave))
        try:
            with watch:
                model(*args, **inputs)
        finally:
            for hook in hooks:
                hook.remove()
        watch.settle()
    n = watch.done()
    kind = type(model).__name__
    if not n:
        raise RuntimeError(
            f"no attention call of {kind} was preconditioned: give it attn_implementation="
            "'preconditioned', run it inside precondition_sdpa() or call precond.wrap(model), with "
            "a power other than 0; attention that none of them reaches needs precond.precondition "
            "in its own code")
    if watch.missed:
        warnings.warn(f"{n} attention calls of {kind} were preconditioned, but none in "
                      f"{', '.join(watch.missed)}", stacklevel=2)
    if watch.channels:
        warnings.warn(f"rows are channels, not tokens, in {', '.join(watch.channels)}: C "
                      "normalises a channel over the tokens there, which is another method. "
                      "precond.wrap takes tokens", stacklevel=2)
    return n
