"""Whole runs of train.py in this process: what they record, resuming, presets, users' mistakes.

Runs in processes of their own are in test_processes.py.
"""
import json
import math
import os
import shlex
import shutil
import signal

import pytest
import torch

import compare
import train
from conftest import ROOT, SMALL, error, read_metrics
from engine import checkpoint, meter, trainer

PRESETS = [path.name for path in sorted((ROOT / "config").glob("*.toml"))
           if not path.name.startswith(("lra_", "vision_"))]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def begin(corpus, folder, call):
    """begin(*options) trains a small model in `folder` or the last --out_dir -> what it printed."""
    def run(*arguments):
        code, out, err = call(train, *SMALL, *corpus, f"--out_dir={folder}", *arguments)
        assert code == 0, err
        return out
    return run


@pytest.fixture
def again(folder, call):
    """again(*options) is call(train, ...) with the run in `folder`."""
    return lambda *arguments: call(train, f"--out_dir={folder}", *arguments)


def all_records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_saves_and_exits(number, code, corpus, tmp_path, call,
                                                  monkeypatch):
    run = [*SMALL, *corpus, "--max_iters=30", "--eval_interval=8", "--log_interval=3",
           "--dropout=0.1", "--gradient_accumulation_steps=2", "--precond=True"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call(train, *run, f"--out_dir={whole}")[0] == 0
    step = trainer.Trainer.train_step

    def interrupted(self):
        if self.step == 15:
            os.kill(os.getpid(), number)
        step(self)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", interrupted)
        got, out, _ = call(train, *run, f"--out_dir={stopped}")
    assert got == code and "Go on with --init_from=resume" in out
    assert checkpoint.read(stopped / "ckpt.pt")["step"] == 16
    assert call(train, "--init_from=auto", f"--out_dir={stopped}")[0] == 0
    assert read_metrics(stopped) == read_metrics(whole)


@pytest.mark.slow
def test_the_recommended_comparison_is_of_the_same_run(begin, corpus):
    out = begin("--max_iters=1", "--learning_rate=0.0123", "--precond=True")
    line = next(line for line in out.splitlines() if "compare.py" in line)
    comparison = compare.read(shlex.split(line)[2:])
    off, on = (comparison.parse(arm.words)[0] for arm in comparison.arms)
    assert (off.precond, on.precond) == (False, True)
    assert off.learning_rate == 0.0123 and f"--dataset={off.dataset}" in corpus


def test_a_run_learns_and_records(begin, again, folder):
    out = begin("--max_iters=150", "--learning_rate=1e-2", "--init_from=auto")
    assert "python sample.py" in out
    records = all_records(folder)
    first, last = records[0], records[-1]
    assert first["step"] == 0 and last["step"] == 150
    assert last["val_loss"] < 0.6 * first["val_loss"]
    assert set(last) == {
        "step", "train_loss", "val_loss", "val_bpb", "learning_rate", "grad_norm", "tokens",
        "tokens_per_s", "ms_per_step", "elapsed_s", "peak_memory_mb", "mfu", "kappa_before",
        "kappa_after", "kappa_before_infinite", "kappa_after_infinite"}
    assert last["tokens"] == 150 * 4 * 16
    assert len(last["kappa_before"]) == len(last["kappa_after"]) == 2
    best = checkpoint.read(folder / "best.pt")["best"]
    assert best["value"] == min(r["val_loss"] for r in records if "val_loss" in r)
    # a shorter look at the same checkpoint
    code, out, _ = again("--eval_only")
    assert code == 0 and f"step {best['step']}: val_loss {best['value']:.4f}" in out


def test_what_a_run_is_cannot_change_on_resume(begin, again, folder, tmp_path):
    preset = tmp_path / "deeper.toml"
    preset.write_text("n_layer = 3\nmax_iters = 50\n")
    begin("--max_iters=2")
    more = ["--init_from=resume", "--max_iters=4"]
    for change, words in [
            ([preset], "n_layer=3, which the preset sets, cannot change on resume: the run has "
                       "n_layer=2"),
            (["--precond=True"], "--precond=True cannot change on resume: the run has "
                                 "precond=False"),
            (["--batch_size=1", "--gradient_accumulation_steps=4", "--eval_iters=9"],
             "batch_size x eval_iters = 9 cannot change on resume: the run has 8")]:
        assert words in error(again(*more, *change))
    code, out, _ = again(folder / "config.toml", *more)
    assert code == 0 and "max_iters 2 -> 4" in out
    # an evaluation can take the preconditioner away, or put one in, but not change the model
    plain, other = again("--eval_only"), again("--eval_only", "--precond=True")
    assert plain[0] == other[0] == 0 and plain[1].splitlines()[-1] != other[1].splitlines()[-1]
    assert "cannot change on resume" in error(again("--eval_only", preset))


def test_a_context_longer_than_a_small_model_is_resumed(begin, again, folder):
    begin("--max_iters=1", "--rotary=True", "--n_layer=1", "--n_head=1", "--n_embd=2",
          "--block_size=600", "--eval_iters=1", "--batch_size=1")
    weights = checkpoint.read(folder / "ckpt.pt")["model"].values()
    assert sum(w.numel() for w in weights) < 600
    assert again("--init_from=resume", "--max_iters=2")[0] == 0


def test_smaller_batches_are_evaluated_on_the_same_tokens(begin, again, folder):
    begin("--max_iters=2")
    assert again("--init_from=resume", "--max_iters=3", "--batch_size=2", "--learning_rate=0",
                 "--gradient_accumulation_steps=2", "--min_lr=0")[0] == 0
    *_, before, after = (r["val_loss"] for r in read_metrics(folder) if "val_loss" in r)
    assert after == pytest.approx(before, rel=1e-6)


def test_a_run_is_not_lost_through_its_own_configuration(begin, folder, call):
    begin("--max_iters=1")
    begin("--max_iters=1", "--overwrite")
    assert "holds a run" in error(call(train, folder / "config.toml", "--seed=5"))


def test_evaluation_is_of_the_run_and_not_of_what_its_preset_started_from(begin, again, folder,
                                                                          tmp_path):
    preset = tmp_path / "preset.toml"
    preset.write_text('init_from = "gpt2"\n')
    assert "no checkpoint" in error(again("--eval_only", "--init_from=auto", *SMALL))
    begin("--max_iters=3")
    code, out, _ = again(preset, "--eval_only")
    assert code == 0 and f"step 3: val_loss {read_metrics(folder)[-1]['val_loss']:.4f}" in out


def test_damaged_metrics_are_named_on_resume(begin, again, folder):
    begin("--max_iters=2")
    path = folder / "metrics.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + "nonsense\n" + second)
    message = error(again("--init_from=resume", "--max_iters=4"))
    assert "metrics.jsonl is damaged after 1 lines" in message


def test_an_out_dir_that_cannot_be_written_is_found_before_the_data_is_prepared(tmp_path, call):
    (tmp_path / "file").write_text("")
    out_dir = f"--out_dir={tmp_path / 'file' / 'out'}"
    assert "cannot write to" in error(call(train, "--dataset=missing.txt", out_dir))


def test_a_baseline_with_the_preconditioner_s_options_says_so(begin):
    out = begin("--max_iters=1", "--precond_power=0.5")
    assert "precond=False (precond_power=0.5 has no effect on training)\n" in out


def test_kappa_is_measured_in_full_float32(begin, monkeypatch):
    seen = {"probe": set(), "loss": set()}

    def watch(name):
        original = getattr(train.LanguageModelling, name)

        def watched(*args):
            seen[name].add((torch.get_float32_matmul_precision(),
                            torch.backends.cudnn.allow_tf32))
            return original(*args)
        monkeypatch.setattr(train.LanguageModelling, name, watched)
    watch("probe")
    watch("loss")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as on a GPU
    try:
        begin("--max_iters=2")
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"probe": {("highest", False)}, "loss": {("high", True)}}


