"""precondition_sdpa in threads, under checkpoints, on jagged tensors; and edges of the method."""
import _thread
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import precond

X = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))


def attend(x=X):
    return F.scaled_dot_product_attention(x, x, x)


def test_keywords_are_pytorchs():
    plain = attend()
    with precond.precondition_sdpa(scale=2.0):
        given = F.scaled_dot_product_attention(query=X, key=X, value=X, attn_mask=None)
    torch.testing.assert_close(given, 2 * F.normalize(plain, dim=-1))


@pytest.mark.parametrize("first_out", [0, 1])
def test_a_context_is_its_threads_own(first_out):
    """Two threads enter one after the other and leave in either order; a third is not inside."""
    before, plain, seen = F.scaled_dot_product_attention, attend(), {}
    go = [threading.Event() for _ in range(2)]
    inside = [threading.Event() for _ in range(2)]

    def work(i):
        with precond.precondition_sdpa(power=(0.5, 1.0)[i]):
            inside[i].set()
            assert go[i].wait(30)
            seen[i] = attend()
        seen[i, "after"] = attend()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for i in range(2):
        threads[i].start()
        assert inside[i].wait(30)
    assert torch.equal(attend(), plain)
    for i in (first_out, 1 - first_out):
        go[i].set()
        threads[i].join(30)
    assert F.scaled_dot_product_attention is before
    assert torch.backends.mha.get_fastpath_enabled()
    for i, power in enumerate((0.5, 1.0)):
        torch.testing.assert_close(seen[i], precond.precondition(plain, power=power))
        assert torch.equal(seen[i, "after"], plain)


def test_threads_of_autograd_are_inside():
    """Python did not start them; on a GPU they compute checkpoints again."""
    seen, done = [], threading.Event()

    def work():
        seen.append(attend())
        done.set()
    with precond.precondition_sdpa():
        _thread.start_new_thread(work, ())
        assert done.wait(30)
        assert torch.equal(seen[0], attend())


@pytest.mark.parametrize("inside", [False, True])
def test_reentrant_checkpoints_recompute_with_c(inside):
    """With the backward pass outside the context they recomputed plain attention, silently."""
    def gradient(checkpointed, leave):
        x = X.clone().requires_grad_()
        with precond.precondition_sdpa(power=0.5, grad=True):
            out = checkpoint(attend, x, use_reentrant=True) if checkpointed else attend(x)
            if not leave:
                out.square().sum().backward()
        if leave:
            out.square().sum().backward()
        return x.grad
    torch.testing.assert_close(gradient(True, not inside), gradient(False, True))
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)


def test_other_checkpoints_say_that_they_were_left():
    x = X.clone().requires_grad_()
    with precond.precondition_sdpa(grad=True):
        out = checkpoint(attend, x, use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        out.sum().backward()


@pytest.mark.parametrize("grad", [False, True])
def test_jagged_tensors(grad):
    rows = [torch.randn(n, 3, 8, requires_grad=True) for n in (2, 5)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True).transpose(1, 2)
    with precond.precondition_sdpa(grad=grad):
        out = attend(x).transpose(1, 2)
    for got, row in zip(out.unbind(), rows):
        expected = F.normalize(attend(row.transpose(0, 1)[None]), dim=-1)[0].transpose(0, 1)
        torch.testing.assert_close(got, expected)


def test_condition_number_without_entries():
    assert precond.condition_number(torch.zeros(3, 0, 4)).isnan().tolist() == [True] * 3
    assert precond.condition_number(torch.zeros(4, 0)).isnan()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("power", [0.5, 1.0, torch.tensor([0.5, 0.5, 1.0])])
def test_rows_too_long_for_fp32_are_nan_and_not_zero(grad, power):
    a = X.clone()
    a[0, 1, 2] = 1e19
    a[1, 1, 2] = 0
    out = precond.precondition(a, grad=grad, power=power)
    assert out[0, 1, 2].isnan().all() and out.isnan().sum() == 8 and not out[1, 1, 2].any()


def test_second_derivative_at_zero_rows():
    a = X.double().clone()
    a[0, 1, 2] = 0
    a.requires_grad_()
    out = precond.precondition(a, grad=True)
    first, = torch.autograd.grad(out.pow(3).sum(), a, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), a)
    assert second.isfinite().all() and not second[0, 1, 2].any() and second[0, 0].any()


def test_record_refuses_vmap():
    with precond.record(), pytest.raises(RuntimeError, match="record\\(\\) cannot keep.*vmap"):
        torch.vmap(precond.precondition)(X)
    torch.testing.assert_close(torch.vmap(precond.precondition)(X), precond.precondition(X))


@pytest.mark.slow
def test_a_compiled_call_follows_the_options():
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    plain = attend()
    for power in (1.0, 0.5, 1.0):
        torch.testing.assert_close(compiled(X), plain)
        with precond.precondition_sdpa(power=power):
            torch.testing.assert_close(compiled(X), precond.precondition(plain, power=power))
