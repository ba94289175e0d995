"""fast.py and the options around it: each fast path against its slow one, or an fp64 reference."""
import copy

import pytest
import torch
import torch.nn.functional as F

from engine import device
from engine import loss as head
from engine import packed as packing
import sample
from conftest import SMALL, read_metrics, shell, torchrun
from model import GPT, ModelConfig
from sample import generate, stack


def example(n=37, C=12, V=29, ignored=True):
    """x (n, C), a head (V, C) of which only the first 23 words are ever targets, as in a padded vocabulary, and targets (n)."""
    torch.manual_seed(0)
    targets = torch.randint(23, (n,))
    if ignored:
        targets[::5] = -1
    return torch.randn(n, C), torch.randn(V, C), targets


def reference(x, weight, targets):
    """Loss and gradients (in x, in weight) in fp64 by the formula: P - Y over the number of targets that count."""
    x, weight, counts = x.double(), weight.double(), targets >= 0
    p = (x @ weight.T).softmax(-1)
    y = F.one_hot(targets.clamp(min=0), len(weight))
    g = (p - y) * counts[:, None] / counts.sum()
    return -p[counts].gather(1, targets[counts, None]).log().mean(), g @ weight, g.T @ x


def ours(x, weight, targets, rows, dtype=torch.float32):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = head.head_loss(x, weight, targets, rows)
    loss.backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 36, 37, 1000])
def test_head_loss_and_its_gradients_are_the_formula(rows, ignored, monkeypatch):
    monkeypatch.setattr(head, "SLICE", 5)
    case = example(ignored=ignored)
    for got, wanted in zip(ours(*case, rows), reference(*case)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_head_loss_in_bfloat16():
    """Against fp64: the loss to 1%, each gradient to 1% of its norm; no worse than twice plain cross entropy under autocast."""
    case = example(n=512, C=64, V=300)
    case = (case[0], case[1] * 0.3, case[2])
    x, weight = (t.clone().requires_grad_() for t in case[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(F.linear(x, weight), case[2], ignore_index=-1)
    loss.backward()
    for got, plain, wanted in zip(ours(*case, rows=100, dtype=torch.bfloat16), (loss.detach(), x.grad, weight.grad), reference(*case)):
        error, usual = (((value.double() - wanted).norm() / wanted.norm()).item() for value in (got, plain))
        assert error < 0.01 and error < 2 * usual + 1e-4, (error, usual)


def test_head_loss_keeps_the_shape_scales_the_gradient_and_works_without_gradients():
    x, weight, targets = example(n=36)
    x = x.view(4, 9, 12).requires_grad_()
    loss = head.head_loss(x, weight, targets.view(4, 9), rows=10)
    (3 * loss).backward()
    expected = 3 * reference(x.detach().view(36, 12), weight, targets)[1]
    torch.testing.assert_close(x.grad.view(36, 12).double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(head.head_loss(x, weight, targets.view(4, 9), rows=10), loss)
    assert head.head_loss(x, weight, torch.full((4, 9), -1)).isnan()


def test_head_loss_cannot_be_differentiated_twice():
    x, weight, targets = example()
    loss = head.head_loss(x.requires_grad_(), weight.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def gradients(loss, steps=2, **options):
    """Of a GPT whose head is its embedding, summed over micro-steps; and the loss."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=8, n_layer=2, n_head=2, n_embd=16, precond=True, loss=loss, **options), 31)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    total = 0.0
    for _ in range(steps):
        idx = torch.randint(31, (3, 9))
        value = model(idx[:, :-1], idx[:, 1:])[1] / steps
        value.backward()
        total += value.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


def test_a_model_learns_the_same_from_both_losses():
    """The tied embedding gets its gradient from both ends, and gradients accumulate."""
    (plain, a), (chunked, b) = gradients("plain"), gradients("chunked")
    assert chunked == pytest.approx(plain, rel=1e-6)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_chosen_by_the_vocabulary():
    small, large = (GPT(ModelConfig(n_layer=1, n_embd=4), vocab_size) for vocab_size in (head.LARGE_VOCABULARY - 1, head.LARGE_VOCABULARY))
    assert (small.loss, large.loss) == ("plain", "chunked")
    assert GPT(ModelConfig(n_layer=1, n_embd=4, loss="chunked"), 65).loss == "chunked"
    idx = torch.zeros(1, 2, dtype=torch.long)
    assert large(idx, idx)[0] is None and small(idx, idx)[0].shape == (1, 2, 4095) and large(idx)[0].shape == (1, 2, 4096)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_activations_change_nothing(dropout):
    (kept, a), (again, b) = (gradients("plain", dropout=dropout, checkpoint_activations=option) for option in (False, True))
    assert kept == again and all(torch.equal(a[name], b[name]) for name in a)


def test_checkpointed_activations_are_not_kept():
    """Bytes that autograd saves inside the blocks' forward pass."""
    saved = {}
    for option in (False, True):
        model = GPT(ModelConfig(checkpoint_activations=option), 65)
        parameters = {p.data_ptr() for p in model.parameters()}
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.update({t.data_ptr(): t.nbytes} if t.data_ptr() not in parameters else {}) or t, lambda t: t):
            model(torch.zeros(2, 64, dtype=torch.long), torch.zeros(2, 64, dtype=torch.long))
        saved[option] = sum(sizes.values())
    assert saved[True] < saved[False] / 4


def test_two_processes_with_the_chunked_loss_follow_one_with_the_plain_one(corpus, tmp_path):
    options = [*SMALL, *corpus, "--max_iters=10", "--eval_interval=5", "--gradient_accumulation_steps=2", "--precond=True"]
    torchrun(2, "train.py", *options, "--loss=chunked", f"--out_dir={tmp_path / 'two'}")
    done = shell("train.py", *options, "--loss=plain", "--fused=False", "--tune_malloc=False", f"--out_dir={tmp_path / 'one'}")
    assert "speed: plain loss, AdamW, malloc as it is" in done.stdout
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in {"train_loss", "val_loss", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=2e-5), (one["step"], name)


# Sampling


def random_model(**options):
    torch.manual_seed(1)
    model = GPT(ModelConfig(**dict(block_size=24, n_layer=2, n_head=2, n_embd=16) | options), 13).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2, 3]]


@pytest.mark.parametrize("options", [{}, {"precond": True}, {"attention": "linear"}])
def test_prompts_of_different_length_continue_as_if_alone(options):
    model = random_model(**options)
    tokens, padding = stack(PROMPTS)
    assert padding.tolist() == [4, 8, 0, 6] and tokens[0].tolist() == [0] * 4 + PROMPTS[0]
    together = torch.stack(list(generate(model, tokens, 15, padding=padding, temperature=0)), dim=1)
    for row, prompt in zip(together, PROMPTS):
        text = prompt.copy()
        for _ in range(15):  # without a cache
            text.append(model(torch.tensor([text]))[0][0, -1].argmax().item())
        assert row.tolist() == text[len(prompt):]
    assert stack([[1, 2], [3, 4]])[1] is None


def test_padding_is_forgotten_when_the_window_moves():
    """24 tokens after the longest prompt's start the window moves: then all rows are their last 12 tokens and nothing else."""
    model = random_model()
    tokens, padding = stack(PROMPTS)
    together = torch.stack(list(generate(model, tokens, 18, padding=padding, temperature=0)), dim=1)
    for row, prompt in zip(together, PROMPTS):
        text = prompt + row.tolist()
        for end in (-2, -1):  # 9 + 16 and 9 + 17 tokens of the longest: one and two after the window has moved
            n = 12 + end + 2
            assert model(torch.tensor([text[end - n:end]]))[0][0, -1].argmax().item() == text[end]


def test_prompts_of_a_file_s_lines(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo three\n", encoding="utf-8")
    assert sample.read_prompts(f"LINES:{tmp_path / 'prompts.txt'}") == ["one", "two three"]
    assert sample.read_prompts(f"FILE:{tmp_path / 'prompts.txt'}") == ["one\n\ntwo three\n"]
    assert sample.read_prompts("ROMEO:") == ["ROMEO:"]


@torch.no_grad()
def test_sampling_in_bfloat16_follows_float32():
    model = random_model()
    idx = torch.randint(13, (2, 24))
    wide = model(idx)[0].softmax(-1)
    narrow = model.to(torch.bfloat16)(idx)[0].float().softmax(-1)
    assert (wide - narrow).abs().mean() < 0.02
    assert len(list(generate(model, idx[:, :5], 30))) == 30


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"precond": True}, {"precond": True, "precond_power": "learned"},
                                     {"attention": "linear", "precond": True}])
