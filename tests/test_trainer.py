"""trainer.py and device.py: schedule, optimizer, hardware choices. Whole runs are in test_end_to_end.py."""
import math

import pytest
import torch

from engine import device
from engine.options import UserError
from engine.metrics import MetricsLog
from model import GPT, ModelConfig
from precond import condition_number, kappa_by_layer, precondition
from engine.optim import learning_rate, make_optimizer
from engine.trainer import TrainerConfig


def nanogpt_lr(it, rate, warmup, decay, low):
    if it < warmup:
        return rate * (it + 1) / (warmup + 1)
    if it > decay:
        return low
    return low + 0.5 * (1 + math.cos(math.pi * (it - warmup) / (decay - warmup))) * (rate - low)


def test_cosine_schedule_is_nanogpts():
    config = TrainerConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=50, max_iters=70)
    for it in range(70):
        assert learning_rate(config, it) == pytest.approx(nanogpt_lr(it, 1e-3, 10, 50, 1e-4), rel=1e-12)
    assert learning_rate(config, 0) > 0


def test_other_schedules():
    linear = TrainerConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=0, max_iters=10, lr_schedule="linear")
    assert [learning_rate(linear, it) for it in (0, 5, 10, 11)] == [1.0, 0.5, 0.0, 0.0]
    constant = TrainerConfig(learning_rate=1.0, warmup_iters=1, max_iters=10, lr_schedule="constant")
    assert [learning_rate(constant, it) for it in (0, 1, 10)] == [0.5, 1.0, 1.0]
    assert learning_rate(TrainerConfig(warmup_iters=5, max_iters=5), 5) == TrainerConfig().min_lr  # no room for a decay


def test_weight_decay_acts_on_matrices_only():
    model = GPT(ModelConfig(bias=True), 65)
    decayed, free = make_optimizer(model, TrainerConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and free["weight_decay"] == 0
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in free["params"])
    assert sum(p.numel() for g in (decayed, free) for p in g["params"]) == model.n_parameters()


@pytest.mark.parametrize("wrong", [dict(batch_size=0), dict(eval_interval=0), dict(log_interval=-1), dict(learning_rate=-1.0),
                                   dict(max_iters=-1), dict(grad_clip=math.nan), dict(beta1=1.5), dict(seed=2**40)])
def test_impossible_configurations(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainerConfig(**wrong)


def test_devices():
    assert device.pick_device("cpu").type == "cpu"
    for name in ("cuda:99", "toaster", "meta"):
        with pytest.raises(UserError, match=f"--device={name}"):
            device.pick_device(name)


def test_dtypes(monkeypatch):
    cpu = torch.device("cpu")
    assert device.pick_dtype("bfloat16", cpu, 8) == "bfloat16"
    for native in (False, True):
        monkeypatch.setattr(device, "cpu_multiplies_bf16", lambda: native)
        assert device.pick_dtype("auto", cpu, device.BF16_WIDTH) == ("bfloat16" if native else "float32")
        assert device.pick_dtype("auto", cpu, device.BF16_WIDTH - 1) == "float32"
    with pytest.raises(UserError, match="float16 is for GPUs"):
        device.pick_dtype("float16", cpu, 512)


@pytest.mark.parametrize("amx, avx, vendor, fast", [(True, True, "GenuineIntel", True), (False, True, "GenuineIntel", False),
                                                    (False, True, "AuthenticAMD", True), (False, False, "AuthenticAMD", False)])
def test_processors_that_multiply_bfloat16_faster(amx, avx, vendor, fast, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    assert device.cpu_multiplies_bf16() == fast


def test_tensorboard_goes_on_where_the_checkpoint_is(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -r requirements-extra.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(start, *steps):
        metrics = MetricsLog(tmp_path, start, 9, tensorboard=True, wandb=None)
        for step in steps:
            metrics.write({"step": step, "train_loss": 1.0})
        metrics.close()
        return [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("train_loss")]
    assert write(-1, 0, 2, 4, 6) == [0, 2, 4, 6]
    assert write(4, 6, 8) == [0, 2, 4, 6, 8]
    assert write(-1, 0, 3) == [0, 3]  # another run in the place of this one


def test_kappa_is_the_median_over_heads_and_samples_of_real_rows():
    torch.manual_seed(0)
    a = torch.randn(2, 3, 20, 4)
    a[:, 2, :, 0] = 0  # one head of rank 3
    mask = torch.arange(20) < torch.tensor([[20], [12]])

    def forward():
        precondition(a)
        return mask
    got = kappa_by_layer(forward)
    for name, x in (("before", a), ("after", precondition(a))):
        each = torch.cat([condition_number(x[0]), condition_number(x[1, :, :12])])
        assert got[f"kappa_{name}"] == [each.median().item()] and got[f"kappa_{name}_infinite"] == [2]
    # a run without C: power 0 records A twice, and the C that it could have is applied
    def plain():
        precondition(a, power=0)
    assert kappa_by_layer(plain, {"power": 1.0})["kappa_after"] == [condition_number(precondition(a)).median().item()]


def test_kappa_with_an_infinite_median_is_none():
    def forward():
        precondition(torch.zeros(1, 2, 8, 4))
    got = kappa_by_layer(forward)
    assert got["kappa_before"] == [None] and got["kappa_before_infinite"] != [None]
