"""wrap and check: C before the output projections of small random models, and what is refused."""
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import precond

WIDTH, HEADS = 32, 4
X = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Written out by hand, as many models have it."""

    def __init__(self, width=WIDTH, heads=HEADS, sdpa=False, channels=False):
        super().__init__()
        self.num_heads, self.sdpa, self.channels = heads, sdpa, channels
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.channels:
            q, k, v = (t.mT for t in (q, k, v))
        if self.sdpa:
            a = F.scaled_dot_product_attention(q, k, v)
        else:
            a = (q @ k.mT * q.size(-1)**-0.5).softmax(-1) @ v
        if self.channels:
            a = a.mT
        return self.proj(a.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, *attentions):
        super().__init__()
        self.blocks = nn.ModuleList(attentions)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x + self.mlp(x)


def model(*kinds, seed=0):
    torch.manual_seed(seed)
    return Model(*(Attention(**kind) for kind in kinds or ({}, {})))


def test_wrap_is_the_context_over_sdpa():
    """To rounding: the same C on the same rows, by the projection's input."""
    by_sdpa = model(dict(sdpa=True), dict(sdpa=True))
    options = dict(grad=True, eps=0.1, power=0.5, scale="sqrt_d")
    x = X.clone().requires_grad_()
    with precond.precondition_sdpa(**options):
        expected = by_sdpa(x)
    wanted, = torch.autograd.grad(expected.square().sum(), x)
    with precond.wrap(by_sdpa, **options) as handle, precond.record() as calls:
        got = by_sdpa(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), x)[0], wanted)
    assert handle.attached == {"blocks.0.proj": 4, "blocks.1.proj": 4} and not handle.left
    assert [a.shape for a, _ in calls] == [(2, HEADS, 6, 8)] * 2
    assert "blocks.1.proj: 4 heads" in repr(handle)


def test_wrap_is_undone_and_power_zero_is_the_model():
    plain = model()
    expected = plain(X)
    with precond.wrap(plain, power=0.0):
        assert torch.equal(plain(X), expected)
    handle = precond.wrap(plain)
    assert precond.check(plain, X) == 2 and not torch.allclose(plain(X), expected)
    handle.remove()
    assert torch.equal(plain(X), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_wrap_of_a_convolution():
    """Tokens are the pixels of (B, C, h, w)."""
    torch.manual_seed(0)

    class ConvAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = HEADS
            self.proj = nn.Sequential(nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 1))

        def forward(self, x):
            return self.proj(x)

    net = nn.Sequential(ConvAttention())
    image = torch.randn(2, WIDTH, 3, 5)
    with precond.wrap(net), precond.record() as calls:
        got = net(image)
    scaled = F.normalize(image.unflatten(1, (HEADS, -1)), dim=2).flatten(1, 2)
    torch.testing.assert_close(got, net[0].proj(scaled))
    assert calls[0][0].shape == (2, HEADS, 15, 8)
    torch.testing.assert_close(calls[0][1].norm(dim=-1), torch.ones(2, HEADS, 15))


