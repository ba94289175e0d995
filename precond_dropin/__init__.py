"""Preconditioned attention in models that are not this project's.

    precondition_sdpa       a context in which every scaled_dot_product_attention is followed by C
    register_transformers   an attention implementation for Hugging Face transformers
    wrap                    any module with an output projection: C acts on what enters that
    check                   was every attention of a model reached?

All take grad, eps, power and scale as precond.precondition does, and all are names of precond too.
docs/drop_in.md says which way reaches which model.
"""
from precond_dropin.check import check
from precond_dropin.hugging_face import register_transformers
from precond_dropin.sdpa import precondition_sdpa, preconditioned_attention
from precond_dropin.wrap import wrap

__all__ = ["check", "precondition_sdpa", "preconditioned_attention", "register_transformers",
           "wrap"]
