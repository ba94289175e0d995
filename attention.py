"""Attention mechanisms: functions of q, k, v (B, n_head, T, head_dim) -> head output of q's shape.

    softmax    softmax(Q K^T / sqrt(head_dim)) V                    Vaswani et al. 2017
    nystrom    a low-rank form of it through landmarks              Xiong et al. 2021
    linear     phi(Q) phi(K)^T V / (phi(Q) phi(K)^T 1), elu + 1     Katharopoulos et al. 2020

`mask` (B, T) bool says which keys are real tokens; None means all. `is_causal` adds the causal
mask to it. A sample's real tokens get the same output alone and in any batch. With cached keys and
values q is the last of their tokens alone, without is_causal: count positions from the end.

To add a mechanism, write such a function and enter it in MECHANISMS.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

PINV_ITERATIONS = 6  # unconverged on purpose, a regularised inverse; many more blow up in float32


def rotations(place: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (T,) or (B, T) -> cosine and sine of the angles by which `rotate` turns.

    Each (T, head_dim / 2) or (B, 1, T, head_dim / 2), fp32. The pairs turn at rates from 1 radian a
    token down to nearly 1 / 10000 (Su et al. 2021, arXiv 2104.09864).
    """
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2, device=place.device) / head_dim)
    angles = place[..., None] * rates
    if place.dim() == 2:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Queries or keys (B, n_head, T, D), turned: their products see relative places only."""
    cos, sin = (part.to(x.dtype) for part in turns)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def softmax(q, k, v, mask=None, *, is_causal: bool = False, dropout_p: float = 0.0):
    """Through PyTorch's fused kernels. A sample without any real token gives zeros."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
    mask = mask[:, None, None, :]  # (B, 1, 1, T)
    if is_causal:
        T = q.size(-2)
        mask = mask & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # (B, 1, T, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def nystrom(q, k, v, mask=None, *, landmarks: int, is_causal: bool = False, dropout_p: float = 0.0):
    """softmax(Q Kl^T) pinv(softmax(Ql Kl^T)) softmax(Ql K^T) V.

    Ql and Kl are means over `landmarks` segments of the real tokens, as even as whole tokens
    allow. A sample of at most `landmarks` real tokens gets exact softmax attention. In float32
    whatever the autocast, without dropout. ValueError for is_causal.
    """
    if is_causal:  # a landmark mixes the future into the past
        raise ValueError("nystrom attention is not causal: its landmarks average over future "
                         "tokens. Use softmax or linear")
    dtype = q.dtype
    T = q.size(-2)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.float(), k.float(), v.float()
        if T <= landmarks:
            return softmax(q, k, v, mask).to(dtype)
        real = mask if mask is not None else torch.ones(1, T, dtype=torch.bool, device=q.device)
        segments = segment_means(real, landmarks)  # (B, 1, landmarks, T)
        # Half of the usual 1 / sqrt(head_dim) on each side of every product.
        scale = q.size(-1) ** -0.25
        ql = scale * (segments @ q)  # (B, n_head, landmarks, head_dim)
        kl = scale * (segments @ k)
        to_landmarks = (scale * q @ kl.mT).softmax(dim=-1)  # (B, n_head, T, landmarks)
        between = pseudo_inverse((ql @ kl.mT).softmax(dim=-1))  # (B, n_head, landmarks, landmarks)
        keys = None if mask is None else mask[:, None, None, :]
        from_landmarks = F.scaled_dot_product_attention(
            ql, scale * k, v, attn_mask=keys, scale=1.0)  # (B, n_head, landmarks, head_dim)
        out = to_landmarks @ (between @ from_landmarks)
        if mask is not None:
            # Samples with fewer real tokens than landmarks have empty segments.
            short = mask.sum(dim=1) <= landmarks
            if short.any():
                exact = softmax(q[short], k[short], v[short], mask[short])
                out = out.index_put((short,), exact)
        return out.to(dtype)


def segment_means(mask: torch.Tensor, landmarks: int) -> torch.Tensor:
    """(B, T) bool -> (B, 1, landmarks, T): weights that average each segment's real tokens."""
    rank = mask.cumsum(dim=1) - 1
    segment = rank * landmarks // mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, T)
    numbers = torch.arange(landmarks, device=mask.device)[:, None]
    member = (segment[:, None] == numbers) & mask[:, None]  # (B, landmarks, T)
    weights = member.float()
    return (weights / weights.sum(dim=-1, keepdim=True).clamp(min=1))[:, None]


def pseudo_inverse(a: torch.Tensor) -> torch.Tensor:
    """Approximate pinv of each (n, n) matrix, by PINV_ITERATIONS steps of Razavi et al. 2014."""
    identity = torch.eye(a.size(-1), dtype=a.dtype, device=a.device)
    # The iteration converges from A^T / (||A||_1 ||A||_inf), here for each matrix on its own.
    columns = a.abs().sum(dim=-2).amax(dim=-1)
    rows = a.abs().sum(dim=-1).amax(dim=-1)
    z = a.mT / (columns * rows)[..., None, None]
    for _ in range(PINV_ITERATIONS):
        az = a @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


def linear(q, k, v, mask=None, *, is_causal: bool = False, dropout_p: float = 0.0,
           eps: float = 1e-6):
    """O(T) for an encoder, O(T^2) if causal. In float32 whatever the autocast, without dropout."""
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q = F.elu(q.float()) + 1
        k = F.elu(k.float()) + 1
        v = v.float()
        if mask is not None:
            k = k * mask[:, None, :, None]
        if is_causal:
            scores = (q @ k.mT).tril()  # (B, n_head, T, T)
            out = scores @ v / (scores.sum(dim=-1, keepdim=True) + eps)
        else:
            # K^T V first: (head_dim, head_dim), whatever T is.
            out = q @ (k.mT @ v) / (q @ k.sum(dim=-2)[..., None] + eps)
        return out.to(dtype)


@dataclass(frozen=True)
class Mechanism:
    """All that the rest of the code needs to know of a mechanism."""
    function: Callable
    columns: Callable  # ModelConfig -> columns of the attention matrix, for counting FLOPs
    options: tuple[str, ...] = ()  # of ModelConfig, given to the function as keywords
    acausal: str = ""  # why it cannot be causal; empty where it can
    skip: bool = False  # the model adds a convolution of V over time to the head output


MECHANISMS = {
    "softmax": Mechanism(softmax, columns=lambda c: c.block_size),
    "nystrom": Mechanism(nystrom, columns=lambda c: 2 * c.landmarks, options=("landmarks",),
                         acausal="its landmarks average over future tokens", skip=True),
    "linear": Mechanism(linear, columns=lambda c: c.n_embd // c.n_head),
}
