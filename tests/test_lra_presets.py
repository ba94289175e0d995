"""train_lra.py's presets and task names, and what it says to users' mistakes."""
import inspect
from pathlib import Path

import pytest

import train_lra
from conftest import ROOT, error, read_metrics
from data import listops, lra, pathfinder
from lra_archives import archive, retrieval_files
from test_train_lra import of

PRESETS = sorted(path.name for path in (ROOT / "config").glob("lra_*.toml"))


@pytest.mark.parametrize("preset", [
    preset if preset.endswith("_small.toml") else pytest.param(preset, marks=pytest.mark.slow)
    for preset in PRESETS])
def test_every_preset_starts(preset, prepared, released, tmp_path, call):
    """On a handful of samples, with a narrow model.

    pathx with linear attention, because 16,384 tokens are many for a CPU.
    """
    task = preset.split("_")[1].removesuffix(".toml")
    data = [released[task]] if task in released else ["--n_train=6", "--n_val=5", "--n_test=5"]
    if task == "pathx":
        data.append("--attention=linear")
    code, out, err = call(train_lra, f"config/{preset}", *data, prepared, "--batch_size=2",
                          "--gradient_accumulation_steps=1", "--max_iters=2", "--n_embd=8",
                          "--n_inner=8", "--device=cpu", f"--out_dir={tmp_path}")
    assert code == 0, err
    assert read_metrics(tmp_path)[-1]["step"] == 2 and "test accuracy" in out
    # the saved configuration can be given back
    assert call(train_lra, tmp_path / "config.toml", "--overwrite", "--max_iters=0")[0] == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_evaluate_the_whole_validation_split_at_the_published_length(preset):
    config = of(f"config/{preset}")
    held_out = {"text": 25_000 // 10, "retrieval": 18_090, "image": 50_000 // 10}
    assert config.eval_iters * config.batch_size >= held_out.get(config.task, config.n_val)
    assert config.out_dir == "out-" + preset.removesuffix(".toml").replace("_", "-")
    if not preset.endswith("_small.toml"):
        published = lra.TASKS[config.task]
        assert config.block_size == published.block_size and preset == f"lra_{config.task}.toml"
        counts = config.n_train, config.n_val, config.n_test
        assert config.task not in train_lra.GENERATED or counts == published.counts


@pytest.mark.parametrize("task", train_lra.GENERATED)
def test_full_presets_generate_the_published_task(task):
    config = of(f"config/lra_{task}.toml")
    if task == "listops":
        parameters = inspect.signature(listops.generate).parameters
        published = {name: p.default for name, p in parameters.items()}
    else:
        published = vars(pathfinder.RELEASED[round(config.block_size ** 0.5)])
    assert all(getattr(config, name) == published[name] for name in train_lra.GENERATED[task])


def test_defaults_are_the_small_preset():
    assert of("config/lra_listops_small.toml") == train_lra.Config()


def test_a_tasks_name_stands_for_its_preset():
    named = [Path(train_lra.preset_of_task([task, "--seed=1"])[0]).name for task in train_lra.TASKS]
    assert named == ["lra_listops_small.toml", "lra_text.toml", "lra_retrieval.toml",
                     "lra_image.toml", "lra_pathfinder_small.toml", "lra_pathx.toml"]
    for words in (["--seed=1"], ["my.toml"]):
        assert train_lra.preset_of_task(words) == words


@pytest.mark.parametrize("arguments, words", [
    (["lisops"], "unknown task 'lisops': did you mean listops? choose listops, text, retrieval, "
                 "image, pathfinder, pathx"),
    (["--task=pathfynder"], "--task=pathfynder: did you mean pathfinder?"),
    (["--attention=nistrom"], "--attention=nistrom: did you mean nystrom?"),
    (["config/lra_listop.toml"],
     "no preset config/lra_listop.toml: did you mean config/lra_listops.toml?"),
    (["text"], "download aclImdb_v1.tar.gz (80 MiB) from https://ai.stanford.edu/"),
    (["retrieval"], "download lra_release.gz (7.7 GiB) from "
                    "https://github.com/google-research/long-range-arena"),
    (["image"], "download cifar-10-python.tar.gz (163 MiB) from https://www.cs.toronto.edu/"),
    (["image", "--source=nothere.tar.gz"], "there is no nothere.tar.gz"),
    (["config/lra_pathfinder.toml", "--block_size=1000"],
     "images of 1024 pixels need block_size of at least 1024, not 1000"),
    (["--n_train=0"], "train=0 must be a number of samples"),
    (["--min_length=20", "--max_length=10"], "max_length=10 must be"),
    (["--conv_kernel_size=4"], "conv_kernel_size=4 must be odd"),
    (["--eval_only"], "no checkpoint"),
])
def test_mistakes(arguments, words, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    message = error(call(train_lra, *arguments, f"--data_dir={tmp_path / 'data'}",
                         f"--out_dir={tmp_path / 'run'}", "--device=cpu"))
    assert words in message and not (tmp_path / "run").exists()
    if "download" in words:
        assert str(tmp_path / "data") in message  # where to put it


def test_wrong_archive_and_wrong_label(released, tmp_path, call):
    where = [f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'run'}"]
    assert "lacks aclImdb/" in error(call(train_lra, "text", released["image"], *where))
    wrong = archive(tmp_path / "lra_release.gz", retrieval_files([b"2\t1\t2\ta\tb"]))
    message = error(call(train_lra, "retrieval", f"--source={wrong}", *where))
    assert "new_aan_pairs.train.tsv, line 1: label b'2' is not one of 0 to 1" in message
