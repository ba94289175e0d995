"""bench.py on a model of toy size: arms in processes of their own, derived columns, mistakes."""
import json
import textwrap

import pytest
import torch

import bench
from conftest import error, shell
from model import GPT
from train import Config
from train_lra import Config as ClassifierConfig

SHAPE = dict(block_size=8, n_layer=1, n_head=2, n_embd=16, batch_size=2)
SIZE = bench.Size(Config(**SHAPE, init="gpt2"), 13)
TINY = """
    import sys
    sys.path.insert(0, {root!r})
    import bench
    from train import Config
    tiny = Config(block_size=8, n_layer=1, n_head=2, n_embd=16, batch_size=2)
    bench.SIZES["default"] = bench.Size(tiny, 13, ((1, 1, 7), (2, 3, 4)))
    bench.TURN = 0.02
    if __name__ == "__main__":
        bench.options.run(bench.main)
"""
NANOGPT = """
    import torch
    from dataclasses import dataclass

    @dataclass
    class GPTConfig:
        vocab_size: int
        block_size: int
        n_layer: int
        n_head: int
        n_embd: int
        dropout: float
        bias: bool

    class GPT(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            print("number of parameters: not for the table")
            self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

        def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
            return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas,
                                     weight_decay=weight_decay)

        def forward(self, x, y):
            logits = self.table(x)
            return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

        def generate(self, prompt, new_tokens, top_k):
            return prompt
"""


@pytest.mark.slow
def test_a_bench_of_all_arms(tmp_path):
    """A round of three arms and a stand-in for nanoGPT; a profile."""
    root = bench.__file__.removesuffix("bench.py")
    (tmp_path / "tiny.py").write_text(textwrap.dedent(TINY).format(root=root))
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano/model.py").write_text(textwrap.dedent(NANOGPT))
    done = shell(tmp_path / "tiny.py", "--sizes=default", "--rounds=1", "--arms=baseline,precond",
                 f"--against={tmp_path / 'nano'}", "--checkpoint_activations", "--profile",
                 f"--out_dir={tmp_path / 'profile'}", "--device=cpu", "--dtype=bfloat16")
    lines = done.stdout.strip().splitlines()
    assert lines[0] == "default: 1 layers x 16, vocabulary 13, batch 2 x 8", done.stdout
    assert "time, memory / nanoGPT" in lines[2], done.stdout
    arms = {line[:24].strip(): line[24:].split() for line in lines[3:7]}
    assert list(arms) == ["baseline", "precond", "baseline, checkpointed", "nanoGPT"]
    assert [row[0] for row in arms.values()] == ["bfloat16"] * 3 + ["float32"]
    for row in arms.values():
        ms, tokens, memory = float(row[2]), float(row[5]), float(row[6])
        assert tokens == pytest.approx(2 * 8 / ms * 1e3, rel=2e-3)
        assert memory > 50 and row[7].endswith("%")
    assert arms["baseline"][-4:-2] == ["1.000", "1.000"]
    assert arms["nanoGPT"][-2:] == ["1.000", "1.000"]
    assert "sampling, 1 x 7 tokens after 1: baseline " in lines[7]
    assert "sampling, 2 x 4 tokens after 3: baseline " in lines[8]
    assert "aten::" in (tmp_path / "profile/default.txt").read_text()
    assert json.loads((tmp_path / "profile/default.json").read_text())["traceEvents"]


def test_utilisation_is_flops_over_the_measured_peak(monkeypatch):
    """1,000 FLOPs a token at 16 tokens in 2 s on a machine of 32,000 FLOP/s: 25%. Medians and the
    best peak count.

    Memory is read before the matrix product is timed, which starts its peak anew."""
    seconds = iter([[9.0], [1.0, 2.0], [2.0, 50.0]])

    class FakeCompute:
        dtype = "float32"
        peaks = iter([20e3, 32e3, 25e3])

        def peak_memory_mb(self):
            return self.memory

        def matmul_peak(self):
            self.memory = 100.0
            return next(self.peaks)

    class FakeWorker(bench.Runner):
        compute = FakeCompute()
        model = step = None
        flops_per_token = 1000

        def __init__(self, start, config, size, arm):
            pass

        def ask(self, method):
            return getattr(self, method)()

        def close(self):
            pass

    def time_turn(step, compute, turn):
        compute.memory = 300.0
        return next(seconds)
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    monkeypatch.setattr(bench, "time_turn", time_turn)
    monkeypatch.setitem(bench.SIZES, "default", SIZE)
    config = bench.Config(arms="precond", rounds=2, sampling=False)
    result = bench.measure(config, "default")["precond"]
    assert result["seconds"] == 2.0 and result["tokens_per_s"] == 8.0
    assert result["memory"] == 300.0 and result["utilisation"] == 0.25


