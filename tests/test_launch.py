"""compare.py: runs are kept, go on where they were stopped, and never mix."""
import errno
import fcntl
import json
import os
import signal
import subprocess
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy", reason="pip install -r requirements-extra.txt")

import compare
from conftest import ROOT, SMALL, error, read_metrics
from fake_runs import folders
from study import fingerprint, launch

TINY = [*SMALL, "--max_iters=6", "--eval_interval=2", "--log_interval=1", "--warmup_iters=2"]


@pytest.mark.slow
def test_pairs_are_exact_and_stopping_changes_nothing(corpus, tmp_path, call, monkeypatch):
    off = ["--arm", "off: precond=False"]
    on = ["--arm", "on: precond=True"]
    again = ["--arm", "again: log_interval=2"]
    common = ["train.py", *TINY, *corpus, "--seeds=2"]
    monkeypatch.setattr(launch, "POLL", 0.05)
    code, out, _ = call(compare, *common, *off, *on, f"--out_dir={tmp_path / 'whole'}")
    whole = json.loads((tmp_path / "whole/compare.json").read_text())
    assert code == 0 and 0 not in whole["arms"]["on"]["differences"]
    assert "tokens/s" in out and (tmp_path / "whole/compare.md").read_text() in out

    sleep, stopped = launch.time.sleep, []

    def interrupting(seconds):  # when a run has begun
        if not stopped and list((tmp_path / "parts").glob("runs/*/ckpt.pt")):
            stopped.append(os.kill(os.getpid(), signal.SIGTERM))
        sleep(seconds)
    with monkeypatch.context() as patch:
        patch.setattr(launch.time, "sleep", interrupting)
        code, _, err = call(compare, *common, *off, *again, "--jobs=2",
                            f"--out_dir={tmp_path / 'parts'}")
    assert code == 143 and "Type the same command again" in err
    assert not (tmp_path / "parts/compare.json").exists()
    code, out, _ = call(compare, *common, *off, *again, f"--out_dir={tmp_path / 'parts'}")
    parts = json.loads((tmp_path / "parts/compare.json").read_text())
    same = parts["arms"]["again"]
    assert code == 0 and "again has exactly the val_loss of off on all 2 seeds" in out
    assert same["differences"] == [0, 0]
    assert (same["paired"]["low"], same["paired"]["high"], same["paired"]["p"]) == (0, 0, 1)
    assert parts["arms"]["off"]["final"] == whole["arms"]["off"]["final"]
    assert not parts["serial"] and "| tokens/s" not in out and "--jobs=1" in out
    for a, b in zip(folders(tmp_path / "parts")[2:], folders(tmp_path / "whole")[:2], strict=True):
        assert a.name == b.name and a.name.startswith("off-") and read_metrics(a) == read_metrics(b)


@pytest.mark.slow
def test_finished_runs_are_kept_and_others_never_mixed(study, tmp_path, monkeypatch):
    arguments = ["--vary", "precond_power=0,1", "--seeds=2", "--dataset",
                 str(tmp_path / "text.txt")]
    (tmp_path / "text.txt").write_text("a text")
    start, started = launch.Comparison.start, []

    def counting(self, job):
        started.append(job.folder.name)
        start(self, job)
    monkeypatch.setattr(launch.Comparison, "start", counting)
    first = study(*arguments)[1]
    assert len(started) == 4
    assert study(*arguments)[1] == first and len(started) == 4
    study(*arguments, "--seeds=3", "--jobs=2", "--device=cpu", "--tensorboard")
    assert len(started) == 6  # the third seed of each arm: the others are the same runs
    study(*arguments, "--learning_rate=2e-3")
    study(*arguments, "--threads=2")
    monkeypatch.setattr(launch.torch, "__version__", "0")
    study(*arguments)
    monkeypatch.setattr(launch, "code_hash", lambda script: "another code")
    study(*arguments)
    (tmp_path / "text.txt").write_text("another text")
    fingerprint.content.cache_clear()
    study(*arguments)
    assert len(started) == len(set(started)) == 6 + 5 * 4


