"""train_lra.py, whole runs on tiny data: accuracy, resuming, processes, --show."""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import train_lra
from conftest import error, killer, read_metrics, shell, torchrun
from data import listops, lra
from engine import checkpoint, options, trainer
from engine.device import Compute
from precond import condition_number, record
from test_data_listops import value_of

MODEL = "--n_embd=16 --n_inner=24 --n_layer=2 --n_head=2 --landmarks=5 --device=cpu".split()
TREES = ("--n_train=150 --n_val=41 --n_test=43 --min_length=3 --max_length=20 --max_depth=4 "
         "--max_args=3 --block_size=20").split()
RUN = [*MODEL, *TREES, "--batch_size=8", "--max_iters=24", "--eval_interval=8", "--log_interval=3",
       "--learning_rate=1e-2", "--warmup_iters=5"]
CPU = Compute("cpu", "float32", 16)


@pytest.fixture(scope="session")
def finished(prepared, tmp_path_factory):
    """A run of ListOps: its folder, its standard output."""
    folder = tmp_path_factory.mktemp("finished")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", ["train_lra.py", *RUN, prepared, f"--out_dir={folder}"])
        train_lra.main()
    return folder, out.getvalue()


@pytest.fixture
def trained(finished, tmp_path):
    """The same in a folder that a test may change."""
    return shutil.copytree(finished[0], tmp_path / "run"), finished[1]


def reopen(folder: Path, name: str = "best.pt"):
    """(task, model in evaluation mode, checkpoint) of a run."""
    saved = checkpoint.read(folder / name)
    task, model = train_lra.open(train_lra.Config(**saved["config"]), CPU)
    model.load_state_dict(saved["model"])
    return task, model.eval(), saved


def of(*arguments):
    """The configuration that a command line says."""
    return options.parse(train_lra.Config, list(arguments), "")[0]


def rows_alone(split) -> list[tuple]:
    """The tokens of every sample of a split."""
    return [tuple(split.batch([i])[0][0].tolist()) for i in range(len(split))]


@torch.no_grad()
def one_by_one(model, split) -> list[int]:
    """The prediction for every sample of a split, each alone and without padding."""
    answers = []
    for i in range(len(split)):
        x, mask, _ = split.batch([i])
        answers.append(int(model(x, mask)[0].argmax()))
    return answers


def test_accuracies_and_baselines(trained):
    """Of the best checkpoint on the validation split; each sample counts once.

    Answers that read nothing stand beside it.
    """
    folder, out = trained
    task, model, saved = reopen(folder)
    val, test = (np.mean(one_by_one(model, task.splits[name]) == task.splits[name].labels)
                 for name in ("val", "test"))
    validated = {r["step"]: r["val_accuracy"] for r in read_metrics(folder) if "val_accuracy" in r}
    assert list(validated) == [0, 8, 16, 24]
    assert validated[saved["step"]] == saved["best"]["value"] == max(validated.values())
    assert saved["best"]["value"] == pytest.approx(val)
    result = json.loads((folder / "test.json").read_text())
    assert result["test_accuracy"] == pytest.approx(test) and result["test_samples"] == 43
    assert result["step"] == saved["step"]

    roots = {name: np.array([s[0] for s in rows_alone(split)])
             for name, split in task.splits.items()}
    labels = {name: split.labels for name, split in task.splits.items()}

    def most_frequent(answers):  # the smallest of several
        return max(range(10), key=Counter(answers.tolist()).__getitem__)
    of_root = {root: most_frequent(labels["train"][roots["train"] == root])
               for root in range(10, 14)}
    majority = np.mean(labels["test"] == most_frequent(labels["train"]))
    root = np.mean(labels["test"] == [of_root[r] for r in roots["test"]])
    assert result["baselines"] == pytest.approx({"majority": majority, "root": root})
    tested, _, more = out.partition("next: ")
    assert "python train_lra.py --eval_only" in more
    assert [line.strip() for line in tested.splitlines()[-3:]] == [
        f"test accuracy {test:.1%} on 43 samples (best checkpoint by validation accuracy, "
        f"step {saved['step']})",
        f"{majority:.1%} by guessing the most frequent class",
        f"{root:.1%} by guessing the most frequent class of the root operator"]


