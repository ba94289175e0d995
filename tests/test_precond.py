"""precond.py against explicit fp64 formulas, forward and backward; kappa against numpy."""
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import precond
from conftest import shell
from precond import condition_number, precondition, preconditioned_attention, record

EPS = 1e-8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def formula(a, eps=EPS, power=1.0):
    """C A row by row, in fp64."""
    rows = a.double().reshape(-1, a.size(-1))
    scaled = [row / (row.square().sum().sqrt() + eps) ** power for row in rows]
    return torch.stack(scaled).view(a.shape)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("eps", [EPS, 0.3])
def test_forward(power, eps):
    a = draw(2, 3, 5, 4)
    torch.testing.assert_close(precondition(a, eps=eps, power=power), formula(a, eps, power))
    b = precondition(a.float(), eps=eps, power=power)
    assert b.dtype == torch.float32 and b.shape == a.shape
    torch.testing.assert_close(b.double(), formula(a, eps, power), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_gradient_through_the_norms(power):
    a = draw(2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: precondition(a, grad=True, eps=0.1, power=power), a)
    g = draw(2, 5, 4, seed=1)
    ours, = torch.autograd.grad(precondition(a, grad=True, power=power), a, g)
    theirs, = torch.autograd.grad(formula(a, power=power), a, g)
    torch.testing.assert_close(ours, theirs)
    if power == 1:  # the radial part is removed
        zeros = torch.zeros(2, 5, dtype=torch.float64)
        torch.testing.assert_close((ours * a).sum(-1), zeros, atol=1e-6, rtol=0)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_gradient_with_constant_norms(power):
    """dL/dA = C dL/dA'."""
    a, g = draw(2, 5, 4).requires_grad_(), draw(2, 5, 4, seed=1)
    ours, = torch.autograd.grad(precondition(a, power=power), a, g)
    c = (a.detach().norm(dim=-1, keepdim=True) + EPS) ** -power
    torch.testing.assert_close(ours, c * g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("eps", [EPS, 0.0])
def test_zero_rows(dtype, grad, power, eps):
    """Forward 0, gradient 0, never nan or inf; the other rows do not notice."""
    a = draw(2, 4, 8, dtype=dtype)
    a[0, 1] = a[1] = 0
    a.requires_grad_()
    b = precondition(a, grad=grad, power=power, eps=eps)
    b.backward(torch.ones_like(b))
    zero = (a == 0).all(-1)
    assert zero.sum() == 5 and not b[zero].any() and not a.grad[zero].any()
    assert b.isfinite().all() and a.grad.isfinite().all() and a.grad[~zero].any()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    expected = formula(a.detach()[~zero], power=power)
    torch.testing.assert_close(b[~zero].double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_rows_have_norm_one(dtype, tolerance, scale):
    """Also where the squares leave the half types' range: norms are taken in fp32."""
    b = precondition((scale * draw(3, 6, 64)).to(dtype), eps=0.0)
    assert b.dtype == dtype
    ones = torch.ones(3, 6, dtype=torch.float64)
    torch.testing.assert_close(b.double().norm(dim=-1), ones, atol=tolerance, rtol=0)


def test_power_zero_is_the_input():
    a = draw(3, 4)
    assert precondition(a, power=0) is a and precondition(a, power=0.0, grad=True) is a


def test_invariant_to_positive_factors_per_row():
    """With the gradient through C, factors get no gradient: linear attention's denominator."""
    a, g = draw(2, 5, 4), draw(2, 5, 4, seed=1)
    factors = draw(2, 5, 1, seed=2).exp().requires_grad_()
    torch.testing.assert_close(precondition(factors * a, eps=0.0), precondition(a, eps=0.0))
    assert (precondition(-a) + precondition(a)).abs().max() == 0
    through, = torch.autograd.grad(precondition(factors * a, grad=True, eps=0.0), factors, g)
    constant, = torch.autograd.grad(precondition(factors * a, eps=0.0), factors, g)
    torch.testing.assert_close(through, torch.zeros_like(factors), atol=1e-14, rtol=0)
    assert constant.abs().min() > 1e-3


def test_equals_rms_norm_times_root_d():
    """A' = RMSNorm(A) / sqrt(D). Gradients: the same through C, others with C constant."""
    a, g = draw(3, 5, 16).requires_grad_(), draw(3, 5, 16, seed=1)
    norm = F.rms_norm(a, (16,), eps=0.0) / 4
    torch.testing.assert_close(precondition(a, eps=0.0), norm)
    theirs, = torch.autograd.grad(norm, a, g)
    through, = torch.autograd.grad(precondition(a, eps=0.0, grad=True), a, g)
    constant, = torch.autograd.grad(precondition(a, eps=0.0), a, g)
    torch.testing.assert_close(through, theirs)
    unit = a.detach() / a.detach().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(constant - (constant * unit).sum(-1, keepdim=True) * unit, theirs)
    assert (constant - theirs).abs().max() > 1e-2


def test_rows_are_independent():
    """C uses its own row alone: nothing of a later token reaches an earlier one."""
    a = draw(6, 4).requires_grad_()
    for grad in (False, True):
        gradient, = torch.autograd.grad(precondition(a, grad=grad)[2].sum(), a)
        assert gradient[2].any() and not gradient[[0, 1, 3, 4, 5]].any()


@pytest.mark.parametrize("shape", [(2, 3, 20, 8), (4, 8, 20), (5, 5), (1, 7)])
def test_condition_number(shape):
    a = draw(*shape, dtype=torch.float32)
    kappa = condition_number(a)
    assert kappa.dtype == torch.float32 and kappa.shape == shape[:-2]
    s = np.linalg.svd(a.numpy().astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(kappa.numpy(), s[..., 0] / s[..., -1], rtol=1e-5)


def test_condition_number_of_deficient_and_of_bad_matrices():
    a = draw(5, 20, 8, dtype=torch.float32)
    a[0, :, 3] = a[0, :, 5]  # two equal columns
    a[1] = 0
    a[2, 4, 2] = torch.nan
    a[3, 4, 2] = torch.inf
    kappa = condition_number(a.requires_grad_())
    assert kappa[:2].isinf().all() and kappa[2:4].isnan().all() and 1 < kappa[4] < 100
    assert not kappa.requires_grad
    assert condition_number(torch.diag(torch.tensor([1.0, 2.0**-22]))) == 2.0**22
    assert condition_number(torch.diag(torch.tensor([1.0, 2.0**-23]))) == torch.inf
    # The matrix is taken as it is: no loss beyond its own dtype.
    half = torch.diag(torch.tensor([1.0, 2.0**-13], dtype=torch.bfloat16))
    assert condition_number(half) == 2.0**13


@pytest.mark.parametrize("seed", range(5))
def test_bound(seed):
    """kappa(C A) <= sqrt(T) min_D kappa(D A), for A of full rank without zero rows."""
    T, d = 24, 6
    lengths = (3 * draw(40, T, 1, seed=seed + 100)).exp()  # over several decades
    a = draw(40, T, d, seed=seed) * lengths
    best = condition_number(a)
    for trial in range(20):
        best = torch.minimum(best, condition_number(a * draw(T, 1, seed=trial).exp()))
    after = condition_number(precondition(a))
    assert best.isfinite().all() and (after <= math.sqrt(T) * best).all()
    assert after.median() < 0.1 * condition_number(a).median()


def test_counterexample():
    e = torch.eye(2, dtype=torch.float64)
    a = torch.cat([e, 1e-3 * e[:1].expand(195, 2)])
    assert condition_number(a).item() == pytest.approx(math.sqrt(1 + 195e-6), rel=1e-6)
    assert condition_number(precondition(a)).item() == pytest.approx(math.sqrt(196), rel=1e-5)


@pytest.mark.parametrize("sharpness, before, after", [
    (1, 28.3, 28.4), (3, 9.6, 7.6), (10, 8.6, 7.8)])
def test_gaussian_attention(sharpness, before, after):
    q, k, v = draw(3, 16, 197, 64)
    a = (sharpness * q @ k.mT / 8).softmax(-1) @ v
    assert condition_number(a).median().item() == pytest.approx(before, rel=0.1)
    assert condition_number(precondition(a)).median().item() == pytest.approx(after, rel=0.1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_preconditioned_attention(causal, grad):
    """Softmax attention and C by explicit operations, with a scale and a mask."""
    q, k, v = (t.requires_grad_() for t in draw(3, 2, 4, 6, 8))
    mask = torch.ones(6, 6, dtype=torch.bool).tril() if causal else draw(6, 6, seed=5) > -1
    scores = (q @ k.mT * 0.7).masked_fill(~mask, -torch.inf)
    a = scores.softmax(-1) @ v
    expected = a / (a if grad else a.detach()).norm(dim=-1, keepdim=True)
    options = dict(is_causal=True) if causal else dict(attn_mask=mask)
    ours = preconditioned_attention(q, k, v, scale=0.7, grad=grad, **options)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    g = draw(2, 4, 6, 8, seed=6)
    got = torch.autograd.grad(ours, (q, k, v), g)
    wanted = torch.autograd.grad(expected, (q, k, v), g)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


def test_preconditioned_attention_with_grouped_queries_and_without_any_key():
    q, k, v = draw(2, 4, 6, 8), draw(2, 2, 6, 8, seed=1), draw(2, 2, 6, 8, seed=2)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    grouped = preconditioned_attention(q, k, v, enable_gqa=True, power=0.5)
    torch.testing.assert_close(grouped, preconditioned_attention(q, *repeated, power=0.5))
    none = torch.ones(6, 6, dtype=torch.bool)
    none[2] = False
    v.requires_grad_()
    a = preconditioned_attention(q, k, v, attn_mask=none, enable_gqa=True)
    a.sum().backward()
    assert not a[:, :, 2].any() and a.isfinite().all() and v.grad.isfinite().all()


def test_record():
    a, b = draw(2, 5, 4).requires_grad_(), draw(3, 4)
    with record() as outer:
        out = precondition(a, power=0.5)
        with record() as inner:
            precondition(b, power=0)
        precondition(a)
    precondition(b)
    assert len(outer) == 3 and len(inner) == 1
    assert torch.equal(outer[0][0], a) and torch.equal(outer[0][1], out)
    assert torch.equal(inner[0][0], b) and torch.equal(inner[0][1], b)
    assert torch.equal(outer[1][0], b)
    assert out.requires_grad and not any(x.requires_grad for pair in outer for x in pair)
    with pytest.raises(KeyError), record() as failed:
        raise KeyError
    precondition(b)
    assert not failed


def test_demonstration():
    """python precond.py prints kappa for several sharpnesses and a case where it rises."""
    # In a process of its own: it takes SIGPIPE as it comes, which would end all tests.
    out = shell(precond.__file__).stdout
    rows = {}
    for sharpness, before, after in re.findall(r"^ +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.M):
        rows[float(sharpness)] = float(before), float(after)
    before, after = rows[3.0]
    assert len(rows) >= 4 and after < before
    assert re.search(r"by hand +1\.00 +14\.00", out) and "kappa rises" in out


@pytest.mark.slow
def test_importing_it_prints_nothing():
    imported = shell("-c", "import precond")
    assert imported.stdout == imported.stderr == ""


@pytest.mark.parametrize("grad", [False, True])
def test_learned_power_gets_its_gradient(grad):
    torch.manual_seed(0)
    a = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    a[0, 1, 2] = 0  # a row without length
    power = torch.tensor([0.0, 0.5, 1.3], dtype=torch.float64, requires_grad=True)
    out = precondition(a, grad=grad, eps=0.0, power=power)
    for head, p in enumerate(power.tolist()):
        expected = precondition(a[:, head], eps=0.0, power=p) if p else a[:, head]
        torch.testing.assert_close(out[:, head], expected)
    weight = torch.randn_like(a)
    got, = torch.autograd.grad((out * weight).sum(), power)
    length = a.norm(dim=-1, keepdim=True)
    # d/dp l^-p = -log(l) l^-p
    wanted = (-length.clamp(min=1e-300).log() * out.detach() * weight).sum((0, 2, 3))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("scale", [0.3, "sqrt_d", torch.tensor([0.5, 1.0, 7.0])])
def test_scale_multiplies_and_changes_no_condition_number(scale):
    a = draw(2, 3, 20, 8)
    factor = scale[:, None, None] if isinstance(scale, torch.Tensor) else scale
    factor = math.sqrt(8) if isinstance(scale, str) else factor
    for power in (0.0, 0.5, 1.0):
        scaled = precondition(a, power=power, scale=scale)
        torch.testing.assert_close(scaled, factor * precondition(a, power=power))
        torch.testing.assert_close(condition_number(scaled),
                                   condition_number(precondition(a, power=power)))


def test_root_d_with_gradient_is_rms_norm_without_gain():
    a, g = draw(3, 5, 16).requires_grad_(), draw(3, 5, 16, seed=1)
    ours = precondition(a, grad=True, eps=0.0, scale="sqrt_d")
    theirs = F.rms_norm(a, (16,), eps=0.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, a, g), torch.autograd.grad(theirs, a, g))


@pytest.mark.parametrize("power", [1.0, torch.tensor([0.2, 0.5, 1.3], dtype=torch.float64)])
@pytest.mark.parametrize("grad", [False, True])
def test_learned_scale_gets_its_gradient(grad, power):
    a, g = draw(2, 3, 5, 4), draw(2, 3, 5, 4, seed=1)
    a[0, 1, 2] = 0
    scale = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    out = precondition(a, grad=grad, power=power, scale=scale)
    got, = torch.autograd.grad((out * g).sum(), scale)
    torch.testing.assert_close(got, (precondition(a, power=power) * g).sum((0, 2, 3)))


@pytest.mark.parametrize("options, words", [
    (dict(power=math.nan), "power=nan"), (dict(power=math.inf), "power=inf"),
    (dict(power="learned"), "power='learned'"),
    (dict(scale=math.nan), "scale=nan"), (dict(scale="sqrt"), "scale='sqrt'.*number or 'sqrt_d'")])
def test_what_is_no_number_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        precondition(draw(3, 4), **options)
    with pytest.raises(ValueError, match=words), precond.precondition_sdpa(**options):
        pass
    with pytest.raises(ValueError, match=words):
        precond.wrap(torch.nn.Linear(3, 3), **options)


def test_condition_number_without_entries():
    assert condition_number(torch.zeros(3, 0, 4)).isnan().tolist() == [True] * 3
    assert condition_number(torch.zeros(4, 0)).isnan()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("power", [0.5, 1.0, torch.tensor([0.5, 0.5, 1.0])])
def test_rows_too_long_for_fp32_are_nan_and_not_zero(grad, power):
    a = draw(2, 3, 5, 8, dtype=torch.float32)
    a[0, 1, 2] = 1e19
    a[1, 1, 2] = 0
    out = precondition(a, grad=grad, power=power)
    assert out[0, 1, 2].isnan().all() and out.isnan().sum() == 8 and not out[1, 1, 2].any()


def test_second_derivative_at_zero_rows():
    a = draw(2, 3, 5, 8)
    a[0, 1, 2] = 0
    a.requires_grad_()
    out = precondition(a, grad=True)
    first, = torch.autograd.grad(out.pow(3).sum(), a, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), a)
    assert second.isfinite().all() and not second[0, 1, 2].any() and second[0, 0].any()


def test_record_refuses_vmap():
    a = draw(2, 3, 5, 8)
    with record(), pytest.raises(RuntimeError, match="record\\(\\) cannot keep.*vmap"):
        torch.vmap(precondition)(a)
    torch.testing.assert_close(torch.vmap(precondition)(a), precondition(a))


@pytest.mark.slow
def test_the_demonstration_ends_quietly_where_its_reader_does():
    """As in `python -m precond | head -1`."""
    command = [sys.executable, "-u", precond.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert b"median kappa" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