def test_the_code_that_a_run_imports(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/__init__.py").touch()
    sources = {"script.py": '"""Doc."""\nimport os, near\nfrom data import far\n',
               "near.py": "x = 1\n",
               "data/far.py": "def f():\n    import last\n", "last.py": "y = 1\n",
               "unused.py": "z = 1\n"}
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    before = fingerprint.code_hash(tmp_path / "script.py")
    (tmp_path / "unused.py").write_text("z = 2\n")
    (tmp_path / "near.py").write_text('"""New documentation."""\nx = 1  # a comment\n')
    assert fingerprint.code_hash(tmp_path / "script.py") == before
    for name in ("near.py", "data/far.py", "last.py", "script.py"):
        (tmp_path / name).write_text(sources[name] + "new = 1\n")
        assert fingerprint.code_hash(tmp_path / "script.py") != before
        before = fingerprint.code_hash(tmp_path / "script.py")


def test_the_hash_sees_what_preconditions_the_vision_models():
    """precond's own names of its drop-ins are found when asked for: no reader of code sees that."""
    finder = ModuleFinder([str(ROOT)])
    finder.run_script(str(ROOT / "train_vision.py"))
    assert "precond_dropin.hugging_face" in finder.modules


def test_code_that_changes_meanwhile_stops_the_comparison(study, monkeypatch):
    hashes = iter(["one", "one", "one", "two"])
    monkeypatch.setattr(launch, "code_hash", lambda script: next(hashes))
    assert "was changed meanwhile" in error(study("--vary", "precond_power=0,1", "--seeds=2")[0])


@pytest.mark.slow
def test_a_failed_run_stops_everything(study, tmp_path):
    said = error(study("--vary", "precond_power=0,7", "--seeds=2")[0])
    assert said.endswith("ended with exit code 1: no space left") and "precond_power=7-1" in said
    assert len(folders(tmp_path / "out")) == 2 and not (tmp_path / "out/compare.json").exists()


@pytest.mark.parametrize("seen, options, expected", [
    (None, [], ["0", "1"]),
    ("3,5,6", ["--device=cuda"], ["3", "5"]),
    ("3,5", ["--device=cuda:1"], ["3,5", "3,5"]),
])
def test_jobs_share_the_gpus(seen, options, expected, study, monkeypatch):
    started = subprocess.Popen
    given = []

    def starting(*words, env, **more):
        given.append(env.get("CUDA_VISIBLE_DEVICES"))
        return started(*words, env=env, **more)
    monkeypatch.setattr(subprocess, "Popen", starting)
    monkeypatch.setattr(launch, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    study("--vary", "precond_power=0,1", "--seeds=1", "--jobs=2", "--dtype=float32", *options)
    assert given == expected


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_runs_save(number, code, study, tmp_path, monkeypatch):
    sleep, begun = launch.time.sleep, []

    def interrupt(seconds):
        if not begun and any((f / "metrics.jsonl").exists() for f in folders(tmp_path / "out")
                             if "=9" in f.name):
            begun.append(os.kill(os.getpid(), number))
        sleep(seconds)
    monkeypatch.setattr(launch.time, "sleep", interrupt)
    result = study("--vary", "precond_power=0,9", "--seeds=2")[0]
    assert result[0] == code and signal.getsignal(number) != launch.Comparison.stop
    assert sum((f / "record.json").exists() for f in folders(tmp_path / "out")) == 1
    assert (folders(tmp_path / "out")[-1] / "saved").exists()
    (code, out, _), _ = study("--vary", "precond_power=0,9", "--seeds=2")
    assert code == 0
    assert "--init_from=auto" in (folders(tmp_path / "out")[2] / "started.txt").read_text()


@pytest.mark.slow
def test_a_full_disk(study, tmp_path, monkeypatch):
    write_text = Path.write_text

    def full(self, *arguments, **options):
        if self.name in names:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(self, *arguments, **options)
    monkeypatch.setattr(Path, "write_text", full)
    for names in ["record.tmp"], ["compare.md"]:  # noqa: B007  (`full` reads it)
        said = error(study("--vary", "precond_power=0,1", "--seeds=2")[0])
        assert f"cannot write to {tmp_path / 'out'}: No space left on device. Type the same" in said
    names = []
    assert study("--vary", "precond_power=0,1", "--seeds=2")[0][0] == 0


def test_a_reader_that_leaves_is_no_full_disk(monkeypatch):
    def broken(self):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr(compare.Comparison, "execute", broken)
    monkeypatch.setattr(compare.sys, "argv", ["compare.py", "train.py", "--vary",
                                              "precond=False,True", "--seeds=2"])
    with pytest.raises(BrokenPipeError):  # which options.run knows
        compare.main()


@pytest.mark.slow
@pytest.mark.parametrize("name, content, said", [
    ("metrics.jsonl", None, "holds no finished run"),
    ("metrics.jsonl", "", "is no evaluation of this version"),
    ("metrics.jsonl", '{"step": 6, "elapsed_s": 3, "val_loss": 2}\n',
     "is no evaluation of this version"),
    ("metrics.jsonl", '{"step": 6, "val_loss": 2}\n', "line 1 is damaged or of another version"),
    ("record.json", "[]", "holds no finished run"),
    ("record.json", "{}", "holds no finished run"),
    ("test.json", "{}", "holds no finished run")])
def test_files_of_a_finished_run_that_are_gone_or_others(name, content, said, study, tmp_path):
    study("--vary", "precond_power=0,1", "--seeds=2")
    path = folders(tmp_path / "out")[0] / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    said = said.replace("holds", f"{path.parent} holds")
    assert said in error(study("--vary", "precond_power=0,1", "--seeds=2")[0])


def test_one_comparison_at_a_time_in_a_folder(study, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by" in error(study("--vary", "precond=False,True")[0])


def test_a_folder_that_cannot_be_written(call, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert "cannot write to" in error(call(compare, "train.py", "--vary", "precond=False,True",
                                           f"--out_dir={tmp_path / 'out'}"))


def test_a_run_left_behind_keeps_its_folder(fake, tmp_path, monkeypatch):
    comparison = compare.read(["train.py", "--precond=True", "--vary", "precond_power=9,0",
                               "--seeds=2", f"--out_dir={tmp_path / 'out'}"])
    run = comparison.job(comparison.arms[0], 1, {})
    comparison.folder.mkdir()
    with open(comparison.folder / "lock", "w") as comparison.lock:
        fcntl.flock(comparison.lock, fcntl.LOCK_EX)
        comparison.start(run)
    # what started the run is gone, the run is not
    with open(comparison.folder / "lock", "w") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        run.process.kill()
        run.process.wait()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_pretrained_weights_are_read_once(tmp_path):
    starts = [compare.read(["train.py", "--vary", "precond=False,True", f"--init_from={name}",
                            f"--out_dir={tmp_path}"])
              for name in ("gpt2", "scratch", "auto")]
    gpt2, scratch, auto = [comparison.job(comparison.arms[0], 1, {}) for comparison in starts]
    assert scratch.folder == auto.folder != gpt2.folder
    assert starts[0].command(gpt2)[-1] == "--init_from=gpt2"
    assert starts[1].command(scratch)[-1] == "--init_from=auto"
    gpt2.folder.mkdir(parents=True)
    (gpt2.folder / "ckpt.pt").touch()
    assert starts[0].command(gpt2)[-1] == "--init_from=auto"
