"""attention.py: mechanisms against explicit fp64 formulas; padding, batch mates, precision."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import attention
from precond import precondition

LANDMARKS = 6
MECHANISMS = {"softmax": attention.softmax, "linear": attention.linear,
              "nystrom": partial(attention.nystrom, landmarks=LANDMARKS)}
# Real tokens: fewer than landmarks, as many, more, all; none; a multiple.
LENGTHS = [3, 6, 7, 16, 0, 12]


def draw(*shape, seed=0, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(*shape, generator=generator)).requires_grad_() for _ in range(3)]


def mask_of(lengths, T=16):
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def reference_attention(q, k, v, allowed):
    """softmax(Q K^T / sqrt(d)) V in fp64; allowed: bool, True where query i may see key j."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def reference_nystrom(q, k, v, lengths, landmarks):
    """Xiong et al. 2021 in fp64, for samples whose first `lengths` tokens are real.

    Exact softmax for at most `landmarks` of them.
    """
    q, k, v = (x.double() for x in (q, k, v))
    samples = []
    for b, n in enumerate(lengths):
        if n <= landmarks:
            real = torch.arange(q.size(-2)) < n
            samples.append(reference_attention(q[b], k[b], v[b], real))
            continue
        bounds = [math.ceil(j * n / landmarks) for j in range(landmarks + 1)]
        heads = []
        for Q, K, V in zip(q[b], k[b, :, :n], v[b, :, :n]):
            Q = Q / Q.size(-1) ** 0.25
            K = K / K.size(-1) ** 0.25
            segments = list(zip(bounds, bounds[1:]))
            Ql, Kl = (torch.stack([X[i:j].mean(0) for i, j in segments]) for X in (Q, K))
            A = (Ql @ Kl.T).softmax(-1)
            Z = A.T / (A.sum(0).max() * A.sum(1).max())
            I = torch.eye(landmarks, dtype=torch.float64)  # noqa: E741
            for _ in range(6):
                Z = Z @ (13 * I - A @ Z @ (15 * I - A @ Z @ (7 * I - A @ Z))) / 4
            heads.append((Q @ Kl.T).softmax(-1) @ Z @ (Ql @ K.T).softmax(-1) @ V)
        samples.append(torch.stack(heads))
    return torch.stack(samples)


