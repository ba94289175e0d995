"""Preconditioned attention for any module: C acts on what enters its output projection.

That input (..., T, n_head D) is the heads' outputs side by side, so C can act there wherever the
attention itself was computed. What a model adds to a head's output before the projection (a query
in MViTv2, a relative term in CoaT, a convolution in Nystromformer) is part of A then.
"""
import re
import threading
from contextlib import AbstractContextManager

import torch
import torch.nn as nn

from precond import calls_done, check_constants, note, scale_rows

ATTENTION = re.compile(r"att(n|ention|ending)|xca", re.IGNORECASE)  # in a class's or module's name
PROJECTIONS = ("o", "o_proj", "out_proj", "output_proj", "c_proj", "proj", "proj_out", "to_out",
               "out_lin", "out_project", "wo", "post_proj", "projection", "output", "dense",
               "last_layer", "fc_out", "fc_o", "out", "attention_out")
LAYERS = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Sequential")  # ends of a projection's class name
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead", "num_head")
WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head", "dim_per_head")
OTHER_PLACES = {  # classes whose heads do not enter the projection as they are: where they enter
    "LevitAttention": "activation", "LevitAttentionSubsample": "activation",
    "Attention2d": "act", "Attention2dDownsample": "act",  # EfficientFormerV2
    "BottleneckAttn": "pool", "HaloAttn": "pool"}  # without a projection
REFUSED = {
    "OutlookAttention": "its heads are folded over neighbouring tokens before the projection",
    "CascadedGroupAttention": "each head's output enters the next head",
}


class Elsewhere(threading.local):
    """How often this thread has preconditioned in another way than by one handle's hooks."""
    own = 0  # by these

    def calls(self) -> int:
        return calls_done() - self.own


class Wrapped(AbstractContextManager):
    """What `wrap` did: `attached` {name of a projection: n_head}, `left` [names], `remove()`."""

    def __init__(self, model: nn.Module):
        self.kind = type(model).__name__
        self.attached: dict[str, int] = {}
        self.left: list[str] = []
        # Projections that no forward pass has called yet, and whether their attention ran.
        self.unused: dict[str, bool] = {}
        self.hooks = []

    def remove(self):
        """Take C out of the model again."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def __exit__(self, *_):
        self.remove()

    def __repr__(self):
        heads = "".join(f"\n  {name}: {n} heads" for name, n in self.attached.items())
        left = "".join(f"\n  {name}: left" for name in self.left)
        return f"{self.kind}, preconditioned before{heads}{left}"

    def all_used(self, *_):
        # Attention that did not run is no mistake: a cross-attention without a second input.
        if unused := [name for name, ran in self.unused.items() if ran]:
            raise RuntimeError(
                f"{self.kind} did not call {', '.join(unused)} in its forward pass: C "
                "cannot act there (nn.MultiheadAttention and some others use the weight alone). "
                "Leave it out by a pattern of your own")


def wrap(model: nn.Module, pattern: str | None = None, heads: int | None = None, *,
         grad: bool = False, eps: float = 1e-8, power: float = 1.0, scale: float | str = 1.0
         ) -> Wrapped:
    """Precondition the input of each attention's output projection, until handle.remove().

        handle = precond.wrap(model)                            # print(handle) tells what it found
        with precond.wrap(model, r"attn\\.proj$", heads=8): ...  # these modules, for a while

    Without a pattern (a regular expression for the names of modules) the projections are found by
    their names and their parents', the head counts by the parents' attributes. ValueError where
    nothing is found, a head count is unknown or does not divide the width, or the model is already
    compiled: compile it afterwards. RuntimeError in a forward pass whose attention never called its
    projection, or where another way has already preconditioned its input.
    """
    check_constants(power, scale)
    if heads is not None and heads < 1:
        raise ValueError(f"heads={heads}: give the number of heads, 1 or more")
    modules = dict(model.named_modules())
    if any(hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None)
           for module in modules.values()):
        raise ValueError("a compiled model does not see new hooks: wrap the model, then compile it")
    handle = Wrapped(model)
    if pattern is None:
        found = [name for name in modules if is_projection(name, modules)]
    else:
        found = [name for name in modules if name and re.search(pattern, name)]
    for name in found:
        owner = attention_of(name, modules)
        if why := REFUSED.get(type(modules[owner]).__name__):
            raise ValueError(f"{name}: {type(modules[owner]).__name__} cannot be wrapped: {why}. "
                             "Leave it out by a pattern of your own")
        n = heads or head_count(name, modules)
        if n is None:
            raise ValueError(f"{name}: how many heads has it? Give heads=, and a pattern that "
                             "matches projections with as many")
        width = input_width(modules[name])
        if width and width % n:
            raise ValueError(f"{name} has {width} inputs, which {n} heads do not divide")
        handle.attached[name] = n
    owners = {attention_of(name, modules) for name in found}
    handle.left = [name for name, module in modules.items()
                   if ATTENTION.search(type(module).__name__) and name and not any(
                       name == o or name.startswith(o + ".") or o.startswith(name + ".")
                       for o in owners)]
    if not found:
        left = f", but {', '.join(handle.left[:8])} look like attention" if handle.left else ""
        raise ValueError(f"no output projection was found in {handle.kind}{left}: give a pattern "
                         "for their names, and heads")
    elsewhere = Elsewhere()
    for name in found:  # now that nothing more is refused
        attach(handle, name, modules, elsewhere, (grad, eps, power, scale))
    handle.unused = dict.fromkeys(found, False)
    handle.hooks.append(model.register_forward_hook(handle.all_used))
    return handle


def attach(handle: Wrapped, name: str, modules: dict, elsewhere: Elsewhere, options: tuple):
    module, n_head = modules[name], handle.attached[name]
    owner = attention_of(name, modules)
    layer = first_layer(module)
    if not hasattr(layer, "weight"):  # an activation
        layer = first_layer(modules[owner])
    channels_last = not isinstance(layer, nn.Conv1d | nn.Conv2d)
    # NesT writes the features of a head apart, (D, n_head), not (n_head, D).
    apart = type(modules[owner]).__module__ == "timm.models.nest"
    began = threading.local()  # .calls: those of elsewhere when the attention began

    def start(*_):
        if name in handle.unused:
            handle.unused[name] = True
        if not torch.compiler.is_compiling():  # a count would be a reason to compile again
            began.calls = elsewhere.calls()

    def precondition_heads(_, args):
        handle.unused.pop(name, None)
        if not args:
            raise ValueError(f"{name} is called with keyword arguments alone: give it its input as "
                             "the first, without a name")
        x = args[0]
        if not channels_last:
            x = x.movedim(1, -1)
        if x.size(-1) % n_head:
            raise ValueError(f"{name} gets {x.size(-1)} inputs, which {n_head} heads do not divide")
        counts = not torch.compiler.is_compiling()
        if counts and getattr(began, "calls", None) not in (None, elsewhere.calls()):
            raise RuntimeError(f"the attention of {name} is preconditioned already, in another "
                               "way: use one of them")
        a = x.unflatten(-1, (-1, n_head)).mT if apart else x.unflatten(-1, (n_head, -1))
        ca = scale_rows(a, *options)  # (..., T, n_head, D)
        before = heads_first(a)
        note(before, before if ca is a else heads_first(ca))
        if counts:
            elsewhere.own += ca is not a
            began.calls = None
        if ca is a:
            return None
        out = (ca.mT if apart else ca).flatten(-2)
        return (out if channels_last else out.movedim(-1, 1), *args[1:])

    handle.hooks += [modules[owner].register_forward_pre_hook(start),
                     module.register_forward_pre_hook(precondition_heads)]


def heads_first(a: torch.Tensor) -> torch.Tensor:
    """(B, ..., n_head, D) -> (B, n_head, T, D), T over all that stands between."""
    return a.flatten(1, -3).transpose(1, 2) if a.dim() > 3 else a.transpose(0, 1)


def parents(name: str) -> list[str]:
    """The names of what holds a module, from the nearest to the model itself, ""."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def looks_like_attention(name: str, modules: dict) -> bool:
    last = name.rsplit(".", 1)[-1]
    return bool(name) and bool(ATTENTION.search(last)
                               or ATTENTION.search(type(modules[name]).__name__))


