"""muon.py and orthogonal.py: against an SVD in float64, and against torch.optim.Muon."""
import pytest
import torch

import train
from conftest import SMALL, error, read_metrics, torchrun
from engine import checkpoint, device, muon, orthogonal
from engine.meter import kappa_by_layer
from engine.muon import Muon, block_matrices
from engine.optim import make_optimizer
from engine.orthogonal import COEFFICIENTS, by_gram, by_products, orthogonalise
from engine.trainer import TrainerConfig
from model import GPT, Classifier, ModelConfig

TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=8)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16), (1, 40, 8), (2, 16, 12)])
def test_singular_vectors_stay_and_values_come_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    x = orthogonalise(g)
    values = u.mT @ x @ vh.mT  # diagonal: the singular vectors are the gradient's
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(values, torch.diag_embed(diagonal), atol=1e-9, rtol=0)
    expected = s / g.norm(dim=(-2, -1))[..., None]
    for a, b, c in COEFFICIENTS:
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(diagonal, expected)
    assert diagonal.max() < 1.5 and diagonal[expected > 0].min() > 0


def test_each_step_has_the_polynomial_nearest_to_one():
    """Chebyshev: an odd quintic is the best where its error has its extreme value four times."""
    low, high = 0.005, 1.0
    for a, b, c in COEFFICIENTS:
        x = torch.linspace(low, high, 100_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        size = error.abs().max()
        extreme = error.abs() > 0.99 * size
        signs = error[extreme].sign()
        assert 1 + (signs.diff() != 0).sum() == 4
        low, high = 1 - size.item(), 1 + size.item()
    assert size == pytest.approx(0.495, abs=1e-3)


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (32, 32)])
def test_bfloat16_is_enough(shape):
    """Two digits are lost in the sums of large terms."""
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    exact, rounded = orthogonalise(g.double()), orthogonalise(g.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("shape", [(64, 384), (384, 384), (128, 32)])
@pytest.mark.parametrize("noise", [0, 1e-3, 1e-1])
def test_in_bfloat16_no_value_grows_large(shape, noise):
    """Of a matrix that is nearly one row times one column: its largest value begins at 1."""
    torch.manual_seed(0)
    g = torch.randn(8, shape[0], 1) @ torch.randn(8, 1, shape[1]) + noise * torch.randn(8, *shape)
    assert torch.linalg.svdvals(orthogonalise(g.bfloat16()).float()).max() < 3


@pytest.mark.parametrize("shape", [(24, 96), (96, 24)])
def test_by_gram_is_by_products(shape):
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(by_gram(x), by_products(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-8, 1e12])
def test_the_size_of_a_gradient_does_not_matter(dtype, size):
    g = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(orthogonalise(size * g), orthogonalise(g), atol=0.05, rtol=0)


def test_a_zero_matrix_stays_zero():
    for shape in (2, 4, 8), (2, 8, 4), (2, 4, 4):
        assert (orthogonalise(torch.zeros(shape)) == 0).all()


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_updates_are_those_of_torch(shape, monkeypatch):
    """With its five equal steps. It takes them in bfloat16: the updates agree to two digits."""
    monkeypatch.setattr(orthogonal, "COEFFICIENTS", 5 * ((3.4445, -4.7750, 2.0315),))
    torch.manual_seed(0)
    start = torch.randn(shape)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = Muon([{"params": [mine], "lr": 0.1}, {"params": []}], {mine: 1}, momentum=0.9, interval=1,
             dtype=torch.float32, lr=1.0, weight_decay=0.2)
    b = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, momentum=0.9,
                         adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        mine.grad = torch.randn(shape)
        theirs.grad = mine.grad.clone()
        before = theirs.detach().clone()
        a.step()
        b.step()
        step = (theirs - before).norm()
        assert (mine - theirs).norm() < 0.05 * step
        mine.data.copy_(theirs.data)


def test_queries_keys_and_values_of_each_head_are_matrices_of_their_own():
    model = GPT(ModelConfig(**TINY), 11)
    attention = model.blocks[0].attn
    optimizer = make_optimizer(model, TrainerConfig(
        optimizer="muon", momentum=0.0, weight_decay=0.0, learning_rate=1.0,
        matrix_learning_rate=0.5))
    torch.manual_seed(0)
    grad = torch.randn(48, 16)
    grads = []  # as attention reads them: what each head's q, k and v get from its own rows
    for qkv in grad.view(3, 2, 8, 16):
        grads += list(orthogonalise(qkv))
    attention.qkv.weight.grad = torch.randn(48, 16)
    optimizer.step()  # without momentum nothing of it is left in the next step
    before = attention.qkv.weight.detach().clone()
    attention.qkv.weight.grad = grad
    optimizer.step()
    torch.testing.assert_close(attention.qkv.weight, before - 0.5 * 0.2 * 4 * torch.cat(grads))


def test_matrices_of_a_shape_take_turns_and_move_three_times_as_far():
    """Each at every third step, from the mean of all gradients; vectors move at every step."""
    model = GPT(ModelConfig(**TINY), 11)
    optimizer = make_optimizer(model, TrainerConfig(
        optimizer="muon", matrix_interval=3, momentum=0.75, matrix_learning_rate=0.5))
    matrix, second = (block.attn.proj.weight for block in model.blocks)
    vector = model.blocks[0].ln_1.weight
    torch.manual_seed(0)
    moves = {"matrix": [], "second": [], "vector": []}
    mean = torch.zeros(16, 16)
    for step in range(1, 7):
        before = [p.detach().clone() for p in (matrix, second, vector)]
        for p in (matrix, second, vector):
            p.grad = torch.randn_like(p)
        mean = 0.75 * mean + 0.25 * matrix.grad
        optimizer.step()
        for name, p, old in zip(moves, (matrix, second, vector), before):
            if (p != old).any():
                moves[name].append(step)
        if step == 3:
            [moved] = orthogonalise((0.25 * matrix.grad + 0.75 * mean)[None])
            expected = before[0] * (1 - 3 * 0.5 * 0.1) - 3 * 0.5 * 0.2 * 4 * moved
            torch.testing.assert_close(matrix, expected)
    assert moves == {"matrix": [3, 6], "second": [2, 5], "vector": [1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize("dtype, expected", [
    ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.bfloat16)])
def test_updates_have_the_dtype_of_the_models_products(dtype, expected, corpus, tmp_path, call,
                                                       monkeypatch):
    found = set()

    def recorded(stack):
        found.add(stack.dtype)
        return orthogonalise(stack)
    monkeypatch.setattr(muon, "orthogonalise", recorded)
    monkeypatch.setattr(device, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(device, "BF16_WIDTH", 8)
    assert call(train, *SMALL, *corpus, "--optimizer=muon", f"--dtype={dtype}", "--max_iters=2",
                f"--out_dir={tmp_path}")[0] == 0
    assert found == {expected}


def vision(task):
    pytest.importorskip("transformers", reason="pip install -r requirements-extra.txt")
    from vision.models import Vision, VisionConfig
    return Vision(VisionConfig(task=task, n_layer=2, n_embd=16, n_head=2, image_size=32), 3)


@pytest.mark.parametrize("build", [
    lambda: GPT(ModelConfig(**TINY, bias=True, precond=True, precond_power="learned"), 11),
    lambda: Classifier(ModelConfig(**TINY, attention="nystrom"), 11, 3, towers=2),
    lambda: vision("classify"), lambda: vision("detect"), lambda: vision("segment"),
], ids=["gpt", "towers", "classify", "detect", "segment"])
def test_each_parameter_is_in_exactly_one_group(build):
    model = build()
    optimizer = make_optimizer(model, TrainerConfig(optimizer="muon"))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, decayed, free = ([names[id(p)] for p in group["params"]]
                               for group in optimizer.param_groups)
    assert len(matrices) >= 8
    assert not [name for name in matrices
                if any(word in name for word in ("head", "wte", "wpe", "embed", "classifier"))]
    assert decayed and free
    assert optimizer.param_groups[2]["weight_decay"] == 0
    assert len(block_matrices(model)) == len(matrices)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_for_bit(processes, corpus, tmp_path, call):
    run = [*SMALL, *corpus, "--optimizer=muon", "--matrix_interval=3", "--init=zero",
           "--eval_interval=4", "--gradient_accumulation_steps=2", "--lr_decay_iters=8",
           "--dropout=0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def go(*words):
        if processes == 1:
            assert call(train, *words)[0] == 0
        else:
            torchrun(processes, "train.py", *words)
    go(*run, "--max_iters=8", f"--out_dir={whole}")
    go(*run, "--max_iters=4", f"--out_dir={parts}")
    go("--init_from=resume", "--max_iters=8", f"--out_dir={parts}")
    assert read_metrics(whole)[-1] == read_metrics(parts)[-1]
    a, b = (checkpoint.read(folder / "ckpt.pt")["model"] for folder in (whole, parts))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    message = error(call(train, "--init_from=resume", "--optimizer=adamw", f"--out_dir={whole}"))
    assert "--optimizer=adamw cannot change on resume: the run has optimizer=muon" in message


@pytest.mark.slow
def test_processes_follow_one(corpus, tmp_path, call):
    """Three processes share matrices of which there are two or six of a shape."""
    run = [*SMALL, *corpus, "--optimizer=muon", "--max_iters=10", "--eval_interval=5",
           "--batch_size=6"]
    assert call(train, *run, f"--out_dir={tmp_path / 'one'}")[0] == 0
    torchrun(3, "train.py", *run, f"--out_dir={tmp_path / 'three'}")
    one, three = (read_metrics(tmp_path / name)[-1] for name in ("one", "three"))
    assert one["val_loss"] == pytest.approx(three["val_loss"], rel=1e-4)


def test_zero_projections_begin_as_the_embedding():
    torch.manual_seed(0)
    config = ModelConfig(**TINY, init="zero", precond=True, precond_grad=True)
    model = GPT(config, 11)
    x = torch.arange(8)[None]
    embedded = model.wte(x) + model.wpe.weight
    torch.testing.assert_close(model.encode(x), embedded)

    def forward():
        model(x)
    kappa = kappa_by_layer(forward)
    assert None not in kappa["kappa_before"] + kappa["kappa_after"]
    _, loss = model(x, x)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].attn.proj.weight.grad.abs().max() > 0


def test_muon_learns(corpus, tmp_path, call):
    run = [*SMALL, *corpus, "--optimizer=muon", "--init=zero", "--max_iters=60",
           "--warmup_iters=5", "--learning_rate=1e-2"]
    assert call(train, *run, f"--out_dir={tmp_path}")[0] == 0
    losses = [r["val_loss"] for r in read_metrics(tmp_path) if "val_loss" in r]
    assert losses[-1] < 0.8 * losses[0]
