"""Attention mechanisms: each a function of q, k, v (B, n_head, T, head_dim) -> head output of q's shape.

`mask` is (B, T) bool over the keys, True = a real token, or None; `is_causal` is apart from it. To add a mechanism, write such a
function, enter it in MECHANISMS, and add its name to `attention` in model.ModelConfig.
"""
import torch
import torch.nn.functional as F


def softmax(q, k, v, mask=None, *, is_causal: bool = False, dropout_p: float = 0.0) -> torch.Tensor:
    """softmax(Q K^T / sqrt(head_dim)) V through PyTorch's fused kernels. A sample without any real token gives zeros."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
    mask = mask[:, None, None, :]  # (B, 1, 1, T)
    if is_causal:
        T = q.size(-2)
        mask = mask & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


MECHANISMS = {"softmax": softmax}