@pytest.mark.slow
def test_a_compiled_model_is_the_one_that_trains(begin, folder, tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend
    counter = CompileCounterWithBackend("eager")
    compiler = torch.compile
    monkeypatch.setattr(trainer, "check_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend=counter))
    begin("--max_iters=3", "--compile=True")
    begin("--max_iters=3", f"--out_dir={tmp_path / 'plain'}")
    assert counter.frame_count > 0
    compiled, plain = read_metrics(folder)[-1], read_metrics(tmp_path / "plain")[-1]
    assert compiled["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-5)
    names = checkpoint.read(folder / "ckpt.pt")["model"].keys()
    assert names == checkpoint.read(tmp_path / "plain/ckpt.pt")["model"].keys()


def test_evaluation_is_not_training_time(begin, folder, monkeypatch):
    now = 0.0
    evaluate = train.LanguageModelling.evaluate

    def clock():
        nonlocal now
        now += 0.001
        return now

    def slow(*args):
        nonlocal now
        now += 1000
        return evaluate(*args)
    monkeypatch.setattr(meter.time, "perf_counter", clock)
    monkeypatch.setattr(train.LanguageModelling, "evaluate", slow)
    begin("--max_iters=8", "--eval_interval=2", "--log_interval=3")
    records = all_records(folder)
    assert all(0 < r["ms_per_step"] < 1000 for r in records[1:])
    assert 0 < records[-1]["elapsed_s"] < 1


def test_accumulation_does_not_change_the_data(begin, tmp_path):
    last = []
    for batch_size, parts in ((4, 1), (2, 2)):
        out_dir = tmp_path / str(parts)
        begin(f"--batch_size={batch_size}", f"--gradient_accumulation_steps={parts}",
              "--eval_iters=100", "--max_iters=10", f"--out_dir={out_dir}")
        last.append(read_metrics(out_dir)[-1])
    for name in ("train_loss", "val_loss"):
        assert last[0][name] == pytest.approx(last[1][name], rel=1e-5)


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(corpus, again, folder,
                                                                monkeypatch):
    loss = train.LanguageModelling.loss
    calls = []

    def poisoned(self, model, x, y):
        calls.append(1)
        return (loss(self, model, x, y)[0] * (math.nan if len(calls) == 14 else 1),)
    monkeypatch.setattr(train.LanguageModelling, "loss", poisoned)
    result = again(*SMALL, *corpus, "--max_iters=30", "--eval_interval=10", "--log_interval=20")
    assert "the loss is not finite at step 13" in error(result)
    saved = checkpoint.read(folder / "ckpt.pt")
    assert saved["step"] == 10 and all(p.isfinite().all() for p in saved["model"].values())


def test_a_diverged_run_names_the_step_that_is_kept(begin, again, folder, monkeypatch):
    """Of a run that was stopped at step 5 and evaluated at 0."""
    begin("--max_iters=5")
    saved = checkpoint.read(folder / "ckpt.pt")
    checkpoint.save(folder / "ckpt.pt", saved | {"evaluated": 0})
    monkeypatch.setattr(train.LanguageModelling, "loss",
                        lambda self, model, x, y: (math.nan * model(x, y)[1],))
    message = error(again("--init_from=resume", "--max_iters=9"))
    assert f"not finite at step 5; {folder / 'ckpt.pt'} holds step 5." in message


def test_full_disk_keeps_the_checkpoint(begin, again, folder, monkeypatch):
    begin("--max_iters=5")
    more = ["--init_from=resume", "--max_iters=9"]

    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        message = error(again(*more))
    assert "No space left on device; the previous" in message
    assert checkpoint.read(folder / "ckpt.pt")["step"] == 5
    assert again(*more)[0] == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_starts(preset, corpus, folder, call):
    code, _, err = call(train, f"config/{preset}", *SMALL, *corpus, "--init_from=scratch",
                        "--tokenizer=bytes", "--max_iters=2", "--gradient_accumulation_steps=1",
                        "--compile=False", "--shard=False", f"--out_dir={folder}")
    assert code == 0, err
    assert read_metrics(folder)[-1]["step"] == 2
    # the saved configuration can be given back
    assert call(train, folder / "config.toml", "--overwrite")[0] == 0


def test_defaults_are_the_cpu_preset():
    config, _ = train.options.parse(train.Config, ["config/shakespeare_char.toml"], "")
    assert config == train.Config()


@pytest.mark.parametrize("arguments, words", [
    (["--precondition"], "unknown option --precondition: did you mean --precond?"),
    (["--n_head=3"], "n_head=3 does not divide n_embd=32"),
    (["--attention=nystrom"],
     "attention=nystrom is not causal: its landmarks average over future tokens"),
    (["--dataset=nothere.txt"], "nothere.txt"),
    (["--block_size=2000"], "block_size"),
    (["--init_from=resume"], "no checkpoint"),
    (["--init_from=nothere"], "nothere is neither a folder nor one of gpt2"),
    (["--init_from=resum"], "did you mean resume?"),
    (["--dataset=shakespear"], "did you mean shakespeare?"),
    (["--device=cuda:77"], "--device=cuda:77 asked for, but"),
    (["--dtype=float16"], "float16 is for GPUs"),
])
def test_mistakes(arguments, words, corpus, folder, again):
    assert words in error(again(*SMALL, *corpus, *arguments))
    assert not folder.exists()


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"ab\xff\xfe" * 1000, "not UTF-8"), (b"To be or not", "block")])
def test_unusable_text(content, words, tmp_path, again):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    assert words in error(again(*SMALL, f"--dataset={text}", f"--data_dir={tmp_path}"))


