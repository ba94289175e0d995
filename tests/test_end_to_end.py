"""Whole runs of train.py: exact resume, processes, signals, presets, and the mistakes that users make."""
import contextlib
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from engine import checkpoint
from engine import meter, run
import train
from engine import trainer
from engine.options import UserError
from conftest import ROOT, SMALL, error, killer, launch, messages, read_metrics, shell, torchrun

RUN = [*SMALL, "--max_iters=30", "--eval_interval=8", "--log_interval=3", "--dropout=0.1", "--gradient_accumulation_steps=2", "--precond=True"]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_resumes_bit_for_bit(processes, corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(processes, "train.py", *RUN, *corpus, f"--out_dir={whole}")
    assert launch(processes, killer(tmp_path, "train", 20), *RUN, *corpus, f"--out_dir={killed}", check=False).returncode != 0
    assert read_metrics(killed)[-1]["step"] == 18 and checkpoint.read(killed / "ckpt.pt")["step"] == 16
    launch(processes, "train.py", "--init_from=resume", f"--out_dir={killed}")
    assert read_metrics(killed) == read_metrics(whole)
    assert [r["step"] for r in read_metrics(whole)] == [0, 3, 6, 8, 9, 12, 15, 16, 18, 21, 24, 27, 30]
    a, b = (checkpoint.read(folder / "ckpt.pt")["model"] for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_processes_follow_the_trajectory_of_one(corpus, tmp_path):
    options = [*SMALL, *corpus, "--max_iters=20", "--eval_interval=10", "--gradient_accumulation_steps=3", "--batch_size=2"]
    torchrun(2, "train.py", *options, f"--out_dir={tmp_path / 'two'}")
    shell("train.py", *options, f"--out_dir={tmp_path / 'one'}")
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert one["step"] == two["step"] and one.get("tokens") == two.get("tokens")
        for name in {"train_loss", "val_loss", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=2e-5), (one["step"], name)
    # a run of one process can be taken over by two
    torchrun(2, "train.py", "--init_from=resume", "--max_iters=24", f"--out_dir={tmp_path / 'one'}")
    assert read_metrics(tmp_path / "one")[-1]["step"] == 24


def test_indivisible_batch_under_torchrun_is_one_line(corpus, tmp_path):
    done = torchrun(2, "train.py", *SMALL, *corpus, "--batch_size=3", f"--out_dir={tmp_path}", check=False)
    assert "train.py: error: batch_size x gradient_accumulation_steps = 3 x 1 = 3 sequences cannot be split over 2 processes" in done.stderr
    assert 'File "' not in done.stderr.split("train.py: error")[0]


def test_out_dir_that_only_some_nodes_see_is_the_same_error_on_every_rank(corpus, tmp_path):
    node = tmp_path / "node0"
    shell("train.py", *SMALL, *corpus, "--max_iters=2", f"--out_dir={node / 'out'}")
    found = messages(tmp_path, f"os.makedirs(f'{tmp_path}/node{{rank}}', exist_ok=True); os.chdir(f'{tmp_path}/node{{rank}}')",
                     "--init_from=resume", "--max_iters=4", "--out_dir=out")
    assert found == ["out_dir=out must be one folder that all nodes see: rank 0 finds there: step 2; rank 1: no checkpoint out/ckpt.pt: "
                     "train first, or name the run's folder with --out_dir"] * 2


@pytest.mark.parametrize("found, words", [
    (["step 2", "step 2", "step 4"], "all nodes see: rank 0 finds there: step 2; rank 2: step 4"),
    (["no run", "step 2"], "rank 0 finds there: no run; rank 1: step 2"),
    (["lost", "lost"], "^lost$"), (["step 2", "step 2"], None), (["no run"], None),
])
def test_every_rank_finds_the_same_run(found, words):
    class Compute:
        def gather(self, value):
            assert value == found[-1]
            return found
    saved = {"step 2": {"step": 2}, "step 4": {"step": 4}}.get(found[-1])
    problem = UserError("lost") if found[-1] == "lost" else None
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        run.Run(train.Config(), {}, saved, problem).agree(Compute())


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_saves_and_exits(number, code, corpus, tmp_path, call, monkeypatch):
    assert call(train, *RUN, *corpus, f"--out_dir={tmp_path / 'whole'}")[0] == 0
    step = trainer.Trainer.train_step

    def interrupted(self):
        if self.step == 15:
            os.kill(os.getpid(), number)
        step(self)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", interrupted)
        got, out, _ = call(train, *RUN, *corpus, f"--out_dir={tmp_path / 'stopped'}")
    assert got == code and "Go on with --init_from=resume" in out
    assert checkpoint.read(tmp_path / "stopped/ckpt.pt")["step"] == 16
    assert call(train, "--init_from=auto", f"--out_dir={tmp_path / 'stopped'}")[0] == 0
    assert read_metrics(tmp_path / "stopped") == read_metrics(tmp_path / "whole")


def test_a_run_learns_and_records(corpus, tmp_path, call):
    code, out, _ = call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=150", "--learning_rate=1e-2", "--init_from=auto")
    assert code == 0 and "python sample.py" in out
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 0 and records[-1]["step"] == 150
    assert records[-1]["val_loss"] < 0.6 * records[0]["val_loss"]
    last = records[-1]
    assert set(last) == set("step train_loss val_loss val_bpb learning_rate grad_norm tokens tokens_per_s ms_per_step elapsed_s peak_memory_mb "
                            "mfu kappa_before kappa_after kappa_before_infinite kappa_after_infinite".split())
    assert last["tokens"] == 150 * 4 * 16 and len(last["kappa_before"]) == len(last["kappa_after"]) == 2
    best = checkpoint.read(tmp_path / "best.pt")
    assert best["best"]["value"] == min(r["val_loss"] for r in records if "val_loss" in r)
    # a shorter look at the same checkpoint
    code, out, _ = call(train, "--eval_only", f"--out_dir={tmp_path}")
    assert code == 0 and f"step {best['best']['step']}: val_loss {best['best']['value']:.4f}" in out


def test_what_a_run_is_cannot_change_on_resume_through_an_option_or_a_preset(corpus, tmp_path, call):
    run, preset = tmp_path / "run", tmp_path / "deeper.toml"
    preset.write_text("n_layer = 3\nmax_iters = 50\n")
    assert call(train, *SMALL, *corpus, f"--out_dir={run}", "--max_iters=2")[0] == 0
    again = ["--init_from=resume", f"--out_dir={run}", "--max_iters=4"]
    assert "n_layer=3, which the preset sets, cannot change on resume: the run has n_layer=2" in error(call(train, preset, *again))
    assert "--precond=True cannot change on resume: the run has precond=False" in error(call(train, *again, "--precond=True"))
    assert "batch_size x eval_iters = 9 cannot change on resume: the run has 8" in error(
        call(train, *again, "--batch_size=1", "--gradient_accumulation_steps=4", "--eval_iters=9"))
    code, out, _ = call(train, run / "config.toml", *again)
    assert code == 0 and "max_iters 2 -> 4" in out
    # an evaluation can take the preconditioner away, or put one in, but not change the model
    plain, other = (call(train, "--eval_only", f"--out_dir={run}", *more) for more in ([], ["--precond=True"]))
    assert plain[0] == other[0] == 0 and plain[1].splitlines()[-1] != other[1].splitlines()[-1]
    assert "cannot change on resume" in error(call(train, "--eval_only", f"--out_dir={run}", preset))


def test_smaller_batches_are_evaluated_on_the_same_tokens(corpus, tmp_path, call):
    assert call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=2")[0] == 0
    again = ["--init_from=resume", "--max_iters=3", "--batch_size=2", "--gradient_accumulation_steps=2", "--learning_rate=0", "--min_lr=0"]
    assert call(train, *again, f"--out_dir={tmp_path}")[0] == 0
    *_, before, after = (r["val_loss"] for r in read_metrics(tmp_path) if "val_loss" in r)
    assert after == pytest.approx(before, rel=1e-6)


def test_a_run_is_not_lost_through_its_own_configuration(corpus, tmp_path, call):
    for more in ([], ["--overwrite"]):
        assert call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=1", *more)[0] == 0
    assert "holds a run" in error(call(train, tmp_path / "config.toml", "--seed=5"))


def test_evaluation_is_of_the_run_and_not_of_what_its_preset_started_from(corpus, tmp_path, call):
    preset = tmp_path / "preset.toml"
    preset.write_text('init_from = "gpt2"\n')
    assert "no checkpoint" in error(call(train, "--eval_only", "--init_from=auto", *SMALL, *corpus, f"--out_dir={tmp_path / 'none'}"))
    assert call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=3")[0] == 0
    code, out, _ = call(train, preset, "--eval_only", f"--out_dir={tmp_path}")
    assert code == 0 and f"step 3: val_loss {read_metrics(tmp_path)[-1]['val_loss']:.4f}" in out


def test_damaged_metrics_are_named_on_resume(corpus, tmp_path, call):
    assert call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=2")[0] == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "nonsense\n" + lines[1])
    message = error(call(train, "--init_from=resume", "--max_iters=4", f"--out_dir={tmp_path}"))
    assert "metrics.jsonl is damaged after 1 lines" in message


def test_an_out_dir_that_cannot_be_written_is_found_before_the_data_is_prepared(tmp_path, call):
    (tmp_path / "file").write_text("")
    assert "cannot write to" in error(call(train, "--dataset=missing.txt", f"--out_dir={tmp_path / 'file' / 'out'}"))


def test_a_baseline_with_the_preconditioner_s_options_says_so(corpus, tmp_path, call):
    code, out, _ = call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=1", "--precond_power=0.5")
    assert code == 0 and "precond=False (precond_power=0.5 has no effect on training)\n" in out


def test_kappa_is_measured_in_full_float32(corpus, tmp_path, call, monkeypatch):
    def precision():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    probe, loss, seen = train.LanguageModelling.probe, train.LanguageModelling.loss, {"probe": set(), "loss": set()}
    monkeypatch.setattr(train.LanguageModelling, "probe", lambda *args: seen["probe"].add(precision()) or probe(*args))
    monkeypatch.setattr(train.LanguageModelling, "loss", lambda *args: seen["loss"].add(precision()) or loss(*args))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as on a GPU
    try:
        assert call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=2")[0] == 0
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"probe": {("highest", False)}, "loss": {("high", True)}}


def test_evaluation_is_not_training_time(corpus, tmp_path, call, monkeypatch):
    now, evaluate = [0.0], train.LanguageModelling.evaluate

    def slow(*args):
        now[0] += 1000
        return evaluate(*args)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 0.001) or now[0])
    monkeypatch.setattr(train.LanguageModelling, "evaluate", slow)
    assert call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=8", "--eval_interval=2", "--log_interval=3")[0] == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < r["ms_per_step"] < 1000 for r in records[1:]) and 0 < records[-1]["elapsed_s"] < 1