def is_projection(name: str, modules: dict) -> bool:
    """One of the usual names, in an attention or in the `output` of one, as BERT has it."""
    parent, last = parents(name)[0] if name else "", name.rsplit(".", 1)[-1]
    place = OTHER_PLACES.get(type(modules[parent]).__name__)
    if place is not None:
        return last == place
    if last not in PROJECTIONS or not type(modules[name]).__name__.endswith(LAYERS):
        return False
    if isinstance(modules[parent], nn.MultiheadAttention):  # uses the weight without the module
        return False
    if parent.split(".")[-1] == "output":
        parent = parents(parent)[0]
    return looks_like_attention(parent, modules)


def attention_of(name: str, modules: dict) -> str:
    """The nearest module around a projection that looks like attention, or the model, ""."""
    around = parents(name)
    if around[0].split(".")[-1] == "output":
        around = around[1:]
    return next((parent for parent in around if looks_like_attention(parent, modules)), "")


def head_count(name: str, modules: dict) -> int | None:
    """From the attributes of the attention, of its parts or of its configuration."""
    owner = attention_of(name, modules)
    parts = [part for part in modules if part and parents(part)[0] == owner]
    holders = [modules[n] for n in (parents(name)[0], owner, *parts)]

    def first(attributes, holders) -> int | None:
        values = (getattr(holder, name, None) for holder in holders for name in attributes)
        return next((value for value in values if type(value) is int and value > 0), None)
    if n := first(HEADS, holders):
        return n
    width, one_head = input_width(modules[name]), first(WIDTHS, holders)
    if width and one_head:
        return width // one_head
    return first(HEADS, [holder.config for holder in holders if hasattr(holder, "config")])


def first_layer(module: nn.Module) -> nn.Module:
    """The first with a weight."""
    return next((m for m in module.modules() if hasattr(m, "weight")), module)


def input_width(module: nn.Module) -> int | None:
    layer = first_layer(module)
    if hasattr(layer, "in_features"):
        return layer.in_features
    if hasattr(layer, "in_channels"):
        return layer.in_channels
    # transformers' Conv1D holds (inputs, outputs).
    return len(layer.weight) if type(layer).__name__ == "Conv1D" else None
