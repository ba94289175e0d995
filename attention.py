"""Attention mechanisms: each a function of q, k, v (B, n_head, T, head_dim) -> head output of q's shape.

`mask` is (B, T) bool over the keys, True = a real token, or None; `is_causal` is apart from it. A sample's real tokens get the same
output alone and in any batch. To add a mechanism, write such a function, enter it in MECHANISMS, and add its name to `attention` in
model.ModelConfig.

    softmax    softmax(Q K^T / sqrt(head_dim)) V                     Vaswani et al. 2017
    nystrom    a low-rank form of it through landmarks               Xiong et al. 2021, arXiv 2102.03902
    linear     phi(Q) phi(K)^T V / (phi(Q) phi(K)^T 1), elu + 1      Katharopoulos et al. 2020, arXiv 2006.16236
"""
import torch
import torch.nn.functional as F

PINV_ITERATIONS = 6  # unconverged on purpose: a regularised inverse; many more blow up in float32 on ill-conditioned matrices


def softmax(q, k, v, mask=None, *, is_causal: bool = False, dropout_p: float = 0.0) -> torch.Tensor:
    """Through PyTorch's fused kernels. A sample without any real token gives zeros."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
    mask = mask[:, None, None, :]  # (B, 1, 1, T)
    if is_causal:
        T = q.size(-2)
        mask = mask & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def nystrom(q, k, v, mask=None, *, landmarks: int, is_causal: bool = False, dropout_p: float = 0.0) -> torch.Tensor:
    """softmax(Q Kl^T) pinv(softmax(Ql Kl^T)) softmax(Ql K^T) V, where Ql, Kl are means over `landmarks` segments of the real tokens.

    Segments are as even as whole tokens allow. A sample of at most `landmarks` real tokens gets exact softmax attention. In float32
    whatever the autocast; dropout_p is not used. Not causal: a landmark mixes the future into the past.
    """
    if is_causal:
        raise ValueError("nystrom attention is not causal: its landmarks average over future tokens. Use softmax or linear")
    with torch.autocast(q.device.type, enabled=False):
        dtype, (q, k, v) = q.dtype, (x.float() for x in (q, k, v))
        T = q.size(-2)
        if T <= landmarks:
            return softmax(q, k, v, mask).to(dtype)
        segments = segment_means(mask if mask is not None else torch.ones(1, T, dtype=torch.bool, device=q.device), landmarks)
        scale = q.size(-1) ** -0.25
        ql, kl = scale * (segments @ q), scale * (segments @ k)  # (B, n_head, landmarks, head_dim)
        to_landmarks = (scale * q @ kl.mT).softmax(dim=-1)  # (B, n_head, T, landmarks)
        between = pseudo_inverse((ql @ kl.mT).softmax(dim=-1))  # (B, n_head, landmarks, landmarks)
        keys = None if mask is None else mask[:, None, None, :]
        from_landmarks = F.scaled_dot_product_attention(ql, scale * k, v, attn_mask=keys, scale=1.0)  # (B, n_head, landmarks, head_dim)
        out = to_landmarks @ (between @ from_landmarks)
        if mask is not None:
            short = mask.sum(dim=1) <= landmarks
            if short.any():
                out = out.index_put((short,), softmax(q[short], k[short], v[short], mask[short]))
        return out.to(dtype)


def segment_means(mask: torch.Tensor, landmarks: int) -> torch.Tensor:
    """(B, T) bool -> (B, 1, landmarks, T) weights that average each of `landmarks` segments of a sample's real tokens."""
    rank = mask.cumsum(dim=1) - 1
    segment = rank * landmarks // mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, T)
    member = (segment[:, None] == torch.arange(landmarks, device=mask.device)[:, None]) & mask[:, None]  # (B, landmarks, T)
    weights = member.float()
    return (weights / weights.sum(dim=-1, keepdim=True).clamp(min=1))[:, None]


def pseudo_inverse(a: torch.Tensor) -> torch.Tensor:
    """Approximate pinv of each (n, n) matrix: PINV_ITERATIONS steps of Razavi et al. 2014, from a start of its own for each matrix."""
    identity = torch.eye(a.size(-1), dtype=a.dtype, device=a.device)
    z = a.mT / (a.abs().sum(dim=-2).amax(dim=-1) * a.abs().sum(dim=-1).amax(dim=-1))[..., None, None]
    for _ in range(PINV_ITERATIONS):
        az = a @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


def linear(q, k, v, mask=None, *, is_causal: bool = False, dropout_p: float = 0.0, eps: float = 1e-6) -> torch.Tensor:
    """O(T) for an encoder; the causal form is written with the (T, T) matrix. In float32 whatever the autocast; dropout_p is not used."""
    with torch.autocast(q.device.type, enabled=False):
        dtype, (q, k, v) = q.dtype, (x.float() for x in (q, k, v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if mask is not None:
            k = k * mask[:, None, :, None]
        if is_causal:
            scores = (q @ k.mT).tril()  # (B, n_head, T, T)
            out = scores @ v / (scores.sum(dim=-1, keepdim=True) + eps)
        else:
            out = q @ (k.mT @ v) / (q @ k.sum(dim=-2)[..., None] + eps)
        return out.to(dtype)


MECHANISMS = {"softmax": softmax, "nystrom": nystrom, "linear": linear}
