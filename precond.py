"""Preconditioned attention: scale the rows of a head's output to lower its condition number.

For one head with output A = attention(Q, K, V), a (T, D) matrix whose row i belongs to token i,

    C  = diag((||A_i||_2 + eps)^-power),  C_ii = 0 where A_i = 0
    A' = C A

replaces A before the heads are concatenated and projected. power = 1 is the paper's
preconditioner (rows of norm 1), power = 0 is plain attention. H. Saratchandran, "Preconditioned
Attention: Enhancing Efficiency in Transformers", AISTATS 2026, arXiv 2603.27153.

    python precond.py    # kappa before and after, for softmax attention of several sharpnesses

This file needs nothing but PyTorch: take it along.
"""
import linecache
import re
import signal
import sys
import warnings
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F

LEARNED_FROM = 0.5  # where a learned power starts
_recordings: list[list] = []
_sdpa = F.scaled_dot_product_attention  # as it was before `precondition_sdpa`


def precondition(a: torch.Tensor, *, grad: bool = False, eps: float = 1e-8,
                 power: float | torch.Tensor = 1.0) -> torch.Tensor:
    """C A for head outputs `a` (..., T, D); same shape and dtype, norms in fp32 (fp64 for fp64).

    grad=False, the paper's recipe, makes C a constant in the backward pass. power=0 returns `a`
    itself. Powers (n_head,) for `a` of shape (B, n_head, T, D) get their gradient either way. A
    zero row stays zero and gets a zero gradient, for the whole training if it starts as one.
    """
    out = _scale_rows(a, grad, eps, power)
    _note(a, out)
    return out


def _scale_rows(a: torch.Tensor, grad: bool, eps: float,
                power: float | torch.Tensor) -> torch.Tensor:
    learned = isinstance(power, torch.Tensor)
    if not learned and power == 0:
        return a
    # Half precision would lose small norms and overflow on large ones.
    dtype = torch.promote_types(a.dtype, torch.float32)
    rows = a if grad else a.detach()  # all of the difference between the paper's C and RMSNorm
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype)  # (..., T, 1)
    zero = norm == 0
    if learned:
        power = power[:, None, None]  # (n_head, 1, 1)
    if grad or learned:
        # The slope of norm^-power is infinite at 0: put 1 there before, and 0 after.
        c = (norm.masked_fill(zero, 1.0) + eps).pow(-power).masked_fill(zero, 0.0)
    else:
        c = (norm + eps).pow_(-power).masked_fill_(zero, 0.0)
    return (a * c).to(a.dtype)


