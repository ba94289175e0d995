"""train_lra.py, whole runs on tiny data: accuracy, kappa, exact resume, processes, what --show shows, presets, and users' mistakes."""
import inspect
import json
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lra_archives import archive, cifar, imdb_files, retrieval_files

from engine import checkpoint
from engine import options
import train_lra
from engine import trainer
from conftest import ROOT, error, killer, read_metrics, shell, torchrun
from data import listops, lra, pathfinder
from engine.device import Compute
from model import Classifier
from precond import condition_number, record

MODEL = "--n_embd=16 --n_inner=24 --n_layer=2 --n_head=2 --landmarks=5 --device=cpu".split()
TREES = "--n_train=150 --n_val=41 --n_test=43 --min_length=3 --max_length=20 --max_depth=4 --max_args=3 --block_size=20".split()
RUN = [*MODEL, *TREES, *"--batch_size=8 --max_iters=24 --eval_interval=8 --log_interval=3 --learning_rate=1e-2 --warmup_iters=5".split()]
PRESETS = sorted(path.name for path in (ROOT / "config").glob("lra_*.toml"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """--data_dir for all runs: what one prepares the others find."""
    return f"--data_dir={tmp_path_factory.mktemp('lra')}"


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """{task: --source=archive} of the tasks that are read. Pairs of 5 to 40 letters, drawn at random."""
    folder, random = tmp_path_factory.mktemp("released"), np.random.default_rng(0)
    letters = [bytes(random.integers(97, 123, random.integers(5, 41)).tolist()) for _ in range(24)]
    pairs = [b"%d\t1\t2\t%b\t%b" % (i % 2, letters[2 * i], letters[2 * i + 1]) for i in range(12)]
    files = {"text": imdb_files(), "retrieval": retrieval_files(pairs), "image": cifar()[2]}
    return {task: f"--source={archive(folder / f'{task}.tar.gz', content)}" for task, content in files.items()}


@pytest.fixture
def trained(prepared, tmp_path, call):
    """A finished run of ListOps: (--out_dir, standard output)."""
    code, out, err = call(train_lra, *RUN, prepared, f"--out_dir={tmp_path / 'run'}")
    assert code == 0, err
    return f"--out_dir={tmp_path / 'run'}", out


def reopen(folder: Path, name: str = "best.pt"):
    """(configuration, task, model in evaluation mode, checkpoint) of a run."""
    saved = checkpoint.read(folder / name)
    config = train_lra.Config(**saved["config"])
    task = train_lra.Classification(config, train_lra.prepare(config))
    model = Classifier(config, task.meta["vocab_size"], task.meta["classes"], task.meta["towers"])
    model.load_state_dict(saved["model"])
    return config, task, model.eval(), saved


def rows_alone(split) -> list[tuple]:
    """The tokens of every sample of a split."""
    return [tuple(split.batch([i])[0][0].tolist()) for i in range(len(split))]


@torch.no_grad()
def one_by_one(model, split) -> list[int]:
    """The prediction for every sample of a split, each alone and without padding."""
    return [int(model(x, mask)[0].argmax()) for x, mask, _ in (split.batch([i]) for i in range(len(split)))]


def test_accuracies_and_baselines(trained):
    """Of the checkpoint that was best on the validation split; every sample counts once, and answers that read nothing stand beside it."""
    out_dir, out = trained
    folder = Path(out_dir.removeprefix("--out_dir="))
    _, task, model, saved = reopen(folder)
    accuracy = {name: np.mean(one_by_one(model, task.splits[name]) == task.splits[name].labels) for name in ("val", "test")}
    records = {r["step"]: r for r in read_metrics(folder)}
    validated = {step: r["val_accuracy"] for step, r in records.items() if "val_accuracy" in r}
    assert list(validated) == [0, 8, 16, 24]
    assert validated[saved["step"]] == saved["best"]["value"] == max(validated.values()) == pytest.approx(accuracy["val"])
    result = json.loads((folder / "test.json").read_text())
    assert result["test_accuracy"] == pytest.approx(accuracy["test"]) and result["test_samples"] == 43 and result["step"] == saved["step"]

    sequences = {name: rows_alone(split) for name, split in task.splits.items()}
    labels = {name: split.labels.tolist() for name, split in task.splits.items()}

    def most_frequent(answers):  # the smallest of several
        return max(range(10), key=Counter(answers).__getitem__)
    majority = most_frequent(labels["train"])
    of_root = {root: most_frequent(y for s, y in zip(sequences["train"], labels["train"]) if s[0] == root) for root in range(10, 14)}
    baselines = {"majority": np.mean([y == majority for y in labels["test"]]),
                 "root": np.mean([y == of_root[s[0]] for s, y in zip(sequences["test"], labels["test"])])}
    assert result["baselines"] == pytest.approx(baselines)
    shown = [f"test accuracy {accuracy['test']:.1%} on 43 samples (best checkpoint by validation accuracy, step {saved['step']})",
             f"{baselines['majority']:6.1%} by guessing the most frequent class",
             f"{baselines['root']:6.1%} by guessing the most frequent class of the root operator"]
    assert [line.strip() for line in out.splitlines()[-3:]] == [line.strip() for line in shown]


def test_metrics(trained):
    lines = (Path(trained[0].removeprefix("--out_dir=")) / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert set(last) == set("step train_loss train_accuracy val_loss val_accuracy learning_rate grad_norm tokens tokens_per_s ms_per_step "
                            "elapsed_s peak_memory_mb mfu kappa_before kappa_after kappa_before_infinite kappa_after_infinite".split())
    assert len(last["kappa_before"]) == len(last["kappa_after"]) == 2 and 0 <= last["train_accuracy"] <= 1
    assert last["train_loss"] < first["val_loss"]  # it learns something


@pytest.mark.parametrize("task", ["listops", "retrieval"])
def test_kappa_is_of_real_tokens(task, prepared, released, tmp_path, call):
    data = TREES if task == "listops" else ["--task=retrieval", "--block_size=40", released["retrieval"]]
    code, _, err = call(train_lra, *MODEL, *data, prepared, "--precond=True", "--max_iters=2", f"--out_dir={tmp_path}")
    assert code == 0, err
    _, opened, model, _ = reopen(tmp_path, "ckpt.pt")
    kappas = [[], []]
    for i in range(4):
        x, mask, _ = opened.splits["val"].batch([i])
        for sequence, real in zip(x.view(-1, x.size(-1)), mask.view(-1, x.size(-1))):
            with torch.no_grad(), record() as calls:
                model.encode(sequence[real][None], torch.ones(1, int(real.sum()), dtype=torch.bool))
            for layer, (_, preconditioned) in enumerate(calls):
                kappas[layer].append(condition_number(preconditioned).flatten())
    expected = [torch.cat(layer).median().item() for layer in kappas]
    assert read_metrics(tmp_path)[-1]["kappa_after"] == pytest.approx(expected, rel=0.05)  # float32 noise times kappa


def test_every_epoch_visits_every_sample_once_wherever_it_starts(prepared):
    """Also when a batch spans several epochs, and when a resumed run begins in the middle of one."""
    config, _ = options.parse(train_lra.Config, [*TREES, prepared], "")
    folder = train_lra.prepare(config)

    def rows(task, first, count):
        x, mask, _ = task.batch(first, count)
        return [tuple(row[real].tolist()) for row, real in zip(x, mask)]
    whole = rows(train_lra.Classification(config, folder), 0, 1500)  # ten epochs of 150
    epochs = [whole[i:i + 150] for i in range(0, 1500, 150)]
    everything = set(rows_alone(lra.load(folder)[1]["train"]))
    assert len(everything) == 150 and all(set(epoch) == everything for epoch in epochs) and len(set(map(tuple, epochs))) == 10
    task = train_lra.Classification(config, folder)
    assert [row for first in range(0, 1500, 60) for row in rows(task, first, 60)] == whole
    for first in range(140, 1400, 150):  # the last ten of an epoch and the first ten of the next
        assert rows(train_lra.Classification(config, folder), first, 20) == whole[first:first + 20]


def test_killed_run_resumes_bit_for_bit(prepared, tmp_path, call):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [*RUN, prepared, "--attention=nystrom", "--precond=True", "--dropout=0.1", "--gradient_accumulation_steps=2"]
    assert call(train_lra, *arguments, f"--out_dir={whole}")[0] == 0
    done = shell(killer(tmp_path, "train_lra", 20), *arguments, f"--out_dir={killed}", check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_metrics(killed)[-1]["step"] == 18 and checkpoint.read(killed / "ckpt.pt")["step"] == 16
    assert call(train_lra, "--init_from=resume", f"--out_dir={killed}")[0] == 0
    assert read_metrics(killed) == read_metrics(whole)
    assert (killed / "test.json").read_text() == (whole / "test.json").read_text()
    a, b = (checkpoint.read(folder / "ckpt.pt")["model"] for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_sigterm_finishes_the_step_saves_and_exits_without_testing(trained, prepared, tmp_path, call, monkeypatch):
    step = trainer.Trainer.train_step

    def interrupted(self):
        if self.step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", interrupted)
        code, out, _ = call(train_lra, *RUN, prepared, f"--out_dir={tmp_path / 'stopped'}")
    assert code == 143 and "Go on with --init_from=resume" in out and "test accuracy" not in out
    assert checkpoint.read(tmp_path / "stopped/ckpt.pt")["step"] == 14
    code, out, _ = call(train_lra, "--init_from=auto", f"--out_dir={tmp_path / 'stopped'}")
    assert code == 0 and out.splitlines()[-3:] == trained[1].splitlines()[-3:]
    assert read_metrics(tmp_path / "stopped") == read_metrics(tmp_path / "run")


def test_two_processes_count_every_sample_once(trained, prepared, tmp_path, call):
    """41 validation and 43 test samples, which two processes cannot share evenly."""
    torchrun(2, "train_lra.py", *RUN, prepared, f"--out_dir={tmp_path / 'two'}")
    for one, two in zip(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "two"), strict=True):
        assert one["step"] == two["step"]
        for name in {"train_loss", "val_loss", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-4), (one["step"], name)
        for name in {"train_accuracy", "val_accuracy"} & one.keys():
            assert one[name] == pytest.approx(two[name], abs=1e-6), (one["step"], name)
    two = json.loads((tmp_path / "two/test.json").read_text())
    assert call(train_lra, "--eval_only", f"--out_dir={tmp_path / 'two'}")[0] == 0  # the same checkpoint in one process
    one = json.loads((tmp_path / "two/test.json").read_text())
    assert one.pop("test_loss") == pytest.approx(two.pop("test_loss"), rel=1e-5) and one == two


def test_validation_on_a_part_spreads_over_the_split(prepared):
    config, _ = options.parse(train_lra.Config, [*MODEL, *TREES, prepared, "--batch_size=5", "--eval_iters=2"], "")
    task = train_lra.Classification(config, train_lra.prepare(config))
    seen = []

    def predict(model, compute, split, indices):
        seen.extend(indices)
        return 5.0, torch.from_numpy(task.splits[split].labels[indices]) + (torch.arange(len(indices)) < 4)  # four of them wrong
    task.predict = predict
    assert task.evaluate(None, Compute("cpu", "float32", 16)) == {"val_loss": 0.5, "val_accuracy": 0.6}
    assert seen == [i * 41 // 10 for i in range(10)]


def test_show_listops(trained, call):
    code, out, _ = call(train_lra, "--eval_only", "--show=6", trained[0])
    _, task, model, _ = reopen(Path(trained[0].removeprefix("--out_dir=")))
    split = task.splits["test"]
    expected = []
    for i, prediction in enumerate(one_by_one(model, split)[:6]):
        x, _, y = split.batch([i])
        label = listops.evaluate(x[0].tolist())
        assert label == y
        wrong = "  (wrong)" * (prediction != label)
        expected.append(f"predicted {prediction}, label {label}{wrong}: {listops.to_text(x[0].numpy())}")
    assert code == 0 and out.splitlines()[-6:] == expected and out.splitlines()[-9].startswith("test accuracy")


@pytest.mark.parametrize("task", ["image", "text", "retrieval"])
def test_show_pictures_and_texts(task, prepared, released, tmp_path, call):
    image = pytest.importorskip("PIL.Image", reason="pip install -r requirements-extra.txt") if task == "image" else None
    arguments = [f"--task={task}", "--block_size=1024", released[task], prepared, f"--out_dir={tmp_path}", "--attention=linear"]
    assert call(train_lra, *MODEL, *arguments, "--max_iters=2")[0] == 0
    code, out, _ = call(train_lra, "--eval_only", "--show=3", f"--out_dir={tmp_path}")
    assert code == 0
    split = reopen(tmp_path)[1].splits["test"]
    if task == "image":
        names = [f"test_{i}_predicted_{p}_label_{split.labels[i]}.png"
                 for i, p in enumerate(re.findall(r"predicted (\d), label", out)[:3])]
        assert [Path(line.split(":")[0]).name for line in out.splitlines()[-3:]] == names == sorted(p.name for p in tmp_path.glob("*.png"))
        for i, name in enumerate(names):
            picture = np.asarray(image.open(tmp_path / name))
            assert picture.shape == (512, 512) and picture.dtype == np.uint8
            assert (picture[::16, ::16].ravel() == split.batch([i])[0][0].numpy()).all()
    else:
        for i in range(3):
            x, mask, y = split.batch([i])
            texts = [bytes(row[real].tolist()).decode() for row, real in zip(x.view(-1, x.size(-1)), mask.view(-1, x.size(-1)))]
            assert re.search(rf"predicted \d, label {int(y)}.*: " + re.escape("\n  and: ".join(texts)), out)


def test_show_pictures_without_pillow(prepared, released, tmp_path, call, monkeypatch):
    arguments = ["--task=image", "--block_size=1024", released["image"], prepared, f"--out_dir={tmp_path}", "--attention=linear"]
    assert call(train_lra, *MODEL, *arguments, "--max_iters=0")[0] == 0
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install -r requirements-extra.txt" in error(call(train_lra, "--eval_only", "--show=1", f"--out_dir={tmp_path}"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_starts(preset, prepared, released, tmp_path, call):
    """On a handful of samples, with a narrow model; pathx with linear attention, because 16,384 tokens are many for a CPU."""
    task = preset.split("_")[1].removesuffix(".toml")
    data = [released[task]] if task in released else ["--n_train=6", "--n_val=5", "--n_test=5"]
    arguments = [*"--batch_size=2 --gradient_accumulation_steps=1 --max_iters=2 --n_embd=8 --n_inner=8 --device=cpu".split(), prepared]
    arguments += ["--attention=linear"] if task == "pathx" else []
    code, out, err = call(train_lra, f"config/{preset}", *data, *arguments, f"--out_dir={tmp_path}")
    assert code == 0, err
    assert read_metrics(tmp_path)[-1]["step"] == 2 and "test accuracy" in out
    assert call(train_lra, tmp_path / "config.toml", "--overwrite", "--max_iters=0")[0] == 0  # the saved configuration can be given back


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_evaluate_the_whole_validation_split_at_the_published_length(preset):
    config, _ = options.parse(train_lra.Config, [f"config/{preset}"], "")
    held_out = {"text": 25_000 // 10, "retrieval": 18_090, "image": 50_000 // 10}
    assert config.eval_iters * config.batch_size >= held_out.get(config.task, config.n_val)
    assert config.out_dir == "out-" + preset.removesuffix(".toml").replace("_", "-")
    if not preset.endswith("_small.toml"):
        assert config.block_size == lra.TASKS[config.task].block_size and preset == f"lra_{config.task}.toml"
        assert config.task not in train_lra.GENERATED or (config.n_train, config.n_val, config.n_test) == lra.TASKS[config.task].counts


@pytest.mark.parametrize("task", train_lra.GENERATED)
def test_full_presets_generate_the_published_task(task):
    config, _ = options.parse(train_lra.Config, [f"config/lra_{task}.toml"], "")
    if task == "listops":
        published = {name: p.default for name, p in inspect.signature(listops.generate).parameters.items()}
    else:
        published = vars(pathfinder.RELEASED[round(config.block_size ** 0.5)])
    assert all(getattr(config, name) == published[name] for name in train_lra.GENERATED[task])


def test_defaults_are_the_small_preset():
    config, _ = options.parse(train_lra.Config, ["config/lra_listops_small.toml"], "")
    assert config == train_lra.Config()


def test_a_tasks_name_stands_for_its_preset():
    assert [Path(train_lra.preset_of_task([task, "--seed=1"])[0]).name for task in train_lra.TASKS] == [
        "lra_listops_small.toml", "lra_text.toml", "lra_retrieval.toml", "lra_image.toml", "lra_pathfinder_small.toml", "lra_pathx.toml"]
    assert train_lra.preset_of_task(["--seed=1"]) == ["--seed=1"] and train_lra.preset_of_task(["my.toml"]) == ["my.toml"]


def test_longer_sequences_are_cut_and_counted(prepared, tmp_path, call):
    code, out, _ = call(train_lra, *MODEL, *TREES, "--block_size=9", prepared, "--max_iters=1", f"--out_dir={tmp_path}")
    config, _ = options.parse(train_lra.Config, [*TREES, prepared], "")
    _, whole = lra.load(train_lra.prepare(config))
    longer = sum(int(split.batch([i])[1].sum()) > 9 for split in whole.values() for i in range(len(split)))
    assert code == 0 and f"150 train, 41 val, 43 test, {longer} cut at block_size=9" in out and longer > 0
    assert max(mask.size(1) for mask in (split.batch(range(len(split)))[1] for split in reopen(tmp_path)[1].splits.values())) == 9


@pytest.mark.parametrize("arguments, words", [
    (["lisops"], "unknown task 'lisops': did you mean listops? choose listops, text, retrieval, image, pathfinder, pathx"),
    (["--task=pathfynder"], "--task=pathfynder: did you mean pathfinder?"),
    (["--attention=nistrom"], "--attention=nistrom: did you mean nystrom?"),
    (["config/lra_listop.toml"], "no preset config/lra_listop.toml: did you mean config/lra_listops.toml?"),
    (["text"], "download aclImdb_v1.tar.gz (80 MiB) from https://ai.stanford.edu/"),
    (["retrieval"], "download lra_release.gz (7.7 GiB) from https://github.com/google-research/long-range-arena"),
    (["image"], "download cifar-10-python.tar.gz (163 MiB) from https://www.cs.toronto.edu/"),
    (["image", "--source=nothere.tar.gz"], "there is no nothere.tar.gz"),
    (["config/lra_pathfinder.toml", "--block_size=1000"], "images of 1024 pixels need block_size of at least 1024, not 1000"),
    (["--n_train=0"], "train=0 must be a number of samples"),
    (["--min_length=20", "--max_length=10"], "max_length=10 must be"),
    (["--conv_kernel_size=4"], "conv_kernel_size=4 must be odd"),
    (["--eval_only"], "no checkpoint"),
])
def test_mistakes(arguments, words, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    message = error(call(train_lra, *arguments, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'run'}", "--device=cpu"))
    assert words in message and not (tmp_path / "run").exists()
    if "download" in words:
        assert str(tmp_path / "data") in message  # where to put it


def test_wrong_archive_and_wrong_label(released, tmp_path, call):
    where = [f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'run'}"]
    assert "lacks aclImdb/" in error(call(train_lra, "text", released["image"], *where))
    wrong = archive(tmp_path / "lra_release.gz", retrieval_files([b"2\t1\t2\ta\tb"]))
    message = error(call(train_lra, "retrieval", f"--source={wrong}", *where))
    assert "new_aan_pairs.train.tsv, line 1: label b'2' is not one of 0 to 1" in message


@pytest.mark.parametrize("arguments, words", [
    ([], "holds a run: continue it with --init_from=resume"),
    (["--init_from=resume", "--attention=linear"], "--attention=linear cannot change on resume: the run has attention=softmax"),
    (["--init_from=resume", "--n_train=100"], "--n_train=100 cannot change on resume: the run has n_train=150"),
])
def test_mistakes_with_an_existing_run(arguments, words, trained, call):
    assert words in error(call(train_lra, *arguments, trained[0]))
