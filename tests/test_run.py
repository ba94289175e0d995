"""A run's folder: who may use it, how it is opened, and what is believed of what lies in it."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import ROOT, SMALL, error, read_metrics, teach, torchrun
from engine import checkpoint, trainer
from engine.lock import Lock
from engine.options import UserError
from engine.run import Run, open_folder


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of four steps, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    teach(train, *SMALL, *corpus, "--max_iters=4", "--eval_interval=2", f"--out_dir={folder}")
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def resume(call, folder, *more):
    return call(train, "--init_from=resume", f"--out_dir={folder}", "--max_iters=6", *more)


def change(folder, **parts):
    """Write other parts into a checkpoint."""
    state = torch.load(folder / "ckpt.pt") | parts
    torch.save(state, folder / "ckpt.pt")


def test_a_resumed_run_keeps_its_clock_and_its_best(folder, call):
    best = {"metric": "val_loss", "value": 0.5, "step": 2}  # which the next steps do not reach
    change(folder, train_seconds=1000.0, best=best)
    kept = (folder / "best.pt").read_bytes()
    assert resume(call, folder)[0] == 0
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6 and 1000 < last["elapsed_s"] < 1100
    assert checkpoint.read(folder / "ckpt.pt")["best"] == best
    assert (folder / "best.pt").read_bytes() == kept


HOLD = """
    import sys, time, pathlib
    sys.path.insert(0, {root!r})
    from engine.lock import Lock
    lock = Lock(pathlib.Path(sys.argv[1]), "out")
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_and_released_by_a_kill(tmp_path):
    code = textwrap.dedent(HOLD).format(root=str(ROOT))
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"],
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"out is in use by process {holder.pid} on "):
        Lock(tmp_path / "lock", "out")
    holder.kill()
    holder.wait()
    Lock(tmp_path / "lock", "out").release()


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--init_from=resume", "--max_iters=6"], ["--overwrite"]])
def test_a_second_run_in_one_folder_is_refused(more, folder, corpus, call):
    lock = Lock(folder / "lock", "first")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    given = [*SMALL, *corpus] if "--overwrite" in more else []
    message = error(call(train, *given, f"--out_dir={folder}", *more))
    assert f"is in use by process {os.getpid()} on " in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    lock.release()
    assert call(train, *given, f"--out_dir={folder}", *more)[0] == 0


def test_a_lock_that_cannot_be_opened_is_one_line(corpus, tmp_path, call):
    (tmp_path / "lock").mkdir()
    message = error(call(train, *SMALL, *corpus, "--max_iters=1", f"--out_dir={tmp_path}"))
    assert f"cannot write to {tmp_path}: Is a directory" in message


def test_a_run_holds_its_folder_while_it_trains(corpus, tmp_path, call, monkeypatch):
    step = trainer.Trainer.train_step

    def trying(self):
        with pytest.raises(UserError, match="is in use by process"):
            Lock(tmp_path / "lock", "out")
        step(self)
    monkeypatch.setattr(trainer.Trainer, "train_step", trying)
    assert call(train, *SMALL, *corpus, "--max_iters=1", f"--out_dir={tmp_path}")[0] == 0
    Lock(tmp_path / "lock", "out").release()