def test_packed_weights_write_the_same_text(options):
    """Weights that float16 holds exactly: the packed model is the model. 36 rows of a prompt, 4 of a new token, and a moving window."""
    model = random_model(**options)
    for p in model.parameters():
        p.data = p.half().float()
    packed = packing.pack(copy.deepcopy(model), torch.float32)
    assert not any(isinstance(m, torch.nn.Linear) for m in packed.modules())
    tokens, padding = stack(PROMPTS)
    texts = [torch.stack(list(generate(m, tokens, 40, padding=padding, temperature=0)), dim=1) for m in (model, packed)]
    assert torch.equal(*texts) and len(texts[0].unique()) > 1


@torch.no_grad()
def test_packed_weights_are_closer_to_float32_than_bfloat16():
    model = random_model(precond=True)
    x = torch.randint(13, (1, 20))
    wide, narrow = (m(x)[0].float().softmax(-1) for m in (model, copy.deepcopy(model).to(torch.bfloat16)))
    packed = packing.for_sampling(model, torch.device("cpu"), torch.bfloat16)
    few, many = (packed(x[:, :n])[0].softmax(-1) for n in (8, 20))
    assert few.dtype == torch.float32
    rounding = (wide - narrow).abs().mean()
    assert 0 < (few - wide[:, :8]).abs().mean() < rounding / 4 and (many - wide).abs().mean() < 1.5 * rounding


def test_models_that_are_not_packed(monkeypatch):
    """In float32 the weights stay; where PyTorch has no kernel for packed ones, as on ARM, they are cast."""
    cpu = torch.device("cpu")
    assert type(packing.for_sampling(random_model(), cpu, torch.float32).blocks[0].attn.qkv) is torch.nn.Linear
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    assert packing.for_sampling(random_model(), cpu, torch.bfloat16).blocks[0].attn.qkv.weight.dtype == torch.bfloat16
