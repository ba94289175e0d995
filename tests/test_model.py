"""model.py against explicit fp64 formulas: both models, where C goes, cache, initialisation."""
import math

import pytest
import torch

from engine.kv_cache import KVCache
from engine.optim import OptimConfig, make_optimizer
from model import GPT, Attention, Classifier, ModelConfig
from precond import record
from test_attention import reference_attention, reference_nystrom


def reference_encoding(model, idx, allowed, power):
    """Tokens (B, T) -> (B, T, C) after the final norm: the architecture in fp64, head by head."""
    w = {name: p.detach().double() for name, p in model.state_dict().items()}
    c = model.config

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(x, name):
        variance = x.var(-1, unbiased=False, keepdim=True)
        x = (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
        return x * w[name + ".weight"] + w.get(name + ".bias", 0.0)

    d = c.n_embd // c.n_head
    x = w["wte.weight"][idx]
    if not c.rotary:
        x = x + w["wpe.weight"][:idx.size(1)]

    def place(x):
        """Pairs of channels as complex numbers; each token turns them by its place."""
        if c.qk_norm:
            x = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        if not c.rotary:
            return x
        pairs = torch.complex(x[..., :d // 2], x[..., d // 2:])
        rates = torch.tensor([10000 ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
        turned = pairs * torch.exp(1j * torch.arange(x.size(-2))[:, None] * rates)
        return torch.cat([turned.real, turned.imag], -1)
    for i in range(c.n_layer):
        qkv = linear(norm(x, f"blocks.{i}.ln_1"), f"blocks.{i}.attn.qkv")
        heads = []
        for h in range(c.n_head):
            q, k, v = (part[..., h * d:(h + 1) * d] for part in qkv.split(c.n_embd, dim=-1))
            a = reference_attention(place(q), place(k), v, allowed)
            heads.append(a / a.norm(dim=-1, keepdim=True) ** power)
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj")
        h = linear(norm(x, f"blocks.{i}.ln_2"), f"blocks.{i}.mlp.fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"blocks.{i}.mlp.proj")
    return norm(x, "ln_f")


def randomise(model):
    """Larger parameters than the initialisation's, and no zero bias: every part must show."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def random_gpt(**options) -> GPT:
    torch.manual_seed(0)
    sizes = dict(block_size=12, n_layer=2, n_head=2, n_embd=16)
    return randomise(GPT(ModelConfig(**sizes | options), vocab_size=11))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("precond, power", [(False, 1.0), (True, 0.0), (True, 0.5), (True, 1.0)])
def test_gpt_is_the_formula(bias, precond, power):
    model = random_gpt(bias=bias, precond=precond, precond_power=power)
    idx = torch.randint(11, (3, 12))
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    encoding = reference_encoding(model, idx, causal, power if precond else 0.0)
    expected = encoding @ model.wte.weight.detach().double().T
    targets = idx.roll(-1, 1)
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    wanted = -expected.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotary, qk_norm", [(True, False), (False, True), (True, True)])
def test_rotary_positions_and_normalised_queries_are_the_formula(rotary, qk_norm):
    model = random_gpt(rotary=rotary, qk_norm=qk_norm, precond=True)
    assert ("wpe.weight" in model.state_dict()) != rotary
    idx = torch.randint(11, (3, 12))
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    expected = reference_encoding(model, idx, causal, 1.0) @ model.wte.weight.detach().double().T
    torch.testing.assert_close(model(idx)[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert model.flops_per_token() > 0


def test_rotary_needs_pairs_of_channels():
    with pytest.raises(ValueError, match="n_embd / n_head must be even"):
        ModelConfig(n_embd=15, n_head=5, rotary=True)


def test_power_zero_is_the_baseline_exactly():
    idx = torch.randint(11, (3, 12))
    models = [random_gpt(precond=precond, precond_power=0.0) for precond in (False, True)]
    assert torch.equal(*(model(idx, idx)[1] for model in models))


def test_precond_changes_neither_parameters_nor_their_initial_values():
    states = []
    for precond in (False, True):
        torch.manual_seed(3)
        states.append(GPT(ModelConfig(precond=precond), 65).state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_learned_power_starts_half_way_and_is_the_only_extra_parameter():
    torch.manual_seed(3)
    half = GPT(ModelConfig(precond=True, precond_power=0.5), 65)
    torch.manual_seed(3)
    learned = GPT(ModelConfig(precond=True, precond_power="learned"), 65)
    extra = learned.state_dict().keys() - half.state_dict().keys()
    assert extra == {f"blocks.{i}.attn.power" for i in range(4)} and learned.powers() == [0.5] * 4
    state = learned.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in half.state_dict().items())
    idx = torch.randint(65, (2, 64))
    loss = learned(idx, idx)[1]
    torch.testing.assert_close(loss, half(idx, idx)[1])
    loss.backward()
    assert all(block.attn.power.grad.abs().min() > 0 for block in learned.blocks)


def test_learned_scale_starts_at_the_papers_c_and_is_not_decayed():
    torch.manual_seed(3)
    paper = GPT(ModelConfig(precond=True), 65)
    torch.manual_seed(3)
    learned = GPT(ModelConfig(precond=True, precond_scale="learned"), 65)
    extra = learned.state_dict().keys() - paper.state_dict().keys()
    assert extra == {f"blocks.{i}.attn.scale" for i in range(4)} and learned.scales() == [1.0] * 4
    idx = torch.randint(65, (2, 64))
    loss = learned(idx, idx)[1]
    assert torch.equal(loss, paper(idx, idx)[1])
    loss.backward()
    assert all(block.attn.scale.grad.abs().min() > 0 for block in learned.blocks)
    decayed, vectors = make_optimizer(learned, OptimConfig(weight_decay=0.1)).param_groups
    assert vectors["weight_decay"] == 0 < decayed["weight_decay"]
    held = {id(p) for p in vectors["params"]}
    assert all(id(block.attn.scale) in held for block in learned.blocks)
    assert GPT(ModelConfig(precond_scale="learned"), 65).state_dict().keys() == \
        GPT(ModelConfig(), 65).state_dict().keys()


def test_scale_of_a_model():
    """Rows enter the projection with length sqrt(head_dim)."""
    model = random_gpt(precond=True, precond_scale="sqrt_d")
    seen = []
    model.blocks[0].attn.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randint(11, (3, 12)))
    norms = seen[0].unflatten(-1, (2, -1)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 8**0.5))


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_is_above_zero(scale):
    with pytest.raises(ValueError, match=f"precond_scale={scale} must be above 0"):
        ModelConfig(precond_scale=scale)


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=8, n_embd=256, bias=True), 500)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("proj.weight") else 0.02
            assert abs(p.std().item() / std - 1) < 0.05 and abs(p.mean().item()) < std / 10, name
        else:
            gain = "ln" in name and name.endswith("weight")
            assert (p == (1.0 if gain else 0.0)).all(), name
    loss = model(torch.randint(500, (4, 64)), torch.randint(500, (4, 64)))[1]
    assert abs(loss.item() - math.log(500)) < 0.1


@pytest.mark.parametrize("attention", ["softmax", "linear"])
@pytest.mark.parametrize("precond", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_cache_equals_no_cache(rotary, precond, attention):
    model = random_gpt(precond=precond, attention=attention, rotary=rotary, qk_norm=rotary)
    idx = torch.randint(11, (2, 12))
    full = model(idx)[0]
    cache = KVCache(model.config, 2)
    first = model(idx[:, :5], cache=cache)[0]
    rest = [model(idx[:, t:t + 1], cache=cache)[0] for t in range(5, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), full[:, 4:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size=12"):
        model(idx[:, :1], cache=cache)


def test_checkpointing_keeps_the_cache():
    model = random_gpt(checkpoint_activations=True).train()
    idx = torch.randint(11, (2, 6))
    cache = KVCache(model.config, 2)
    model(idx[:, :5], cache=cache)
    torch.testing.assert_close(model(idx[:, 5:], cache=cache)[0], model(idx)[0][:, 5:])


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_future_tokens_change_nothing(attention):
    model = random_gpt(precond=True, attention=attention)
    idx = torch.randint(11, (2, 12))
    changed = idx.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 11
    assert torch.equal(model(idx)[0][:, :8], model(changed)[0][:, :8])


@pytest.mark.parametrize("options, words", [
    (dict(), "precond=False"),
    (dict(precond=True, precond_power=0.5), "precond=True, precond_power=0.5"),
    (dict(precond=True, precond_scale="sqrt_d"), "precond=True, precond_scale=sqrt_d"),
    (dict(precond_power=0.5), "precond=False (precond_power=0.5 has no effect on training)"),
    (dict(precond_grad=True, precond_skip="after"),
     "precond=False (precond_grad=True, precond_skip=after have no effect on training)"),
])
def test_a_preconditioner_s_options_are_named(options, words):
    assert ModelConfig(**options).describe_precond() == words


def test_dropout_acts_in_training_only():
    model = random_gpt(dropout=0.5)
    idx = torch.randint(11, (2, 12))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("wrong, words", [
    (dict(n_head=3, n_embd=16), "n_head=3 does not divide n_embd=16"),
    (dict(block_size=0), "block_size=0"),
    (dict(dropout=1.0), "dropout=1.0 must be in"),
])
def test_impossible_configurations(wrong, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**wrong)


def test_flops_count_the_matrix_products():
    config = ModelConfig(n_layer=3, n_embd=32, n_head=4, block_size=16)
    model = GPT(config, 50)
    products = 3 * 12 * 32 * 32 + 50 * 32  # qkv, proj, fc, proj of each layer and the head
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert model.flops_per_token() == 6 * (products + norms) + 12 * 3 * 32 * 16


# The classifier

LENGTHS = [2, 6, 9, 12]  # against 6 landmarks: fewer, as many, more, and all
MECHANISMS = ["softmax", "nystrom", "linear"]


def random_classifier(towers=1, **options) -> Classifier:
    torch.manual_seed(0)
    sizes = dict(block_size=12, n_layer=2, n_head=2, n_embd=16, n_inner=24, bias=True,
                 landmarks=6, conv_kernel_size=5)
    config = ModelConfig(**sizes | options)
    return randomise(Classifier(config, vocab_size=11, n_classes=5, towers=towers))


def random_sequences(towers=1):
    """Tokens and mask (B, T) or (B, 2, T). Padding is not 0, so that what sees it shows."""
    x = torch.randint(11, (len(LENGTHS), towers, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([LENGTHS, LENGTHS[::-1]][:towers]).T
    mask = torch.arange(12) < lengths[..., None]
    return (x, mask) if towers == 2 else (x[:, 0], mask[:, 0])


def apart(x, mask):
    """The sequences of each sample without padding: a list of (1, n) tokens, one for each tower."""
    for rows, real in zip(x.reshape(len(x), -1, 12), mask.reshape(len(x), -1, 12)):
        yield [row[r][None] for row, r in zip(rows, real)]


@pytest.mark.parametrize("size", [0.0, 0.02])
def test_a_classifiers_initialisation_keeps_the_variance(size):
    torch.manual_seed(0)
    config = ModelConfig(n_layer=8, n_embd=256, n_inner=500, block_size=200, embedding_std=size)
    model = Classifier(config, 500, 10)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = size or 1.0 if name.startswith("w") else p.size(1) ** -0.5
            if name.endswith("proj.weight"):
                std /= math.sqrt(2 * 8)
            assert abs(p.std().item() / std - 1) < 0.05, name


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("precond", [False, True])
def test_classifier_is_the_formula(towers, precond):
    """Mean over the real tokens, [a, b, a * b, a - b] for pairs, and a head with the exact GELU."""
    model = random_classifier(towers, precond=precond)
    x, mask = random_sequences(towers)
    w1, b1 = (p.detach().double() for p in model.head[0].parameters())
    w2, b2 = (p.detach().double() for p in model.head[2].parameters())
    expected = []
    for sequences in apart(x, mask):
        means = []
        for s in sequences:
            real = torch.ones(1, s.size(1), dtype=torch.bool)
            means.append(reference_encoding(model, s, real, float(precond))[0].mean(0))
        h = means[0]
        if towers == 2:
            a, b = means
            h = torch.cat([a, b, a * b, a - b])
        h = w1 @ h + b1
        expected.append(w2 @ (h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))) + b2)
    expected = torch.stack(expected)
    y = torch.tensor([4, 0, 2, 2])
    logits, loss = model(x, mask, y)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    wanted = -expected.log_softmax(-1)[range(4), y].mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-4)
    assert model(x, mask)[1] is None


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("precond_skip", ["before", "after"])
@pytest.mark.parametrize("precond", [False, True])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_classifier_ignores_padding_and_batch_mates(mechanism, precond, precond_skip, towers):
    model = random_classifier(towers, attention=mechanism, precond=precond,
                              precond_skip=precond_skip)
    x, mask = random_sequences(towers)
    logits = model(x, mask)[0]
    silent = model(x.masked_fill(~mask, 0), mask)[0]
    torch.testing.assert_close(silent, logits, rtol=1e-4, atol=1e-4)
    for b in range(len(x)):
        n = int(mask[b].sum(-1).max())  # of a pair, the longer one's
        alone = model(x[b:b + 1, ..., :n], mask[b:b + 1, ..., :n])[0]
        torch.testing.assert_close(alone, logits[b:b + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_precond_changes_neither_a_classifiers_parameters_nor_their_initial_values(mechanism):
    states = []
    for precond in (False, True):
        torch.manual_seed(3)
        config = ModelConfig(precond=precond, attention=mechanism)
        states.append(Classifier(config, 15, 10, towers=2).state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("precond, skip, kernel", [
    (False, "before", 5), (True, "before", 5), (True, "after", 5), (True, "before", 0)])
def test_where_c_goes_relative_to_the_convolution_skip(precond, skip, kernel):
    """before: C A + conv(V); after: C (A + conv(V)).

    The convolution runs over time, head by head, and sees no padding.
    """
    lengths = [12, 9]
    torch.manual_seed(0)
    config = ModelConfig(n_embd=8, n_head=2, landmarks=4, attention="nystrom", precond=precond,
                         precond_skip=skip, conv_kernel_size=kernel)
    layer = Attention(config, layer=0, causal=False)
    x = torch.randn(2, 12, 8)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    parts = layer.qkv(x).double().split(8, dim=-1)
    q, k, v = (part.view(2, 12, 2, 4).transpose(1, 2) for part in parts)
    a = reference_nystrom(q, k, v, lengths, 4)
    conv = torch.zeros_like(a)
    for b, n in enumerate(lengths):
        for t in range(n):
            for j in range(kernel):
                s = t + j - kernel // 2
                if 0 <= s < n:
                    conv[b, :, t] += layer.skip.weight[:, 0, j].double() * v[b, :, s]
    multiplied = a if skip == "before" else a + conv  # by C; kappa is of this
    expected = multiplied
    if precond:
        expected = multiplied / multiplied.norm(dim=-1, keepdim=True)
    if skip == "before":
        expected = expected + conv
    expected = expected.transpose(1, 2).reshape(2, 12, 8) @ layer.proj.weight.double().T
    with record() as calls:
        out = layer(x, mask)
    torch.testing.assert_close(out.double()[mask], expected[mask], rtol=1e-4, atol=1e-5)
    recorded, wanted = (rows.transpose(1, 2)[mask] for rows in (calls[0][0], multiplied))
    torch.testing.assert_close(recorded.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_sequence_longer_than_block_size_is_an_error():
    model = random_classifier()
    with pytest.raises(ValueError, match="13 tokens do not fit into block_size=12"):
        model(torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 13, dtype=torch.bool))
