"""The nearest orthogonal matrix, roughly: what Muon makes of a gradient.

For G = U S V^T it is U V^T. Newton-Schulz iterations come near it by matrix products alone (Jordan
et al. 2024, https://kellerjordan.github.io/posts/muon):

    X_0 = G / ||G||_F,   X_(k+1) = a X_k + b (X_k X_k^T) X_k + c (X_k X_k^T)^2 X_k

Each singular value x goes through a x + b x^3 + c x^5, the singular vectors stay. torch.optim.Muon
takes five such steps with one (a, b, c). Here each step has its own, and three are enough (Amsel et
al. 2025, arXiv 2505.16932): of all such polynomials the one nearest to 1 where the values of the
step before lie, which is [0.005, 1] at first. The smallest values grow by 103, those from 0.005 on
end between 0.5 and 1.5, with bfloat16's rounding below 3. That serves training as well.
"""
import torch

COEFFICIENTS = ((8.2987, -24.4305, 18.0903), (3.9152, -2.9211, 0.5592), (3.1746, -2.3804, 0.4978))


def orthogonalise(g: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) -> the same shape and dtype, each matrix with singular values near 1.

    All matrices of a stack go through one sequence of products. A zero matrix stays zero.
    """
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
    # Beyond 1 the polynomials are steep: a value that rounding has lifted to 1.004 ends at 50.
    margin = 1 + 2 * torch.finfo(g.dtype).eps
    x = g / (margin * norm.clamp(min=1e-7))
    wide = max(x.shape[-2:]) >= 2 * min(x.shape[-2:])
    return by_gram(x) if wide else by_products(x)


def by_products(x: torch.Tensor) -> torch.Tensor:
    for coefficients in COEFFICIENTS:
        x = times(polynomial(gram_matrix(x), *coefficients), x)
    return x


def by_gram(x: torch.Tensor) -> torch.Tensor:
    """The same with all iterations on the small X X^T and one product with X at the end.

    X_k is P_k X_0 with a polynomial P_k in X_0 X_0^T, and X_k X_k^T is P_k^2 X_0 X_0^T, because
    polynomials in one matrix commute. For (C, 4 C) it takes 0.63 of the multiplications.
    """
    gram = gram_matrix(x)
    first, *others = COEFFICIENTS
    product = step = polynomial(gram, *first)
    for coefficients in others:
        gram = step @ gram @ step
        step = polynomial(gram, *coefficients)
        product = step @ product
    return times(product, x)


def gram_matrix(x: torch.Tensor) -> torch.Tensor:
    """X X^T, of a tall matrix X^T X: (n, rows, columns) -> (n, short, short)."""
    return x.mT @ x if is_tall(x) else x @ x.mT


def times(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """P X, of a tall matrix X P^T, without a transposed copy."""
    return x @ p.mT if is_tall(x) else p @ x


def is_tall(x: torch.Tensor) -> bool:
    return x.size(-2) > x.size(-1)


def polynomial(gram: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """a I + b G + c G^2."""
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result