def test_metrics(trained):
    lines = (trained[0] / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert set(last) == {
        "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate",
        "grad_norm", "tokens", "tokens_per_s", "ms_per_step", "elapsed_s", "peak_memory_mb", "mfu",
        "kappa_before", "kappa_after", "kappa_before_infinite", "kappa_after_infinite"}
    assert len(last["kappa_before"]) == len(last["kappa_after"]) == 2
    assert 0 <= last["train_accuracy"] <= 1
    assert last["train_loss"] < first["val_loss"]  # it learns something


@pytest.mark.parametrize("task", ["listops", "retrieval"])
def test_kappa_is_of_real_tokens(task, prepared, released, tmp_path, call):
    data = TREES
    if task == "retrieval":
        data = ["--task=retrieval", "--block_size=40", released["retrieval"]]
    code, _, err = call(train_lra, *MODEL, *data, prepared, "--precond=True", "--max_iters=2",
                        f"--out_dir={tmp_path}")
    assert code == 0, err
    opened, model, _ = reopen(tmp_path, "ckpt.pt")
    kappas = [[], []]
    for i in range(4):
        x, mask, _ = opened.splits["val"].batch([i])
        for sequence, real in zip(x.view(-1, x.size(-1)), mask.view(-1, x.size(-1))):
            with torch.no_grad(), record() as calls:
                model.encode(sequence[real][None], torch.ones(1, int(real.sum()), dtype=torch.bool))
            for layer, (_, preconditioned) in enumerate(calls):
                kappas[layer].append(condition_number(preconditioned).flatten())
    expected = [torch.cat(layer).median().item() for layer in kappas]
    # float32 noise times kappa
    assert read_metrics(tmp_path)[-1]["kappa_after"] == pytest.approx(expected, rel=0.05)


def test_every_epoch_visits_every_sample_once_wherever_it_starts(prepared):
    """Also when a batch spans several epochs, and when a resumed run begins within one."""
    config = of(*TREES, prepared)
    folder = train_lra.prepare(config)

    def rows(task, first, count):
        x, mask, _ = task.batch(first, count)
        return [tuple(row[real].tolist()) for row, real in zip(x, mask)]
    whole = rows(train_lra.Classification(config, folder), 0, 1500)  # ten epochs of 150
    epochs = [whole[i:i + 150] for i in range(0, 1500, 150)]
    everything = set(rows_alone(lra.load(folder)[1]["train"]))
    assert len(everything) == 150 and all(set(epoch) == everything for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 10
    task = train_lra.Classification(config, folder)
    assert sum((rows(task, first, 60) for first in range(0, 1500, 60)), []) == whole
    for first in range(140, 1400, 150):  # the last ten of an epoch and the first ten of the next
        assert rows(train_lra.Classification(config, folder), first, 20) == whole[first:first + 20]


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(prepared, tmp_path, call):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [*RUN, prepared, "--attention=nystrom", "--precond=True", "--dropout=0.1",
                 "--gradient_accumulation_steps=2"]
    assert call(train_lra, *arguments, f"--out_dir={whole}")[0] == 0
    done = shell(killer(tmp_path, "train_lra", 20), *arguments, f"--out_dir={killed}", check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_metrics(killed)[-1]["step"] == 18
    assert checkpoint.read(killed / "ckpt.pt")["step"] == 16
    assert call(train_lra, "--init_from=resume", f"--out_dir={killed}")[0] == 0
    assert read_metrics(killed) == read_metrics(whole)
    assert (killed / "test.json").read_text() == (whole / "test.json").read_text()
    a, b = (checkpoint.read(folder / "ckpt.pt")["model"] for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_sigterm_finishes_the_step_saves_and_exits_without_testing(trained, prepared, tmp_path,
                                                                   call, monkeypatch):
    step = trainer.Trainer.train_step

    def interrupted(self):
        if self.step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", interrupted)
        code, out, _ = call(train_lra, *RUN, prepared, f"--out_dir={stopped}")
    assert code == 143 and "Go on with --init_from=resume" in out and "test accuracy" not in out
    assert checkpoint.read(stopped / "ckpt.pt")["step"] == 14
    code, out, _ = call(train_lra, "--init_from=auto", f"--out_dir={stopped}")
    tested = [text.partition("next: ")[0].splitlines()[-3:] for text in (out, trained[1])]
    assert code == 0 and tested[0] == tested[1]
    assert read_metrics(stopped) == read_metrics(trained[0])


@pytest.mark.slow
def test_two_processes_count_every_sample_once(trained, prepared, tmp_path, call):
    """41 validation and 43 test samples, which two processes cannot share evenly."""
    folder = tmp_path / "two"
    torchrun(2, "train_lra.py", *RUN, prepared, f"--out_dir={folder}")
    for one, two in zip(read_metrics(trained[0]), read_metrics(folder), strict=True):
        assert one["step"] == two["step"]
        for name in {"train_loss", "val_loss", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-4), (one["step"], name)
        for name in {"train_accuracy", "val_accuracy"} & one.keys():
            assert one[name] == pytest.approx(two[name], abs=1e-6), (one["step"], name)
    two = json.loads((folder / "test.json").read_text())
    # the same checkpoint in one process
    assert call(train_lra, "--eval_only", f"--out_dir={folder}")[0] == 0
    one = json.loads((folder / "test.json").read_text())
    assert one.pop("test_loss") == pytest.approx(two.pop("test_loss"), rel=1e-5) and one == two


def test_validation_on_a_part_spreads_over_the_split(prepared):
    config = of(*MODEL, *TREES, prepared, "--batch_size=5", "--eval_iters=2")
    task = train_lra.Classification(config, train_lra.prepare(config))
    seen = []

    def predict(model, compute, split, indices):
        seen.extend(indices)
        wrong = torch.arange(len(indices)) < 2
        return 0.5, torch.from_numpy(task.splits[split].labels[indices]) + wrong
    task.predict = predict
    assert task.evaluate(None, CPU) == {"val_loss": 0.5, "val_accuracy": 0.6}
    assert seen == [i * 41 // 10 for i in range(10)]


def test_a_checkpoint_from_before_an_option_is_tested_as_it_was(trained, call):
    folder, before = trained[0], (trained[0] / "test.json").read_text()
    best = checkpoint.read(folder / "best.pt")
    del best["config"]["precond_scale"]
    checkpoint.save(folder / "best.pt", best)
    (folder / "test.json").unlink()
    code, _, err = call(train_lra, "--eval_only", f"--out_dir={folder}")
    assert code == 0 and (folder / "test.json").read_text() == before, err


def test_other_data_of_the_same_sizes_is_refused(trained, call):
    path = trained[0] / "ckpt.pt"
    saved = checkpoint.read(path)
    saved["task"]["sha256"]["train_tokens.npy"] = 64 * "0"
    checkpoint.save(path, saved)
    resumed = "--init_from=resume", f"--out_dir={trained[0]}"
    assert "the data is not what the run" in error(call(train_lra, *resumed))
    del saved["task"]["sha256"]  # as checkpoints were before
    checkpoint.save(path, saved)
    assert call(train_lra, *resumed)[0] == 0


def test_an_accuracy_that_cannot_be_kept_is_still_shown(trained, call):
    (trained[0] / "test.json").unlink()
    (trained[0] / "test.json").mkdir()
    code, out, err = call(train_lra, "--eval_only", f"--out_dir={trained[0]}")
    assert code == 2 and "test accuracy" in out
    assert f"cannot write to {trained[0]}: Is a directory" in err and err.count("\n") == 1


def test_show_listops(trained, call):
    code, out, _ = call(train_lra, "--eval_only", "--show=6", f"--out_dir={trained[0]}")
    task, model, _ = reopen(trained[0])
    split = task.splits["test"]
    expected = []
    for i, prediction in enumerate(one_by_one(model, split)[:6]):
        x, _, y = split.batch([i])
        label = value_of(x[0].tolist())
        assert label == y
        wrong = "  (wrong)" * (prediction != label)
        text = listops.to_text(x[0].numpy())
        expected.append(f"predicted {prediction}, label {label}{wrong}: {text}")
    assert code == 0 and out.splitlines()[-6:] == expected
    assert out.splitlines()[-9].startswith("test accuracy")


@pytest.mark.parametrize("task", ["image", "text", "retrieval"])
def test_show_pictures_and_texts(task, prepared, released, tmp_path, call):
    if task == "image":
        image = pytest.importorskip("PIL.Image", reason="pip install -r requirements-extra.txt")
    assert call(train_lra, *MODEL, f"--task={task}", "--block_size=1024", released[task], prepared,
                f"--out_dir={tmp_path}", "--attention=linear", "--max_iters=2")[0] == 0
    code, out, _ = call(train_lra, "--eval_only", "--show=3", f"--out_dir={tmp_path}")
    assert code == 0
    split = reopen(tmp_path)[0].splits["test"]
    if task == "image":
        names = [f"test_{i}_predicted_{p}_label_{split.labels[i]}.png"
                 for i, p in enumerate(re.findall(r"predicted (\d), label", out)[:3])]
        assert [Path(line.split(":")[0]).name for line in out.splitlines()[-3:]] == names
        assert sorted(p.name for p in tmp_path.glob("*.png")) == names
        for i, name in enumerate(names):
            picture = np.asarray(image.open(tmp_path / name))
            assert picture.shape == (512, 512) and picture.dtype == np.uint8
            assert (picture[::16, ::16].ravel() == split.batch([i])[0][0].numpy()).all()
    else:
        for i in range(3):
            x, mask, y = split.batch([i])
            towers = zip(x.view(-1, x.size(-1)), mask.view(-1, x.size(-1)))
            texts = "\n  and: ".join(bytes(row[real].tolist()).decode() for row, real in towers)
            assert re.search(rf"predicted \d, label {int(y)}.*: " + re.escape(texts), out)


def test_show_pictures_without_pillow(prepared, released, tmp_path, call, monkeypatch):
    out_dir = f"--out_dir={tmp_path}"
    assert call(train_lra, *MODEL, "--task=image", "--block_size=1024", released["image"], prepared,
                out_dir, "--attention=linear", "--max_iters=0")[0] == 0
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = error(call(train_lra, "--eval_only", "--show=1", out_dir))
    assert "pip install -r requirements-extra.txt" in message


def test_longer_sequences_are_cut_and_counted(prepared, tmp_path, call):
    code, out, _ = call(train_lra, *MODEL, *TREES, "--block_size=9", prepared, "--max_iters=1",
                        f"--out_dir={tmp_path}")
    _, whole = lra.load(train_lra.prepare(of(*TREES, prepared)))
    lengths = [len(row) for split in whole.values() for row in rows_alone(split)]
    longer = sum(length > 9 for length in lengths)
    assert code == 0 and longer > 0
    assert f"150 train, 41 val, 43 test, {longer} cut at block_size=9" in out
    cut = reopen(tmp_path)[0].splits.values()
    assert max(len(row) for split in cut for row in rows_alone(split)) == 9


@pytest.mark.parametrize("arguments, words", [
    ([], "holds a run: continue it with --init_from=resume"),
    (["--init_from=resume", "--attention=linear"],
     "--attention=linear cannot change on resume: the run has attention=softmax"),
    (["--init_from=resume", "--n_train=100"],
     "--n_train=100 cannot change on resume: the run has n_train=150"),
])
def test_mistakes_with_an_existing_run(arguments, words, trained, call):
    assert words in error(call(train_lra, *arguments, f"--out_dir={trained[0]}"))
