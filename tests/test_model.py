"""attention.py and model.py against explicit fp64 formulas; the cache against no cache; the initialisation."""
import math

import pytest
import torch

import attention
from model import GPT, KVCache, ModelConfig


def reference_attention(q, k, v, allowed):
    """softmax(Q K^T / sqrt(d)) V in fp64; allowed: bool, True where query i may see key j."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_attention_forward_and_backward(is_causal, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 5, requires_grad=True) for _ in range(3))
    allowed = torch.ones(7, 7, dtype=torch.bool).tril() if is_causal else torch.ones(7, 7, dtype=torch.bool)
    mask = None
    if masked:
        mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
        allowed = allowed & mask[:, None, None, :]
    out = attention.softmax(q, k, v, mask, is_causal=is_causal)
    expected = reference_attention(q, k, v, allowed)
    weight = torch.randn(out.shape)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def reference_gpt(model: GPT, idx, power):
    """The whole forward pass written out in fp64, one head at a time: what the architecture is, without its code."""
    w = {name: p.detach().double() for name, p in model.state_dict().items()}
    c = model.config
    linear = lambda x, name: x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)  # noqa: E731

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w.get(name + ".bias", 0.0)

    T, d = idx.size(1), c.n_embd // c.n_head
    x = w["wte.weight"][idx] + w["wpe.weight"][:T]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    for i in range(c.n_layer):
        qkv = linear(norm(x, f"blocks.{i}.ln_1"), f"blocks.{i}.attn.qkv")
        heads = []
        for h in range(c.n_head):
            q, k, v = (qkv[..., part * c.n_embd + h * d:part * c.n_embd + (h + 1) * d] for part in range(3))
            a = reference_attention(q, k, v, causal)
            heads.append(a / a.norm(dim=-1, keepdim=True) ** power)
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj")
        h = linear(norm(x, f"blocks.{i}.ln_2"), f"blocks.{i}.mlp.fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"blocks.{i}.mlp.proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def random_gpt(**options) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**dict(block_size=12, n_layer=2, n_head=2, n_embd=16) | options), vocab_size=11)
    for p in model.parameters():  # larger than the initialisation, and no zero bias: every part must show
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("precond, power", [(False, 1.0), (True, 0.0), (True, 0.5), (True, 1.0)])
def test_gpt_is_the_formula(bias, precond, power):
    model = random_gpt(bias=bias, precond=precond, precond_power=power)
    idx = torch.randint(11, (3, 12))
    expected = reference_gpt(model, idx, power if precond else 0.0)
    logits, loss = model(idx, idx.roll(-1, 1))
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    wanted = -expected.log_softmax(-1).gather(-1, idx.roll(-1, 1)[..., None]).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)


def test_power_zero_is_the_baseline_exactly():
    idx = torch.randint(11, (3, 12))
    losses = [random_gpt(precond=precond, precond_power=0.0)(idx, idx)[1] for precond in (False, True)]
    assert torch.equal(*losses)


def test_precond_changes_neither_parameters_nor_their_initial_values():
    states = []
    for precond in (False, True):
        torch.manual_seed(3)
        states.append(GPT(ModelConfig(precond=precond), 65).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_learned_power_starts_half_way_and_is_the_only_extra_parameter():
    torch.manual_seed(3)
    half = GPT(ModelConfig(precond=True, precond_power=0.5), 65)
    torch.manual_seed(3)
    learned = GPT(ModelConfig(precond=True, precond_power="learned"), 65)
    extra = {name for name in learned.state_dict()} - {name for name in half.state_dict()}
    assert extra == {f"blocks.{i}.attn.power" for i in range(4)} and learned.powers() == [0.5] * 4
    assert all(torch.equal(p, learned.state_dict()[name]) for name, p in half.state_dict().items())
    idx = torch.randint(65, (2, 64))
    loss = learned(idx, idx)[1]
    torch.testing.assert_close(loss, half(idx, idx)[1])
    loss.backward()
    assert all(block.attn.power.grad.abs().min() > 0 for block in learned.blocks)


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=8, n_embd=256, bias=True), 500)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("proj.weight") else 0.02
            assert abs(p.std().item() / std - 1) < 0.05 and abs(p.mean().item()) < std / 10, name
        else:
            assert (p == (1.0 if "ln" in name and name.endswith("weight") else 0.0)).all(), name
    assert abs(model(torch.randint(500, (4, 64)), torch.randint(500, (4, 64)))[1].item() - math.log(500)) < 0.1


@pytest.mark.parametrize("precond", [False, True])
def test_cache_equals_no_cache(precond):
    model = random_gpt(precond=precond)
    idx = torch.randint(11, (2, 12))
    full = model(idx)[0]
    cache = KVCache(model.config, 2)
    first = model(idx[:, :5], cache=cache)[0]
    rest = [model(idx[:, t:t + 1], cache=cache)[0] for t in range(5, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), full[:, 4:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size=12"):
        model(idx[:, :1], cache=cache)


def test_future_tokens_change_nothing():
    model = random_gpt(precond=True)
    idx = torch.randint(11, (2, 12))
    changed = idx.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 11
    assert torch.equal(model(idx)[0][:, :8], model(changed)[0][:, :8])


def test_dropout_acts_in_training_only():
    model = random_gpt(dropout=0.5)
    idx = torch.randint(11, (2, 12))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("wrong, words", [(dict(n_head=3, n_embd=16), "n_head=3 does not divide n_embd=16"), (dict(block_size=0), "block_size=0"),
                                          (dict(dropout=1.0), "dropout=1.0 must be in")])
def test_impossible_configurations(wrong, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**wrong)


def test_flops_count_the_matrix_products():
    config = ModelConfig(n_layer=3, n_embd=32, n_head=4, block_size=16)
    model = GPT(config, 50)
    products = 3 * 12 * 32 * 32 + 50 * 32  # qkv, proj, fc, proj of each layer and the head
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert model.flops_per_token() == 6 * (products + norms) + 12 * 3 * 32 * 16
