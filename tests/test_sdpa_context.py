"""precondition_sdpa: nested, in threads, under checkpoints, compiled, on torch.nn's modules."""
import _thread
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import precond
from model import GPT, ModelConfig

WIDTH = 32
HEADS = 4
X = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))


def attend(x=X):
    return F.scaled_dot_product_attention(x, x, x)


def test_keywords_are_pytorchs():
    plain = attend()
    with precond.precondition_sdpa(scale=2.0):
        given = F.scaled_dot_product_attention(query=X, key=X, value=X, attn_mask=None)
    torch.testing.assert_close(given, 2 * F.normalize(plain, dim=-1))


def test_another_librarys_attention_is_preconditioned(monkeypatch):
    context = precond.precondition_sdpa()  # PyTorch's is known from here on
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *_, **__: 7 * q)
    with context:
        torch.testing.assert_close(attend(), F.normalize(X, dim=-1))


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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [False, True])
def test_jagged_tensors(grad):
    rows = [torch.randn(n, 3, 8, requires_grad=True) for n in (2, 5)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True).transpose(1, 2)
    with precond.precondition_sdpa(grad=grad):
        out = attend(x).transpose(1, 2)
    for got, row in zip(out.unbind(), rows):
        expected = F.normalize(attend(row.transpose(0, 1)[None]), dim=-1)[0].transpose(0, 1)
        torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_a_compiled_call_follows_the_options():
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    plain = attend()
    for power in (1.0, 0.5, 1.0):
        torch.testing.assert_close(compiled(X), plain)
        with precond.precondition_sdpa(power=power):
            torch.testing.assert_close(compiled(X), precond.precondition(plain, power=power))


def own(**options):
    config = ModelConfig(block_size=8, n_layer=3, n_head=2, n_embd=16, **options)
    return GPT(config, vocab_size=50)


def test_check_on_our_model():
    assert precond.check(own(precond=True), torch.zeros(2, 8, dtype=torch.long)) == 3
    for options in (dict(), dict(precond=True, precond_power=0.0)):
        with pytest.raises(RuntimeError, match="no attention call of GPT "):
            precond.check(own(**options), torch.zeros(2, 8, dtype=torch.long))


def encoder_layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, dropout=0.0, batch_first=True)


def reference(layer, x):
    """nn.TransformerEncoderLayer (post-norm), preconditioned, in explicit operations."""
    qkv = F.linear(x, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    a = (q @ k.mT / q.size(-1) ** 0.5).softmax(-1) @ v
    a = a / a.norm(dim=-1, keepdim=True)
    x = layer.norm1(x + layer.self_attn.out_proj(a.transpose(1, 2).flatten(2)))
    return layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))


def test_encoder_layer_and_the_fused_inference_path():
    """In evaluation without gradients torch runs a fused kernel that goes round SDPA."""
    layer = encoder_layer()
    x = torch.randn(2, 7, WIDTH)
    expected = reference(layer, x)
    for training in (True, False):
        layer.train(training)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), precond.precondition_sdpa():
                assert precond.check(layer, x) == 1
                torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        plain = layer(x)
        assert (plain - expected).abs().max() > 0.1
        with precond.precondition_sdpa():
            torch.backends.mha.set_fastpath_enabled(True)
            torch.testing.assert_close(layer(x), plain, atol=1e-5, rtol=1e-5)
            with pytest.raises(RuntimeError, match="no attention call of TransformerEncoderLayer"):
                precond.check(layer, x)
    assert torch.backends.mha.get_fastpath_enabled()


@torch.no_grad()
def test_encoder_with_padding_in_evaluation():
    """nn.TransformerEncoder would pack the batch into a nested tensor for the fused path."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    x = torch.randn(2, 7, WIDTH)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    with precond.precondition_sdpa():
        assert precond.check(encoder, x, src_key_padding_mask=padding) == 2
        y = encoder(x, src_key_padding_mask=padding)
    expected = x[:1, :5]
    for layer in encoder.layers:
        expected = reference(layer, expected)
    torch.testing.assert_close(y[:1, :5], expected, atol=1e-5, rtol=1e-5)


class Two(nn.Module):
    """Two attentions; torch computes the one that is asked for its weights without SDPA."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.second = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x, first: bool, second: bool):
        x = self.first(x, x, x, need_weights=first)[0]
        return self.second(x, x, x, need_weights=second)[0]


def test_multihead_attention_that_returns_its_weights_is_not_reached(recwarn):
    model = Two()
    x = torch.randn(2, 7, WIDTH)
    with precond.precondition_sdpa():
        assert precond.check(model, x, False, False) == 2
        assert not [w for w in recwarn if "preconditioned" in str(w.message)]
        with pytest.raises(RuntimeError, match="no attention call of Two"):
            precond.check(model, x, True, True)
        message = "1 attention calls of Two were preconditioned, but none in first$"
        with pytest.warns(UserWarning, match=message):
            assert precond.check(model, x, True, False) == 1
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


def test_precondition_sdpa_nests_and_is_undone():
    before = F.scaled_dot_product_attention
    q, k, v = torch.randn(3, 2, HEADS, 5, 8)
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with pytest.raises(KeyError), precond.precondition_sdpa():
        inside = F.scaled_dot_product_attention(q, k, v, None, 0.0, True)
        torch.testing.assert_close(inside, F.normalize(a, dim=-1))
        with precond.precondition_sdpa(power=0.5):
            expected = a / a.norm(dim=-1, keepdim=True).sqrt()
            inside = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.testing.assert_close(inside, expected)
        inside = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)
        torch.testing.assert_close(inside, F.normalize(a, dim=-1))
        raise KeyError
    assert F.scaled_dot_product_attention is before
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.slow
def test_a_compiled_model_is_reached():
    """A graph compiled before the context, or before the recording, is not used inside it."""
    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, HEADS, 5, 8)
    plain = F.scaled_dot_product_attention(x, x, x)
    compiled = torch.compile(Attention(), backend="eager")
    torch.testing.assert_close(compiled(x), plain)
    with precond.precondition_sdpa():
        torch.testing.assert_close(compiled(x), F.normalize(plain, dim=-1))
        assert precond.check(compiled, x) == 1
    torch.testing.assert_close(compiled(x), plain)