@pytest.mark.parametrize("arguments, words", [
    ([], "holds a run: continue it with --init_from=resume"),
    (["--init_from=resume", "--n_layer=3"],
     "--n_layer=3 cannot change on resume: the run has n_layer=2"),
    (["--init_from=resume", "--batch_size=5"], "= 5 cannot change on resume: the run has 4"),
])
def test_mistakes_with_an_existing_run(arguments, words, begin, again):
    begin("--max_iters=2")
    assert words in error(again(*arguments))


def test_damaged_checkpoints(begin, again, folder):
    begin("--max_iters=2")
    path = folder / "ckpt.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    assert "not a readable checkpoint" in error(again("--init_from=resume"))
    torch.save({"step": 1}, path)
    message = error(again("--init_from=resume"))
    assert "cannot be used: it lacks config, model, optimizer, ranks, task" in message


def test_changed_data_is_refused_on_resume(tmp_path, again):
    text = tmp_path / "text.txt"
    options = [*SMALL, f"--dataset={text}", f"--data_dir={tmp_path / 'data'}"]
    text.write_text("To be, or not to be: that is the question. " * 40)
    assert again(*options, "--max_iters=2")[0] == 0
    text.write_text("To be, or not to be? that is the question. " * 40)
    message = error(again(*options, "--init_from=resume", "--max_iters=4"))
    assert "the data is not what the run" in message