def test_ratios_that_may_be_noise_say_so():
    def arm(low, median, high, steps=8):
        """A step and a sample of 10 tokens took as long."""
        return {"dtype": "float32", "loss": "plain", "steps": steps, "seconds": median,
                "quartiles": (low, high), "memory": 1.0, "peak": 1.0, "tokens_per_s": 1.0,
                "utilisation": 1.0, "sampling": {(2, 1, 5): (low, median, high)}}
    text = bench.table({"baseline": arm(1.0, 2.0, 3.0), "precond": arm(1.0, 1.34, 1.5),
                        "nanoGPT": arm(3.5, 4.0, 5.0)})
    *_, sampling, caution = text.splitlines()
    assert sampling == ("sampling, 2 x 5 tokens after 1: baseline 5 tokens/s (2 x nanoGPT), "
                        "precond 7.463 tokens/s (1.49 x baseline, or noise) (2.99 x nanoGPT), "
                        "nanoGPT 2.5 tokens/s (0.5 x baseline)")
    assert caution == "time / baseline may be noise, the quartiles overlap: precond"
    long = bench.table({"muon_interval_3": arm(1, 2, 3), "nanoGPT": arm(4, 5, 6)}).splitlines()[:3]
    assert len({len(line) for line in long}) == 1 and " time, memory / muon_interval_3" in long[0]
    assert "noise" not in bench.table({"baseline": arm(1, 2, 3), "precond": arm(4, 5, 6)})
    text = bench.table({"baseline": arm(1, 2, 3), "precond": arm(4, 5, 6, steps=7)})
    assert text.endswith("ratios of fewer than 8 steps may be noise: raise --rounds")


def test_our_arm_takes_the_trainer_s_steps():
    torch.set_num_threads(1)
    arm = bench.Ours(bench.Config(device="cpu"), SIZE, {"precond": True})
    before = [p.clone() for p in arm.model.parameters()]
    arm.step()
    assert arm.trainer.step == 1
    assert not any(torch.equal(p, q) for p, q in zip(arm.model.parameters(), before))
    assert arm.model.config.precond
    assert arm.flops_per_token == GPT(SIZE.config, 13).flops_per_token()


def test_explicit_attention_and_nystrom_of_a_classifier(monkeypatch):
    """The same function by other kernels, and a step of each."""
    used = []
    monkeypatch.setattr(bench, "sdpa_kernel",
                        lambda kernel: used.append(kernel) or bench.nullcontext())
    size = bench.Size(ClassifierConfig(**SHAPE), 13, classes=3)
    arms = {name: bench.Ours(bench.Config(device="cpu"), size, bench.ARMS[name])
            for name in ("baseline", "explicit", "nystrom_precond")}
    for arm in arms.values():
        arm.step()
    assert used == [bench.SDPBackend.MATH]
    parameters = (arms[name].model.parameters() for name in ("baseline", "explicit"))
    assert all(torch.equal(p, q) for p, q in zip(*parameters))
    model = arms["nystrom_precond"].model
    assert model.config.attention == "nystrom" and model.config.precond
    assert arms["baseline"].model.head[-1].out_features == 3


@pytest.mark.slow
def test_an_arm_that_dies_is_one_line(tmp_path, call, monkeypatch):
    (tmp_path / "model.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setitem(bench.SIZES, "default", SIZE)
    assert "exit code 3" in error(call(bench, "--sizes=default", "--arms=baseline",
                                       f"--against={tmp_path}"))


@pytest.mark.parametrize("arguments, words", [
    (["--sizes=default,huge"],
     "--sizes=huge is unknown: choose of default,char_gpu,gpt2_124m"),
    (["--arms=postcond"], "--arms=postcond"),
    (["--against=/nowhere"], "holds no model.py"),
    (["--sizes=lra_listops,default", "--arms=nystrom"], "not causal, so default cannot have it"),
    (["--rounds=0"], "rounds=0"),
    (["--profile", "--out_dir=README.md/x"], "cannot write to README.md/x"),
    (["--device=cuda:77"], "--device=cuda:77"),
])
def test_mistakes(call, arguments, words):
    assert words in error(call(bench, *arguments))