def reference_linear(q, k, v, allowed):
    """Katharopoulos et al. 2020 in fp64, with all weights phi(q_i) . phi(k_j) written out."""
    q, k, v = (x.double() for x in (q, k, v))
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    weights = (phi(q) @ phi(k).mT).masked_fill(~allowed, 0.0)
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def compare(out, expected, inputs, rows=None, rtol=1e-4, atol=1e-5):
    """Values and gradients of fp32 `out` and fp64 `expected`, in `rows` (B, T) where given."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    if rows is not None:
        weight = weight * rows[:, None, :, None]
        out, expected = (x * rows[:, None, :, None] for x in (out, expected))
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(got, wanted, rtol=10 * rtol, atol=10 * atol)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mechanism, reference", [
    (attention.softmax, reference_attention), (attention.linear, reference_linear)])
def test_softmax_and_linear_are_their_formulas(mechanism, reference, masked, is_causal):
    q, k, v = draw(2, 3, 7, 5)
    allowed = torch.ones(7, 7, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    mask = None
    if masked:
        mask = mask_of([7, 4], 7)
        allowed = allowed & mask[:, None, None, :]
    compare(mechanism(q, k, v, mask, is_causal=is_causal), reference(q, k, v, allowed), (q, k, v))


@pytest.mark.parametrize("T", [7, 12, 13, 23])
@pytest.mark.parametrize("landmarks", [1, 5, 6])
def test_nystrom_is_the_formula_without_a_mask(T, landmarks):
    q, k, v = draw(2, 3, T, 4)
    out = attention.nystrom(q, k, v, landmarks=landmarks)
    compare(out, reference_nystrom(q, k, v, [T, T], landmarks), (q, k, v))


def test_nystrom_is_the_formula_with_segments_of_real_tokens():
    q, k, v = draw(len(LENGTHS), 3, 16, 4)
    mask = mask_of(LENGTHS)
    out = attention.nystrom(q, k, v, mask, landmarks=LANDMARKS)
    compare(out, reference_nystrom(q, k, v, LENGTHS, LANDMARKS), (q, k, v), rows=mask)


def test_real_tokens_need_not_come_first():
    q, k, v = draw(1, 2, 16, 4)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [1, 2, 5, 7, 8, 9, 12, 13, 15]] = True
    for mechanism in MECHANISMS.values():
        alone = mechanism(*(x[:, :, mask[0]] for x in (q, k, v)))
        together = mechanism(q, k, v, mask)[:, :, mask[0]]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("landmarks", [16, 17])
@pytest.mark.parametrize("masked", [False, True])
def test_nystrom_with_a_landmark_a_token_is_softmax(landmarks, masked):
    q, k, v = draw(len(LENGTHS), 3, 16, 4)
    mask = mask_of(LENGTHS) if masked else None
    out = attention.nystrom(q, k, v, mask, landmarks=landmarks)
    assert torch.equal(out, attention.softmax(q, k, v, mask))


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_sample_does_not_depend_on_its_batch_mates_or_padding(name):
    """Nor does its gradient: whatever stands at the padding, it is not seen and not moved."""
    mechanism = MECHANISMS[name]
    inputs = draw(len(LENGTHS), 3, 16, 4)
    mask = mask_of(LENGTHS)
    real = mask[:, None, :, None]
    noise = torch.randn(len(LENGTHS), 3, 16, 4, generator=torch.Generator().manual_seed(1))
    out = mechanism(*inputs, mask)
    grads = torch.autograd.grad((out * noise * real).sum(), inputs)
    loud = mechanism(*(torch.where(real, x, 1e3 * noise) for x in inputs), mask)
    for b, n in enumerate(LENGTHS):
        alone = [x[b:b + 1, :, :n].detach().requires_grad_() for x in inputs]
        single = mechanism(*alone)
        torch.testing.assert_close(out[b:b + 1, :, :n], single, rtol=1e-4, atol=1e-5)
        parts = torch.autograd.grad((single * noise[b:b + 1, :, :n]).sum(), alone)
        for whole, part in zip(grads, parts):
            torch.testing.assert_close(whole[b:b + 1, :, :n], part, rtol=1e-3, atol=1e-4)
            assert not whole[b, :, n:].any()
        torch.testing.assert_close(loud[b, :, :n], out[b, :, :n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MECHANISMS)
def test_no_real_token_gives_zeros_and_no_gradient(name):
    inputs = draw(2, 3, 16, 4)
    out = MECHANISMS[name](*inputs, mask_of([0, 16]))
    assert not out[0].any() and out[1].isfinite().all()
    for grad in torch.autograd.grad(out.square().sum(), inputs):
        assert not grad[0].any() and grad.isfinite().all() and grad[1].any()


@pytest.mark.parametrize("name, options", [
    ("nystrom", dict(landmarks=6)), ("nystrom", dict(landmarks=16)),
    ("linear", {}), ("linear", dict(is_causal=True))])
def test_float32_inside_whatever_the_autocast(name, options):
    function = attention.MECHANISMS[name].function
    inputs = [x.detach().bfloat16() for x in draw(2, 3, 16, 4)]
    mask = mask_of([16, 9])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(*inputs, mask, **options)
    assert out.dtype == torch.bfloat16
    full = function(*(x.float() for x in inputs), mask, **options)
    assert torch.equal(out, full.bfloat16())


def test_nystrom_takes_the_start_of_each_matrix():
    """The pseudo-inverse of a matrix is the same whatever stands beside it in the batch."""
    a = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    a[0] = torch.eye(5)
    a[1] = 0.2
    together = attention.pseudo_inverse(a)
    for matrix, z in zip(a, together):
        torch.testing.assert_close(z, attention.pseudo_inverse(matrix), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[0], torch.eye(5))  # converged where that is easy
    torch.testing.assert_close(together[1], torch.full((5, 5), 0.2))  # of rank 1


def test_nystrom_refuses_to_be_causal():
    words = "not causal: its landmarks average over future tokens. Use softmax or linear"
    with pytest.raises(ValueError, match=words):
        attention.nystrom(*draw(1, 1, 4, 4), landmarks=2, is_causal=True)


def test_preconditioned_linear_attention_does_not_depend_on_its_denominator():
    """C takes any positive factor of a row away."""
    q, k, v = (x.detach() for x in draw(2, 3, 16, 4))
    numerator = (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v)
    for eps in (1e-6, 5.0):
        out = precondition(attention.linear(q, k, v, eps=eps))
        torch.testing.assert_close(out, precondition(numerator), rtol=1e-4, atol=1e-5)