def _note(a: torch.Tensor, out: torch.Tensor):
    """Give (A, C A), (..., T, D), to every `record`; one tensor twice where nothing was done."""
    for recording in _recordings:
        before = a.detach()
        recording.append((before, before if out is a else out.detach()))


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
    which is rank-deficient to fp32; nan where A is not finite.
    """
    a = a.detach().float().cpu().double()
    finite = a.isfinite().all(dim=-1).all(dim=-1)
    s = torch.linalg.svdvals(torch.where(finite[..., None, None], a, 0.0))
    largest, smallest = s[..., 0], s[..., -1]
    kappa = torch.where(smallest <= 2.0**-23 * largest, torch.inf, largest / smallest)
    return torch.where(finite, kappa, torch.nan).float()


# From here on: drop-ins for models that are not this project's.
def preconditioned_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
                             scale=None, enable_gqa=False, *, grad: bool = False,
                             eps: float = 1e-8, power: float = 1.0) -> torch.Tensor:
    """F.scaled_dot_product_attention, preconditioned: queries (..., T, D) -> (..., T, D)."""
    a = _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
              enable_gqa=enable_gqa)
    return precondition(a, grad=grad, eps=eps, power=power)


@contextmanager
def precondition_sdpa(*, grad: bool = False, eps: float = 1e-8, power: float = 1.0):
    """Precondition every call of F.scaled_dot_product_attention made inside.

    The innermost of several counts. Not reached: code that imported the function by name before,
    nn.MultiheadAttention with need_weights=True (its default), TorchScript, attention written out
    by hand. `check` tells.
    """
    replacement = partial(preconditioned_attention, grad=grad, eps=eps, power=power)
    before = F.scaled_dot_product_attention
    fused = torch.backends.mha.get_fastpath_enabled()
    F.scaled_dot_product_attention = replacement
    # nn.TransformerEncoderLayer's fused inference path goes round that function.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
        torch.backends.mha.set_fastpath_enabled(fused)


def register_transformers(name: str = "preconditioned", *, grad: bool = False, eps: float = 1e-8,
                          power: float = 1.0):
    """Add an attention implementation to Hugging Face transformers.

    Then Model._from_config(config, attn_implementation=name): transformers' own SDPA attention,
    with its masks, followed by C. Some models take any name and ignore it: run `check` once. Those
    that SDPA does not serve raise ValueError when they run. Registering a name again changes every
    model that has it. Raises ImportError without transformers.
    """
    try:
        import transformers
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import eager_mask, sdpa_mask
    except ImportError:
        raise ImportError("register_transformers needs transformers: "
                          "pip install 'transformers>=5'") from None
    # What sdpa_attention_forward reads; then what changes nothing in its result.
    understood = """dropout scaling is_causal position_bias cache
        sliding_window position_ids cache_position seq_idx cu_seq_lens_q cu_seq_lens_k max_length_q
        max_length_k deterministic use_cache return_dict output_attentions output_hidden_states
        output_router_logits logits_to_keep num_items_in_batch""".split()

    def attention(module, query, key, value, attention_mask, **kwargs):
        for extra, given in kwargs.items():  # sdpa_attention_forward would drop it unsaid
            if given is not None and extra not in understood:
                raise ValueError(f"{type(module).__name__} passes {extra} to its attention, which "
                                 f"SDPA does not compute: {name!r} cannot serve this model")
        a, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if getattr(F.scaled_dot_product_attention, "func", None) is preconditioned_attention:
            return a, weights  # precondition_sdpa has done it
        # a is (B, T, n_head, D), transposed in memory: scaling it as it lies halves the time.
        ca = _scale_rows(a, grad, eps, power)
        before = a.transpose(1, 2)
        _note(before, before if ca is a else ca.transpose(1, 2))
        return ca, weights

    @cache
    def knows_sdpa(config_class):
        """Whether models with such a configuration attend by SDPA. Some look for its name."""
        models = [transformers.PreTrainedModel]
        for model in models:  # grows meanwhile
            models += model.__subclasses__()
        models = [model for model in models if model.config_class is config_class]
        files = {getattr(sys.modules.get(model.__module__), "__file__", "") for model in models}
        code = "".join("".join(linecache.getlines(file)) for file in files)
        if re.search(r"_attn_implementation (==|!=|in|not in) .*['\"]sdpa", code):
            raise ValueError(f"the models of {config_class.__name__} test for the name 'sdpa': "
                             "keep that name for them, and run them inside precondition_sdpa()")
        return not models or any(model._supports_sdpa for model in models)

    # torch.compile is not to trace the reading of files.
    look_up = torch.compiler.assume_constant_result(lambda config_class: knows_sdpa(config_class))

    def mask(*args, config, **kwargs):
        # SDPA may get no mask where is_causal says it: other code would attend to the future.
        make = sdpa_mask if look_up(type(config)) else eager_mask
        return make(*args, config=config, **kwargs)

    transformers.AttentionInterface.register(name, attention)
    transformers.AttentionMaskInterface.register(name, mask)


def check(model: torch.nn.Module, *args, **inputs) -> int:
    """Run model(*args, **inputs); how many attention calls were preconditioned.

    RuntimeError where none was; power=0 does not count. It says nothing about another mode than
    the present one (train or eval, gradients, inside precondition_sdpa). A module named like
    attention in which no call was preconditioned, beside others in which one was, is a warning.
    """
    reached = {}  # by module: whether a call inside it was preconditioned
    entered = []  # counts at the modules that are running

    def count():
        return sum(before is not after for before, after in calls)  # power=0: one tensor twice

    def leave(module, *_):
        reached[module] = count() > entered.pop() or reached.get(module, False)

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda *_: entered.append(count())))
        hooks.append(module.register_forward_hook(leave))
    try:
        with record() as calls:
            model(*args, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    n = count()
    kind = type(model).__name__
    if not n:
        raise RuntimeError(
            f"no attention call of {kind} was preconditioned: give it attn_implementation="
            "'preconditioned' or run it inside precondition_sdpa(), with a power other than 0; "
            "attention that goes round SDPA needs precond.precondition in its own code")
    missed = [name for name, module in model.named_modules()
              if "attention" in type(module).__name__.lower() and not reached.get(module, True)]
    if missed:
        warnings.warn(f"{n} attention calls of {kind} were preconditioned, but none in "
                      f"{', '.join(missed)}", stacklevel=2)
    return n


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