def test_data_that_was_moved_is_found_by_its_new_name(tmp_path, again):
    text, moved, other = (tmp_path / name for name in ("text.txt", "moved.txt", "other.txt"))
    text.write_text("To be, or not to be: that is the question. " * 40)
    assert again(*SMALL, f"--dataset={text}", f"--data_dir={tmp_path / 'data'}",
                 "--max_iters=2")[0] == 0
    text.rename(moved)
    other.write_text("To be, or not to be? that is the question. " * 40)
    assert "is not a file" in error(again("--init_from=resume", "--max_iters=4"))
    message = error(again("--init_from=resume", "--max_iters=4", f"--dataset={other}"))
    assert "the data is not what the run was trained on" in message
    code, out, _ = again("--init_from=resume", "--max_iters=4", f"--dataset={moved}")
    assert code == 0 and f"its data: dataset={moved}" in out and "step 4" in out
    assert again("--init_from=resume", "--max_iters=6")[0] == 0


def test_overwrite_replaces_the_run(begin, folder):
    begin("--max_iters=2")
    begin("--max_iters=1", "--overwrite")
    assert [r["step"] for r in read_metrics(folder)] == [0, 1]
    assert checkpoint.read(folder / "ckpt.pt")["config"]["overwrite"] is False


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("TINYSHAKESPEARE"),
                    reason="TINYSHAKESPEARE=path/to/tinyshakespeare.txt is not set")
def test_tiny_shakespeare_is_nanogpts(tmp_path, again):
    code, out, _ = again(f"--dataset={os.environ['TINYSHAKESPEARE']}", f"--data_dir={tmp_path}",
                         "--max_iters=2", "--eval_iters=1", "--device=cpu")
    assert code == 0
    assert "1,003,854 training and 111,540 validation tokens, vocabulary 65" in out


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
        names = {"train_loss", "val_loss", "val_bpb", "grad_norm", "learning_rate"}
        for name in names & new.keys():
            assert new[name] == pytest.approx(old[name], rel=1e-4), (new["step"], name)
