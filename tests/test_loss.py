"""engine/loss.py against fp64 references and plain cross entropy; activations computed again."""
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from conftest import SMALL, read_metrics, shell, torchrun
from engine import loss as head
from model import GPT, Classifier, ModelConfig


def example(n=37, C=12, V=29, ignored=True):
    """x (n, C), a head (V, C) and targets (n).

    Only the first 23 words are ever targets, as in a padded vocabulary.
    """
    torch.manual_seed(0)
    targets = torch.randint(23, (n,))
    if ignored:
        targets[::5] = -1
    return torch.randn(n, C), torch.randn(V, C), targets


def reference(x, weight, targets):
    """Loss and gradients (in x, in weight) in fp64: P - Y over the number of targets that count."""
    x = x.double()
    weight = weight.double()
    counts = targets >= 0
    p = (x @ weight.T).softmax(-1)
    y = F.one_hot(targets.clamp(min=0), len(weight))
    g = (p - y) * counts[:, None] / counts.sum()
    return -p[counts].gather(1, targets[counts, None]).log().mean(), g @ weight, g.T @ x


def ours(x, weight, targets, rows, dtype=torch.float32):
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
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
    """Against fp64: the loss to 1%, each gradient to 1% of its norm.

    No worse than twice plain cross entropy under autocast.
    """
    x, weight, targets = example(n=512, C=64, V=300)
    case = x, weight * 0.3, targets
    x, weight = (t.clone().requires_grad_() for t in case[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1)
    loss.backward()
    plain = loss.detach(), x.grad, weight.grad
    chunked = ours(*case, rows=100, dtype=torch.bfloat16)
    for got, other, wanted in zip(chunked, plain, reference(*case)):
        error, usual = (((value.double() - wanted).norm() / wanted.norm()).item()
                        for value in (got, other))
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


@pytest.mark.slow
def test_compiled_code_leaves_the_loop_alone():
    """The graphs end before it and begin after it; its products stay out of them."""
    x, weight, targets = example()
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter)
    def thrice(x):
        return 3 * head.head_loss(2 * x, weight, targets, rows=10)
    assert torch.equal(thrice(x), 3 * head.head_loss(2 * x, weight, targets, rows=10))
    assert (counter.frame_count, counter.op_count) == (2, 2)


def test_head_loss_cannot_be_differentiated_twice():
    x, weight, targets = example()
    loss = head.head_loss(x.requires_grad_(), weight.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def gradients(loss, steps=2, **options):
    """Of a GPT whose head is its embedding, summed over micro-steps; and the loss."""
    torch.manual_seed(0)
    config = ModelConfig(block_size=8, n_layer=2, n_head=2, n_embd=16, precond=True, loss=loss,
                         **options)
    model = GPT(config, 31)
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
    plain, a = gradients("plain")
    chunked, b = gradients("chunked")
    assert chunked == pytest.approx(plain, rel=1e-6)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_chosen_by_the_vocabulary():
    config = ModelConfig(n_layer=1, n_embd=4)
    small = GPT(config, head.LARGE_VOCABULARY - 1)
    large = GPT(config, head.LARGE_VOCABULARY)
    assert (small.loss, large.loss) == ("plain", "chunked")
    assert GPT(ModelConfig(n_layer=1, n_embd=4, loss="chunked"), 65).loss == "chunked"
    idx = torch.zeros(1, 2, dtype=torch.long)
    assert large(idx, idx)[0] is None
    assert small(idx, idx)[0].shape == (1, 2, 4095) and large(idx)[0].shape == (1, 2, 4096)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"rotary": True}], ids=str)
def test_checkpointed_activations_change_nothing(options):
    kept, a = gradients("plain", **options, checkpoint_activations=False)
    again, b = gradients("plain", **options, checkpoint_activations=True)
    assert kept == again and all(torch.equal(a[name], b[name]) for name in a)


def test_checkpointed_activations_see_no_padding():
    found = []
    x, real = torch.arange(16).view(2, 8) % 11, torch.arange(8) < torch.tensor([[8], [3]])
    for option in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(block_size=8, n_layer=2, n_head=2, n_embd=16,
                             checkpoint_activations=option)
        model = Classifier(config, 11, 3)
        model(x, real, torch.tensor([0, 2]))[1].backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointed_activations_are_not_kept():
    """Bytes that autograd saves inside the blocks' forward pass."""
    saved = {}
    for option in (False, True):
        model = GPT(ModelConfig(checkpoint_activations=option), 65)
        parameters = {p.data_ptr() for p in model.parameters()}
        sizes = {}

        def keep(t, parameters=parameters, sizes=sizes):
            if t.data_ptr() not in parameters:
                sizes[t.data_ptr()] = t.nbytes
            return t

        idx = torch.zeros(2, 64, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(idx, idx)
        saved[option] = sum(sizes.values())
    assert saved[True] < saved[False] / 4


@pytest.mark.slow
def test_two_processes_with_the_chunked_loss_follow_one_with_the_plain_one(corpus, tmp_path):
    options = [*SMALL, *corpus, "--max_iters=10", "--eval_interval=5",
               "--gradient_accumulation_steps=2", "--precond=True", "--optimizer=adamw"]
    torchrun(2, "train.py", *options, "--loss=chunked", f"--out_dir={tmp_path / 'two'}")
    done = shell("train.py", *options, "--loss=plain", "--fused=False", "--tune_malloc=False",
                 f"--out_dir={tmp_path / 'one'}")
    assert "speed: plain loss, AdamW, malloc as it is" in done.stdout
    records = zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True)
    for one, two in records:
        for name in {"train_loss", "val_loss", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=2e-5), (one["step"], name)
