"""meter.py: means over steps and processes, failures that are not finite, kappa of real rows."""
import math

import pytest
import torch

from engine import meter
from engine.device import Compute
from engine.meter import Meter, kappa_by_layer
from precond import condition_number, precondition

NAMES = ("train_loss", "train_accuracy")


class Processes(Compute):
    """One of `world` processes, all of which measure the same as this one."""

    def __init__(self, world=1, rank=0):
        super().__init__("cpu", "float32", 16)
        self.world = world
        self.rank = rank

    def reduce(self, values, how="sum"):
        return [value * self.world for value in values] if how == "sum" else list(values)


@pytest.fixture
def clock(monkeypatch):
    """[seconds], which perf_counter reads."""
    now = [5.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    return now


def measure(meter, *steps):
    """Steps of (loss, accuracy, gradient norm), each with 6 tokens."""
    for step, (loss, accuracy, norm) in enumerate(steps):
        meter.add(step, torch.tensor([loss, accuracy]), torch.tensor(norm), scaled=False)
        meter.interval["tokens"] += 6
    return meter


@pytest.mark.parametrize("world", [1, 4])
def test_a_record_has_means_over_steps_and_processes(world, clock):
    m = Meter(NAMES, Processes(world))
    m.peak_flops = 100.0
    m.start()
    measure(m, (1.0, 0.5, 3.0), (2.0, 1.0, 5.0))
    clock[0] += 2.0
    m.stop()
    expected = {"train_loss": 1.5, "train_accuracy": 0.75, "grad_norm": 4.0, "learning_rate": 0.1,
                "tokens": 12 * world, "tokens_per_s": 6.0 * world, "ms_per_step": 1000.0,
                "mfu": 7 * 6.0 / 100}  # of all processes' peak
    assert m.read(0.1, flops_per_token=7) == pytest.approx(expected)
    assert m.read(0.1, 7) == {}  # nothing since then
    measure(m, (4.0, 0.0, 1.0))
    clock[0] += 1.0
    m.stop()
    again = m.read(0.1, 7)
    assert again["train_loss"] == 4.0 and again["tokens"] == 18 * world
    assert again["tokens_per_s"] == 6.0 * world and m.train_seconds == 3.0


def test_time_between_stop_and_start_does_not_count(clock):
    m = Meter(NAMES, Processes())
    m.start()
    clock[0] += 1
    m.stop()
    clock[0] += 100  # an evaluation
    m.start()
    clock[0] += 1
    m.stop()
    assert m.train_seconds == m.interval["seconds"] == 2.0


@pytest.mark.parametrize("loss, norm, scaled, bad", [
    (1.0, 1.0, False, -1), (math.nan, 1.0, False, 1), (1.0, math.inf, False, 1),
    (1.0, math.inf, True, -1), (math.inf, 1.0, True, 1)])
def test_the_first_step_that_is_not_finite(loss, norm, scaled, bad):
    """With the float16 scaler an overflowing gradient is no failure: it skips that step."""
    m = Meter(NAMES, Processes())
    for step, x in enumerate([(1.0, 1.0), (loss, norm), (1.0, 2.0), (loss, norm)]):
        m.add(step, torch.tensor([x[0], 0.0]), torch.tensor(x[1]), scaled)
    assert m.first_bad_step() == bad
    assert m.sums[-1] == 3 + 2 * (norm if math.isfinite(norm) else 0)


@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (2, 4), (1, 2)])
def test_sums_go_on_with_the_processes_that_there_are(before, after):
    """Another number of them goes on from the same means and as many tokens together."""
    ranks = []
    for rank in range(before):
        m = measure(Meter(NAMES, Processes()), (rank + 1.0, 0.5, 2.0), (3.0 * rank, 0.0, 2.0))
        ranks.append(m.state())
    restored = []
    for rank in range(after):
        m = Meter(NAMES, Processes(after, rank))
        m.restore(ranks)
        restored.append(m)
    if before == after:
        for m, state in zip(restored, ranks, strict=True):
            assert torch.equal(m.sums, state["sums"]) and m.interval == state["interval"]
    whole = sum(state["sums"] for state in ranks) / before
    torch.testing.assert_close(sum(m.sums for m in restored) / after, whole)
    assert sum(m.interval["tokens"] for m in restored) == 12 * before
    assert all(m.interval["steps"] == 2 for m in restored)


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
        assert got[f"kappa_{name}"] == [each.median().item()]
        assert got[f"kappa_{name}_infinite"] == [2]

    # a run without C: power 0 records A twice, and the C that it could have is applied
    def plain():
        precondition(a, power=0)
    expected = condition_number(precondition(a)).median().item()
    assert kappa_by_layer(plain, {"power": 1.0})["kappa_after"] == [expected]


def test_kappa_with_an_infinite_median_is_none():
    def forward():
        precondition(torch.zeros(1, 2, 8, 4))
    got = kappa_by_layer(forward)
    assert got["kappa_before"] == [None] and got["kappa_before_infinite"] != [None]