@pytest.mark.parametrize("option", ["--out_dir=", "--out_dir= ", "--data_dir=", "--dataset="])
def test_an_empty_name_is_refused(option, corpus, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is empty" in error(call(train, *SMALL, *corpus, option))
    assert list(tmp_path.iterdir()) == []


def test_resume_and_overwrite_contradict_each_other(folder, call):
    assert "choose one" in error(resume(call, folder, "--overwrite"))
    message = error(call(train, "--init_from=auto", "--overwrite", f"--out_dir={folder}"))
    assert "--init_from=auto goes on" in message


@pytest.mark.parametrize("start", ["scratch", "auto"])
def test_a_best_checkpoint_alone_is_not_lost(start, folder, corpus, call):
    (folder / "ckpt.pt").unlink()
    before = (folder / "best.pt").read_bytes()
    run = [*SMALL, *corpus, f"--out_dir={folder}", "--max_iters=1"]
    message = error(call(train, *run, f"--init_from={start}"))
    assert "holds the best.pt of a run: choose another folder" in message
    assert (folder / "best.pt").read_bytes() == before
    assert call(train, *run, "--overwrite")[0] == 0


def test_a_run_that_ended_between_its_checkpoints(corpus, tmp_path, call, monkeypatch):
    run = [*SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=2", "--eval_interval=2"]

    def killed(self):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_best", killed)
        assert call(train, *run)[0] == 130
    assert (tmp_path / "ckpt.pt").exists() and not (tmp_path / "best.pt").exists()
    assert call(train, *run, "--init_from=auto", "--max_iters=0")[0] == 0
    latest, best = (checkpoint.read(tmp_path / name) for name in ("ckpt.pt", "best.pt"))
    assert best["step"] == latest["best"]["step"] == 0
    assert all(torch.equal(best["model"][name], w) for name, w in latest["model"].items())


def test_lost_metrics_are_mentioned(folder, call):
    (folder / "metrics.jsonl").unlink()
    code, out, _ = resume(call, folder)
    assert code == 0 and "metrics.jsonl is gone: it begins anew at step 4" in out
    assert [r["step"] for r in read_metrics(folder)] == [6]


def test_a_checkpoint_in_place_of_the_folder(folder, call):
    message = error(call(train, "--init_from=resume", f"--out_dir={folder / 'best.pt'}"))
    assert f"is a file: --out_dir is the folder of a run, here {folder}" in message


def test_a_truncated_checkpoint_names_the_best_one(folder, call):
    whole = (folder / "ckpt.pt").read_bytes()
    for size in (len(whole) // 2, 10):
        (folder / "ckpt.pt").write_bytes(whole[:size])
        message = error(resume(call, folder))
        assert f"{folder / 'best.pt'} holds the best model: --eval_only and sampling" in message
    assert "step " in call(train, "--eval_only", f"--out_dir={folder}")[1]


@pytest.mark.parametrize("parts, words", [
    (dict(ranks=5), "its ranks is a int"),
    (dict(model=7), "its model is a int"),
    (dict(config=[1]), "its config is a list"),
    (dict(step="x"), "its step is a str"),
    (dict(optimizer=None), "its optimizer is a NoneType"),
    (dict(dtype=3), "its dtype is a int"),
    (dict(ranks=[1, 2]), "its ranks have no state"),
    (dict(ranks=[]), "its ranks have no state"),
    (dict(ranks=[{}]), "cannot be used: KeyError"),
    (dict(dtype="bfloat17"), "dtype=bfloat17 is unknown"),
])
def test_parts_of_a_wrong_kind(parts, words, folder, call):
    change(folder, **parts)
    assert words in error(resume(call, folder))


@pytest.mark.parametrize("option, value", [("n_layer", 10**9), ("n_embd", 2**40),
                                           ("block_size", 10**12), ("n_layer", "many")])
def test_sizes_that_the_weights_cannot_have(option, value, folder, call):
    config = torch.load(folder / "ckpt.pt")["config"]
    change(folder, config=config | {option: value})
    assert option in error(resume(call, folder))


def test_a_compressed_checkpoint_is_not_inflated(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("reads what is packed"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loads what is packed"))
    with pytest.raises(UserError, match="it is compressed"):
        checkpoint.read(path)


def test_a_checkpoint_does_not_decide_what_is_sent_elsewhere(folder, call, monkeypatch):
    config = torch.load(folder / "ckpt.pt")["config"]
    change(folder, config=config | {"wandb_log": True})
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    code, out, _ = resume(call, folder)
    assert code == 0 and f"its data: dataset={config['dataset']}" in out


def test_a_checkpoint_does_not_get_another_file_prepared(folder, tmp_path, call):
    secret = tmp_path / "secret.txt"
    secret.write_text("the password is swordfish, and not what was trained on\n" * 200)
    there = tmp_path / "there"
    config = torch.load(folder / "ckpt.pt")["config"]
    change(folder, config=config | {"dataset": str(secret), "data_dir": str(there)})
    assert "is not what the run" in error(resume(call, folder))
    kept = [path for path in there.rglob("*") if path.is_file()]
    assert not any(path.stat().st_size for path in kept)  # an empty lock at most


class Wandb:
    """Weights & Biases, as far as a run uses it."""

    def __init__(self):
        self.calls = []

    def init(self, **settings):
        self.calls.append(settings)
        ended = self.calls
        return SimpleNamespace(id="abc123", log=lambda *_, **__: None,
                               finish=lambda exit_code: ended.append(exit_code))


def test_wandb_goes_on_with_its_run_and_knows_how_it_ended(corpus, tmp_path, call, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = [*SMALL, *corpus, f"--out_dir={tmp_path}", "--max_iters=2", "--wandb_log=True"]
    assert call(train, *run)[0] == 0
    assert resume(call, tmp_path, "--wandb_log=True")[0] == 0
    monkeypatch.setattr(train.LanguageModelling, "loss",
                        lambda self, model, x, y: (model(x, y)[1] * torch.nan,))
    assert "not finite" in error(call(train, *run, "--overwrite"))
    first, ended, second, _, _, failed = wandb.calls
    assert "id" not in first and ended == 0 and failed == 1
    assert second["id"] == "abc123" and second["resume"] == "allow"


KILLED = """
    import os, sys
    sys.path.insert(0, {root!r})
    import train
    from engine import options, trainer
    step = trainer.Trainer.train_step
    def killed(self):
        mark = f"{folder}/killed at {{self.step}}"
        if self.step in (3, 5, 7) and self.compute.rank == 1 and not os.path.exists(mark):
            open(mark, "w").close()
            os.kill(os.getpid(), 9)
        step(self)
    trainer.Trainer.train_step = killed
    if __name__ == "__main__":
        options.run(train.main)
"""


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker(corpus, tmp_path):
    run = [*SMALL, *corpus, "--max_iters=8", "--eval_interval=2", "--dropout=0.1"]
    program = tmp_path / "killed.py"
    program.write_text(textwrap.dedent(KILLED).format(root=str(ROOT), folder=tmp_path))
    torchrun(2, "--max_restarts=3", program, *run, "--init_from=auto", f"--out_dir={tmp_path}/a")
    assert len(list(tmp_path.glob("killed at *"))) == 3
    torchrun(2, "train.py", *run, f"--out_dir={tmp_path}/b")
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")


def test_a_new_run_leaves_nothing_of_the_old_one(folder, corpus, call):
    (folder / "test.json").write_text(json.dumps({"test_accuracy": 1.0}))
    run = [*SMALL, *corpus, f"--out_dir={folder}", "--max_iters=1", "--overwrite"]
    assert call(train, *run)[0] == 0
    assert not (folder / "test.json").exists()
    assert [r["step"] for r in read_metrics(folder)] == [0, 1]


@pytest.mark.parametrize("found, words", [
    (["step 2", "step 2", "step 4"], "all nodes see: rank 0 finds there: step 2; rank 2: step 4"),
    (["no run", "step 2"], "rank 0 finds there: no run; rank 1: step 2"),
    (["lost", "lost"], "^lost$"),
    (["step 2", "step 2"], None),
    (["no run"], None),
])
def test_every_rank_finds_the_same_run(found, words):
    class Compute:
        def gather(self, value):
            assert value == found[-1]
            return found
    saved = {"step 2": {"step": 2}, "step 4": {"step": 4}}.get(found[-1])
    problem = UserError("lost") if found[-1] == "lost" else None
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        Run(train.Config(), {}, saved, problem).agree(Compute())


FILES = {"ckpt.pt", "best.pt", "metrics.jsonl", "config.toml", "test.json"}


@pytest.mark.parametrize("step, kept, records", [
    (-1, {"metrics.jsonl", "config.toml"}, 0),  # a new run in the place of another
    (4, FILES - {"test.json"}, 2),  # a result of the older model would be read as the new one's
])
def test_a_folder_keeps_what_is_still_true(step, kept, records, tmp_path):
    for name in FILES:
        (tmp_path / name).write_text("old")
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {s}}}\n' for s in (0, 4, 8)))
    config = train.Config(out_dir=str(tmp_path), max_iters=10, overwrite=True)
    open_folder(config, step).close()
    assert {path.name for path in tmp_path.iterdir()} == kept | {"lock"}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == records
    options = (tmp_path / "config.toml").read_text()
    assert "overwrite = false" in options and "max_iters = 10" in options


def test_a_finished_run_keeps_its_configuration(tmp_path):
    (tmp_path / "config.toml").write_text("old")
    open_folder(train.Config(out_dir=str(tmp_path), max_iters=10), 10).close()
    assert (tmp_path / "config.toml").read_text() == "old"