def test_accumulation_does_not_change_the_data(corpus, tmp_path, call):
    for name, options in (("whole", ["--batch_size=4"]), ("parts", ["--batch_size=2", "--gradient_accumulation_steps=2"])):
        assert call(train, *SMALL, *corpus, *options, "--eval_iters=100", "--max_iters=10", f"--out_dir={tmp_path / name}")[0] == 0
    a, b = (read_metrics(tmp_path / name)[-1] for name in ("whole", "parts"))
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5) and a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(corpus, tmp_path, call, monkeypatch):
    loss = train.LanguageModelling.loss
    calls = []

    def poisoned(self, model, x, y):
        calls.append(1)
        return (loss(self, model, x, y)[0] * (math.nan if len(calls) == 14 else 1),)
    monkeypatch.setattr(train.LanguageModelling, "loss", poisoned)
    result = call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=30", "--eval_interval=10", "--log_interval=20")
    assert "the loss is not finite at step 13" in error(result)
    saved = checkpoint.read(tmp_path / "ckpt.pt")
    assert saved["step"] == 10 and all(p.isfinite().all() for p in saved["model"].values())


def test_full_disk_keeps_the_checkpoint(corpus, tmp_path, call, monkeypatch):
    assert call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=5")[0] == 0

    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        message = error(call(train, "--init_from=resume", "--max_iters=9", f"--out_dir={tmp_path}"))
    assert "No space left on device; the previous" in message
    assert checkpoint.read(tmp_path / "ckpt.pt")["step"] == 5
    assert call(train, "--init_from=resume", "--max_iters=9", f"--out_dir={tmp_path}")[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a file on a disk that is always full")
def test_full_disk_for_metrics_is_the_same_error_on_every_rank(corpus, tmp_path):
    found = messages(tmp_path, """
        class Full(run.MetricsLog):
            def __init__(self, *args):
                super().__init__(*args)
                self.file = open("/dev/full", "a")
        run.MetricsLog = Full
    """, *SMALL, *corpus, "--max_iters=2", f"--out_dir={tmp_path}")
    assert found == [f"cannot write {tmp_path / 'metrics.jsonl'}: No space left on device. Make room and use --init_from=resume"] * 2


@pytest.mark.parametrize("preset", sorted(p.name for p in (ROOT / "config").glob("*.toml") if not p.name.startswith(("lra_", "vision_"))))
def test_every_preset_starts(preset, corpus, tmp_path, call):
    overrides = [*SMALL, *corpus, "--init_from=scratch", "--tokenizer=bytes", "--max_iters=2", "--gradient_accumulation_steps=1"]
    code, _, err = call(train, f"config/{preset}", *overrides, "--compile=False", f"--out_dir={tmp_path}")
    assert code == 0, err
    assert read_metrics(tmp_path)[-1]["step"] == 2
    assert call(train, tmp_path / "config.toml", "--overwrite")[0] == 0  # the saved configuration can be given back


def test_defaults_are_the_cpu_preset():
    config, _ = train.options.parse(train.Config, ["config/shakespeare_char.toml"], "")
    assert config == train.Config()


@pytest.fixture
def finished(corpus, tmp_path, call):
    assert call(train, *SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=2")[0] == 0
    return f"--out_dir={tmp_path}"


@pytest.mark.parametrize("arguments, words", [
    (["--precondition"], "unknown option --precondition: did you mean --precond?"),
    (["--n_head=3"], "n_head=3 does not divide n_embd=32"),
    (["--attention=nystrom"], "attention=nystrom is not causal: its landmarks average over future tokens"),
    (["--dataset=nothere.txt"], "nothere.txt"),
    (["--block_size=2000"], "block_size"),
    (["--init_from=resume"], "no checkpoint"),
    (["--init_from=nothere"], "nothere is neither a folder nor one of gpt2"),
    (["--device=cuda:77"], "--device=cuda:77 asked for, but"),
    (["--dtype=float16"], "float16 is for GPUs"),
])
def test_mistakes(arguments, words, corpus, tmp_path, call):
    assert words in error(call(train, *SMALL, *corpus, f"--out_dir={tmp_path / 'new'}", *arguments))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content, words", [(b"", "is empty"), (b"ab\xff\xfe" * 1000, "not UTF-8"), (b"To be or not", "block")])
def test_unusable_text(content, words, tmp_path, call):
    (tmp_path / "text.txt").write_bytes(content)
    assert words in error(call(train, *SMALL, f"--dataset={tmp_path / 'text.txt'}", f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}"))


@pytest.mark.parametrize("arguments, words", [
    ([], "holds a run: continue it with --init_from=resume"),
    (["--init_from=resume", "--n_layer=3"], "--n_layer=3 cannot change on resume: the run has n_layer=2"),
    (["--init_from=resume", "--batch_size=5"], "= 5 cannot change on resume: the run has 4"),
])
def test_mistakes_with_an_existing_run(arguments, words, finished, call):
    assert words in error(call(train, *arguments, finished))


def test_damaged_checkpoints(finished, call):
    path = Path(finished.removeprefix("--out_dir=")) / "ckpt.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    assert "not a readable checkpoint" in error(call(train, "--init_from=resume", finished))
    torch.save({"step": 1}, path)
    assert "cannot be used: it lacks config, model, optimizer, ranks, task" in error(call(train, "--init_from=resume", finished))


def test_changed_data_is_refused_on_resume(tmp_path, call):
    text = tmp_path / "text.txt"
    options = [*SMALL, f"--dataset={text}", f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"]
    text.write_text("To be, or not to be: that is the question. " * 40)
    assert call(train, *options, "--max_iters=2")[0] == 0
    text.write_text("To be, or not to be? that is the question. " * 40)
    assert "the data is not what the run" in error(call(train, *options, "--init_from=resume", "--max_iters=4"))


def test_overwrite_replaces_the_run(finished, corpus, call):
    folder = Path(finished.removeprefix("--out_dir="))
    assert call(train, *SMALL, *corpus, finished, "--max_iters=1", "--overwrite")[0] == 0
    assert [r["step"] for r in read_metrics(folder)] == [0, 1]
    assert checkpoint.read(folder / "ckpt.pt")["config"]["overwrite"] is False


@pytest.mark.skipif(not os.environ.get("TINYSHAKESPEARE"), reason="TINYSHAKESPEARE=path/to/tinyshakespeare.txt is not set")
def test_tiny_shakespeare_is_nanogpts(tmp_path, call):
    options = [f"--dataset={os.environ['TINYSHAKESPEARE']}", f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}"]
    code, out, _ = call(train, *options, "--max_iters=2", "--eval_iters=1", "--device=cpu")
    assert code == 0 and "1,003,854 training and 111,540 validation tokens, vocabulary 65" in out


def test_a_run_of_an_older_version_goes_on(tmp_path, call, monkeypatch):
    """tests/old_run holds step 8 of a run of version 0.1, and the metrics of its whole 24 steps.

    The version before this house resumed it bit for bit. Another processor may round otherwise.
    """
    line = ("Préconditioned attention {} divides each row of {} by its length;\n"
            "nothing else {} changes.\n")
    text = "".join(line.format(i * i % 97, chr(97 + i % 26), i % 13) for i in range(75))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "tests" / "old_run", tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(train, "--init_from=resume", "--out_dir=old")
    assert code == 0, err
    for new, old in zip(read_metrics("old"), read_metrics(ROOT / "tests" / "old_run"), strict=True):
        assert new.keys() == old.keys() and new["step"] == old["step"]
        for name in {"train_loss", "val_loss", "grad_norm", "learning_rate"} & new.keys():
            assert new[name] == pytest.approx(old[name], rel=1e-4), (new["step"], name)
