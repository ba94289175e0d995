"""An attention implementation for Hugging Face transformers."""
import linecache
import re
import sys
from functools import cache

from torch.compiler import assume_constant_result

from precond import check_constants, note, scale_rows
from precond_dropin.sdpa import current_options

_answered: set[str] = set()  # names that models with a table of classes answer


def register_transformers(name: str = "preconditioned", *, grad: bool = False, eps: float = 1e-8,
                          power: float = 1.0, scale: float | str = 1.0):
    """Add an attention implementation to Hugging Face transformers.

    Then Model._from_config(config, attn_implementation=name): transformers' own SDPA attention,
    with its masks, followed by C. Some models take any name and ignore it: run `check` once. Those
    that SDPA does not serve raise ValueError when they are made or run. Registering a name again
    changes every model that has it. A model of export.py runs with the C it was trained with alone.
    Raises ImportError without transformers, ValueError for a name that is not free.
    """
    check_constants(power, scale)
    try:
        import transformers
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import eager_mask, sdpa_mask
    except ImportError:
        raise ImportError("register_transformers needs transformers: "
                          "pip install 'transformers>=5'") from None
    taken = ["eager", *transformers.AttentionInterface().valid_keys()]
    if name in taken and name not in _answered:
        raise ValueError(f"{name!r} is an attention implementation already: choose another name")
    # What sdpa_attention_forward reads; then what changes nothing in its result.
    understood = """dropout scaling is_causal position_bias cache
        sliding_window position_ids cache_position seq_idx cu_seq_lens_q cu_seq_lens_k max_length_q
        max_length_k deterministic use_cache return_dict output_attentions output_hidden_states
        output_router_logits logits_to_keep num_items_in_batch""".split()

    def check_exported(module):
        theirs = getattr(getattr(module, "config", None), "preconditioned_attention", None)
        if theirs and (theirs["eps"], theirs["power"], 1) != (eps, power, scale):
            raise ValueError(f"this model was exported with power={theirs['power']} and eps="
                             f"{theirs['eps']}, and {name!r} has power={power}, eps={eps}, "
                             f"scale={scale}: register_transformers(power={theirs['power']}, "
                             f"eps={theirs['eps']}), under a name of its own beside others")

    def attention(module, query, key, value, attention_mask, **kwargs):
        check_exported(module)
        for extra, given in kwargs.items():  # sdpa_attention_forward would drop it unsaid
            if given is not None and extra not in understood:
                raise ValueError(f"{type(module).__name__} passes {extra} to its attention, which "
                                 f"SDPA does not compute: {name!r} cannot serve this model. Give "
                                 "it attn_implementation='eager' and use precond.wrap(model)")
        a, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if current_options() is not None:
            return a, weights  # precondition_sdpa has done it
        # a is (B, T, n_head, D), transposed in memory: scaling it as it lies halves the time.
        ca = scale_rows(a, grad, eps, power, scale)
        before = a.transpose(1, 2)
        note(before, before if ca is a else ca.transpose(1, 2))
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
    look_up = assume_constant_result(lambda config_class: knows_sdpa(config_class))

    def mask(*args, config, **kwargs):
        # SDPA may get no mask where is_causal says it: other code would attend to the future.
        make = sdpa_mask if look_up(type(config)) else eager_mask
        return make(*args, config=config, **kwargs)

    transformers.AttentionInterface.register(name, attention)
    transformers.AttentionMaskInterface.register(name, mask)
    _answer_tables(transformers.PreTrainedModel, name)


def _answer_tables(base: type, name: str):
    """Some models look a class up by the implementation's name: let them say what to do instead."""
    choose = base.get_correct_attn_implementation

    def choose_and_answer(self, requested_attention, *args, **kwargs):
        if requested_attention == name:
            for table in vars(sys.modules[type(self).__module__]).values():
                if isinstance(table, dict) and isinstance(table.get("eager"), type):
                    table.setdefault(name, answer(type(self).__name__, "sdpa" in table))
        return choose(self, requested_attention, *args, **kwargs)

    def answer(model: str, has_sdpa: bool):
        def refuse(*args, **kwargs):
            instead = "'sdpa' inside precondition_sdpa()" if has_sdpa else "'eager'"
            raise ValueError(f"{model} looks its attention up by name, and {name!r} is not in its "
                             f"table: give it attn_implementation={instead}"
                             f"{', or' if has_sdpa else ' and'} use precond.wrap(model)")
        return refuse

    if name not in _answered:
        _answered.add(name)
        base.get_correct_attn_implementation = choose_and_answer