def test_wrap_before_what_has_no_weight():
    """BoTNet's attention ends in a pooling; its channels come first, as in the layers before."""
    torch.manual_seed(0)

    class BottleneckAttn(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = HEADS
            self.qkv, self.pool = nn.Conv2d(WIDTH, WIDTH, 1), nn.Identity()

        def forward(self, x):
            return self.pool(self.qkv(x))

    net = nn.Sequential(BottleneckAttn())
    image = torch.randn(2, WIDTH, 3, 5)
    expected = F.normalize(net(image).unflatten(1, (HEADS, -1)), dim=2).flatten(1, 2)
    with precond.wrap(net):
        torch.testing.assert_close(net(image), expected)


def in_place(block):
    block.compile(backend="eager")
    return block


def test_what_wrap_refuses():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="no output projection was found in Linear"):
        precond.wrap(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no output projection was found in Model"):
        precond.wrap(model(), "nothing")
    for heads in 0, -4:
        with pytest.raises(ValueError, match=f"heads={heads}: give the number of heads"):
            precond.wrap(model(), heads=heads)
    with pytest.raises(ValueError, match="blocks.0.proj has 32 inputs, which 5 heads do not"):
        precond.wrap(model(), heads=5)
    with pytest.raises(ValueError, match="mlp: how many heads has it"):
        precond.wrap(model(), "mlp")
    with pytest.raises(ValueError, match="scale='sqrt'"):
        precond.wrap(model(), scale="sqrt")
    with pytest.raises(ValueError, match="wrap the model, then compile it"):
        precond.wrap(torch.compile(model(), backend="eager"))
    for compiled in (lambda block: torch.compile(block, backend="eager"), in_place):
        with pytest.raises(ValueError, match="wrap the model, then compile it"):
            precond.wrap(Model(Attention(), compiled(Attention())))
    refused = type("OutlookAttention", (Attention,), {})
    partly = Model(Attention(), refused())
    with pytest.raises(ValueError, match="OutlookAttention cannot be wrapped: its heads are"):
        precond.wrap(partly)
    assert not any(module._forward_pre_hooks for module in partly.modules())


def test_an_input_by_name_is_an_error():
    class NamedAttention(Attention):
        def forward(self, x):
            return self.proj(input=x)
    net = Model(NamedAttention())
    precond.wrap(net)
    with pytest.raises(ValueError, match="blocks.0.proj is called with keyword arguments alone"):
        net(X)


def test_a_projection_that_is_not_called_is_an_error():
    """nn.MultiheadAttention uses its out_proj's weight alone."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, batch_first=True)
    with precond.wrap(layer, "out_proj"), pytest.raises(
            RuntimeError, match="did not call self_attn.out_proj in its forward pass"):
        layer(X)
    with pytest.raises(ValueError, match="no output .*but self_attn look like attention"):
        precond.wrap(layer)


def test_attention_that_does_not_run_is_no_error():
    """As BLIP's cross-attention without an image."""
    net = model()
    net.spare_attention = Attention()
    with precond.wrap(net) as handle:
        assert "spare_attention.proj" in handle.attached and precond.check(net, X) == 2
        net.blocks.append(net.spare_attention)
        assert precond.check(net, X) == 3


def test_twice_is_an_error():
    net = model(dict(sdpa=True), {})
    with precond.wrap(net):
        with precond.precondition_sdpa(), pytest.raises(RuntimeError, match="blocks.0.proj is pre"):
            net(X)
        with precond.wrap(net), pytest.raises(RuntimeError, match="blocks.0.proj is precond"):
            net(X)
        net(X)
    with precond.wrap(net, r"1\.proj"), precond.precondition_sdpa():  # one each
        assert precond.check(net, X) == 2


class Mixer(nn.Module):
    """A name that does not look like attention."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(x)


class JointAttention(Mixer):
    """One attention with two projections, as those of text and image together have it."""
    num_heads = HEADS

    def __init__(self):
        super().__init__()
        self.proj_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(x) + self.proj_out(x)


class OuterAttention(Attention):
    def __init__(self):
        super().__init__()
        self.local_attn = Attention()

    def forward(self, x):
        return super().forward(self.local_attn(x))


@pytest.mark.parametrize("net, words", [
    (Model(Mixer(), Mixer()), dict(pattern=r"\d\.proj$", heads=HEADS)),
    (Model(JointAttention()), {}), (Model(OuterAttention()), {})])
def test_projections_of_one_attention_are_no_two_ways(net, words):
    """Nor are those whose attention is not to be seen, so that the model stands for all."""
    with precond.wrap(net, **words) as handle, precond.record() as calls:
        net(X)
        assert len(calls) == 2 == len(handle.attached)
        with precond.wrap(net, **words), pytest.raises(RuntimeError, match="already, in another"):
            net(X)


@pytest.mark.slow
def test_wrapped_then_compiled():
    net = model()
    with precond.wrap(net):
        expected = net(X)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), expected)


def test_check_names_attention_that_was_left(recwarn):
    """By its softmax, whatever the class is called; several softmaxes can be one attention."""
    torch.manual_seed(0)
    unnamed = type("Mixer", (Attention,), {})
    net = Model(Attention(), unnamed())
    with precond.wrap(net), pytest.warns(
            UserWarning, match="1 attention calls of Model were .*, but none in blocks.1$"):
        assert precond.check(net, X) == 1

    class NystromAttention(Attention):
        def forward(self, x):
            weights = [x.unflatten(-1, (4, -1)).softmax(-1).flatten(2) for _ in range(3)]
            return self.proj(sum(weights))
    net = Model(Attention(), NystromAttention())
    recwarn.clear()
    with precond.wrap(net):
        assert precond.check(net, X) == 2
    assert not recwarn


def test_channels_as_rows_are_a_warning(recwarn):
    """XCiT's and DaViT's attention through SDPA; wrap takes tokens."""
    net = model(dict(sdpa=True, channels=True))
    with precond.precondition_sdpa(), pytest.warns(
            UserWarning, match="rows are channels, not tokens, in blocks.0: "):
        precond.check(net, X)
    recwarn.clear()
    with precond.wrap(net), precond.record() as calls:
        precond.check(net, X)
    assert not recwarn and calls[0][1].shape == (2, HEADS, 6, 8)
    norm = calls[0][1].norm(dim=-1)
    torch.testing.assert_close(norm, torch.ones_like(norm))


def test_two_threads_may_run_one_model():
    """The second enters the attention while the first is in it, and waits there for its end."""
    net = model({})
    first_is_in, second_is_in = threading.Event(), threading.Event()
    outputs = []
    first = threading.Thread(target=lambda: outputs.append(net(X)))

    def wait(*_):
        if threading.current_thread() is first:
            first_is_in.set()
            assert second_is_in.wait(60)
        elif first.is_alive():
            second_is_in.set()
            first.join()

    with precond.wrap(net):
        expected = net(X)
        net.blocks[0].qkv.register_forward_hook(wait)
        first.start()
        assert first_is_in.wait(60)
        assert torch.equal(net(X), expected) and torch.equal(outputs[0], expected)
