"""What must hold on a GPU: collected on a machine that has one. `python -m pytest` checks it there.

A GPU adds in another order than a CPU does, so the two are near and not equal. Some of its kernels
add in whatever order their threads come: runs with them are near each other, others equal.
"""
import pytest
import torch

import attention
import precond
import sample
import train
import train_lra
import train_vision
from conftest import GPU, SMALL, launch, read_metrics, torchrun
from engine import checkpoint
from engine.device import Compute
from engine.orthogonal import orthogonalise
from model import GPT, ModelConfig

TEXT = [*SMALL, f"--device={GPU}", "--dtype=float32", "--precond=True", "--precond_grad=True"]
TASKS = {
    "text": (train, []),
    "listops": (train_lra, ["listops", "--n_train=60", "--n_val=20", "--n_test=20"]),
    "detect": (train_vision, ["detect", "--n_val=8", "--n_layer=2", "--n_embd=32", "--n_head=2"]),
    "segment": (train_vision, ["segment", "--n_val=8", "--n_layer=2", "--n_embd=32",
                               "--n_head=2"]),
}
SHORT = ["--batch_size=4", "--eval_iters=2", "--eval_interval=3", "--warmup_iters=2"]
COUNT = torch.cuda.device_count()


@pytest.fixture
def exactly():
    """Without TF32: float32 is float32."""
    with Compute(GPU, "float32", 16).full_precision():
        yield


def near(a, b, tolerance=1e-4):
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted(attention.MECHANISMS))
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_attention_and_c_are_the_cpus(name, power, exactly):
    q, k, v = torch.randn(3, 2, 3, 17, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(17) < torch.tensor([[17], [9]])
    found = []
    for device in "cpu", GPU:
        inputs = [x.detach().to(device).requires_grad_() for x in (q, k, v)]
        function = attention.MECHANISMS[name].function
        options = {"landmarks": 4} if name == "nystrom" else {}
        a = function(*inputs, mask.to(device), is_causal=False, dropout_p=0.0, **options)
        out = precond.precondition(a, grad=True, power=power)
        out.square().sum().backward()
        found.append((out, *(x.grad for x in inputs)))
    for on_cpu, on_gpu in zip(*found):
        near(on_gpu, on_cpu, 1e-3)


def test_kappa_is_the_cpus(exactly):
    x = torch.randn(6, 12, 5, generator=torch.Generator().manual_seed(0))
    x[0, :, 1] = x[0, :, 0]  # rank-deficient: infinite
    near(precond.condition_number(x.to(GPU)), precond.condition_number(x), 1e-3)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (40, 8)])
def test_updates_of_muon_are_the_cpus(shape, exactly):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    near(orthogonalise(g.to(GPU)), orthogonalise(g), 1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_follows_the_cpu(optimizer, corpus, tmp_path, call):
    run = [*TEXT, *corpus, *SHORT, "--max_iters=6", f"--optimizer={optimizer}"]
    for device in "cpu", GPU:
        assert call(train, *run, f"--device={device}", f"--out_dir={tmp_path / device}")[0] == 0
    for a, b in zip(*(read_metrics(tmp_path / device) for device in ("cpu", GPU))):
        if "val_loss" in a:  # Muon multiplies in TF32 on a GPU
            assert b["val_loss"] == pytest.approx(a["val_loss"],
                                                  rel=1e-2 if optimizer == "muon" else 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_run_goes_on_as_if_never_stopped(task, dtype, corpus, prepared, tmp_path, call):
    module, words = TASKS[task]
    data = {"text": [*SMALL, *corpus], "listops": [prepared]}.get(task, [])
    run = [*words, *data, *SHORT, f"--device={GPU}", f"--dtype={dtype}", "--dropout=0.1",
           "--lr_decay_iters=6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(module, *run, "--max_iters=6", f"--out_dir={whole}")[0] == 0
    assert call(module, *run, "--max_iters=3", f"--out_dir={parts}")[0] == 0
    assert call(module, "--init_from=resume", "--max_iters=6", f"--out_dir={parts}")[0] == 0
    last, resumed = (read_metrics(folder)[-1] for folder in (whole, parts))
    a, b = (checkpoint.read(folder / "ckpt.pt")["model"] for folder in (whole, parts))
    # The losses of detection and the backward pass of segmentation's grid_sample add by threads.
    error = 1e-2 if task in ("detect", "segment") else 0
    torch.testing.assert_close(a, b, rtol=error, atol=error)
    if error:
        assert resumed["val_loss"] == pytest.approx(last["val_loss"], rel=error)
    else:
        assert resumed == last


@pytest.mark.slow
def test_compiled_is_near(corpus, tmp_path, call):
    run = [*TEXT, *corpus, *SHORT, "--max_iters=6"]
    for words in ["--compile=False"], ["--compile=True"]:
        assert call(train, *run, *words, f"--out_dir={tmp_path / words[0][2:]}")[0] == 0
    plain, compiled = (read_metrics(tmp_path / f"compile={x}")[-1] for x in (False, True))
    assert compiled["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(COUNT == 0, reason="there is no CUDA device")
@pytest.mark.parametrize("shard, dtype, optimizer", [
    # Muon's products in bfloat16 make more of the other order of the sums than 1e-4.
    (False, "float32", "adamw"), (True, "float32", "adamw"), (True, "bfloat16", "muon")])
def test_as_many_processes_as_gpus(shard, dtype, optimizer, corpus, tmp_path):
    run = [*TEXT, *corpus, *SHORT, "--max_iters=6", f"--batch_size={4 * COUNT}", f"--dtype={dtype}",
           f"--optimizer={optimizer}"]
    launch(1, "train.py", *run, f"--out_dir={tmp_path / 'one'}")
    torchrun(COUNT, "train.py", *run, f"--shard={shard}", f"--out_dir={tmp_path / 'all'}")
    one, several = (read_metrics(tmp_path / name)[-1] for name in ("one", "all"))
    error = 1e-4 if dtype == "float32" else 1e-2
    assert several["val_loss"] == pytest.approx(one["val_loss"], rel=error)


def test_the_likeliest_tokens_are_the_cpus(exactly):
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16), 13)
    prompt = torch.randint(13, (3, 4))
    written = []
    for device in "cpu", GPU:
        few = sample.generate(model.to(device), prompt.to(device), 20, temperature=0)
        written.append(torch.stack(list(few), 1).cpu())
    assert torch.equal(*written)
