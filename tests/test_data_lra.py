"""data/lra.py: prepared folders are complete and not mistaken for others, batches, the command."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.folders import ensure
from data.lra import SPLITS, Split, load, main, prepare
from engine import options
from engine.options import DataError
from lra_archives import stored
from test_data_listops import value_of

ROOT = Path(__file__).parents[1]
SMALL = dict(train=40, val=10, test=10, min_length=3, max_length=20, max_depth=4, max_args=3)


def test_listops_generated_splits_share_no_tree(tmp_path):
    few = dict(train=500, val=100, test=100,
               min_length=3, max_length=6, max_depth=2, max_args=3)  # of 4400 trees
    result = stored(prepare("listops", tmp_path, generate=few))
    assert [len(result[split]) for split in SPLITS] == [500, 100, 100]
    assert len({tree for split in SPLITS for _, tree in result[split]}) == 700
    assert all(value_of(tree) == label
               for split in SPLITS for label, tree in result[split])
    more = stored(prepare("listops", tmp_path, generate={**few, "train": 600}))
    assert more["test"] == result["test"] and len(more["train"]) == 600


def test_same_parameters_are_found_and_others_are_not_mistaken(tmp_path, capsys):
    folder = prepare("listops", tmp_path, generate=SMALL)
    assert capsys.readouterr().out.count("\n") == 2
    written = (folder / "meta.json").stat().st_mtime_ns
    assert prepare("listops", tmp_path, generate=dict(reversed(SMALL.items()))) == folder
    assert capsys.readouterr().out == ""
    assert (folder / "meta.json").stat().st_mtime_ns == written
    others = [prepare("listops", tmp_path, generate=SMALL, seed=1),
              prepare("listops", tmp_path, generate=SMALL, block_size=10),
              prepare("listops", tmp_path, generate={**SMALL, "max_depth": 3})]
    assert len({folder, *others}) == 4
    meta, splits = load(others[1])
    longer = sum((np.diff(split.arrays[1]) > 10).sum() for split in load(folder)[1].values())
    assert sum(meta["cut"].values()) == longer > 0
    assert np.diff(splits["train"].arrays[1]).max() == 10


def test_an_interrupted_preparation_is_not_mistaken_for_a_finished_one(tmp_path, monkeypatch):
    def interrupted(*args, **options):
        yield "train", 1, b"\1\2"
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr("data.lra.samples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare("listops", tmp_path, generate=SMALL)
    assert not list(tmp_path.glob("lra*"))
    left = tmp_path / ".tmp" / prepare("listops", tmp_path / "elsewhere", generate=SMALL).name
    left.mkdir()  # as a killed process leaves it
    (left / "train_labels.npy").write_bytes(b"rubbish")
    assert len(stored(prepare("listops", tmp_path, generate=SMALL))["train"]) == 40
    assert not left.exists()


def test_a_second_preparation_waits_for_the_first(tmp_path):
    started, calls = threading.Event(), []

    def fill(work):
        calls.append(work)
        started.set()
        time.sleep(0.2)
        return {}

    first = threading.Thread(target=ensure, args=(tmp_path / "folder", fill))
    first.start()
    started.wait()
    ensure(tmp_path / "folder", fill)
    assert (tmp_path / "folder" / "meta.json").exists() and len(calls) == 1
    first.join()


def test_damaged_folder_is_noticed(tmp_path):
    folder = prepare("listops", tmp_path, generate=SMALL)
    tokens = folder / "val_tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(DataError, match="val_tokens.npy is not what was prepared"):
        load(folder)
    tokens.unlink()
    with pytest.raises(DataError, match="prepare it again"):
        load(folder)
    with pytest.raises(DataError, match="no readable meta.json: .*prepare it again"):
        load(tmp_path / "none")


def overwrite(array, index, value):
    """One number of a stored array, in place."""
    numbers = np.load(array, mmap_mode="r+")
    numbers[index] = value
    numbers.flush()


@pytest.mark.parametrize("name, index, value", [
    ("train_tokens", 7, 3),  # a digit, but another one
    ("test_labels", 2, 10),
    ("val_offsets", 0, -1),
])
def test_an_array_overwritten_in_place_is_noticed(tmp_path, name, index, value):
    folder = prepare("listops", tmp_path, generate=SMALL)
    before = np.load(folder / f"{name}.npy")[index]
    overwrite(folder / f"{name}.npy", index, value)
    assert (before != np.load(folder / f"{name}.npy")[index]).any()
    with pytest.raises(DataError, match=f"{name}.npy is not what was prepared: delete"):
        load(folder)
    overwrite(folder / f"{name}.npy", index, before)
    load(folder)
    damaged = bytearray((folder / f"{name}.npy").read_bytes())
    damaged[10] = ord("(")  # of the header
    (folder / f"{name}.npy").write_bytes(damaged)
    with pytest.raises(DataError, match=f"{name}.npy is not what was prepared: delete"):
        load(folder)


@pytest.mark.parametrize("change", [
    {"sha256": 5}, {"sha256": {"train_labels.npy": 5}}, {"task": None}, {"task": []},
    {"task": "text"}, {"classes": "10"}, {"classes": 10**9}, {"vocab_size": None}, {"towers": 2},
    {"counts": {"train": 40}}, {"counts": 5},
    {"baselines": {}}, {"baselines": {"majority": 1, "root": []}}, {"cut": 5},
    {"cut": {"train": "1", "val": 0, "test": 0}}, {"cut": {}},
])
def test_meta_of_wrong_types_is_one_line(tmp_path, change):
    folder = prepare("listops", tmp_path, generate=SMALL)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(DataError, match=f"{folder}.* prepare it again") as error:
        load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    for key in change:
        del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="prepare it again"):
        load(folder)


def test_batch_against_the_arrays(tmp_path):
    split = load(prepare("listops", tmp_path, generate=SMALL))[1]["train"]
    tokens, offsets, labels = split.arrays
    indices = torch.tensor([5, 0, 39, 5])
    x, mask, y = split.batch(indices)
    lengths = np.diff(offsets)[[5, 0, 39, 5]]
    assert (x.dtype, mask.dtype, y.dtype) == (torch.int64, torch.bool, torch.int64)
    assert x.shape == mask.shape == (4, lengths.max())
    assert mask.sum(1).tolist() == lengths.tolist() and y.tolist() == labels[[5, 0, 39, 5]].tolist()
    for row, i in zip(x, indices):
        tree = tokens[offsets[i]:offsets[i + 1]].tolist()
        assert row.tolist() == [*tree, *[0] * (len(row) - len(tree))]
    stored_tokens = np.load(next(tmp_path.glob("lra*")) / "train_tokens.npy", mmap_mode="r")
    assert isinstance(stored_tokens, np.memmap) and len(split) == 40
    assert tokens.dtype == np.uint8 and isinstance(tokens.base, np.memmap)


@pytest.mark.parametrize("arguments, words", [
    (["lisops"], "unknown task 'lisops': did you mean listops?"),
    (["listops", "--block_size=0"], "block_size=0 must be at least 1"),
    (["listops", "--generate", "train=0"], "train=0 must be a number of samples"),
    (["listops", "--generate", "trees=5"], "no option trees=5; take train, val, test, max_depth"),
    (["listops", "--generate", "max_args=1"], "max_args=1 must be"),
    (["listops", "--generate", "max_args"], "takes NAME=NUMBER"),
    (["listops", "--generate", "train=true"], "train=True must be a number of samples"),
    (["listops", "--generate", "max_depth=true"], "no option max_depth=True"),
    (["listops", "--generate", "max_depth=NaN"], "max_depth=nan must be an integer"),
    (["listops", "--generate", "max_depth=[2]"], "no option max_depth=[2]"),
    (["pathfinder", "--generate", "size=2.5"], "size is 2.5, needs a whole number"),
    (["pathfinder", "--generate", "size=64"], "images of 4096 pixels need block_size of at least"),
    (["listops", "--seed=-1"], "seed=-1 must be in [0, 4294967296)"),
    (["listops", "--seed=99999999999999999999"], "seed=99999999999999999999 must be in"),
    (["listops", "--source="], "the source is empty"),
    (["listops", "--data_dir="], "data_dir is empty"),
    (["image", "--generate", "train=5"], "train mean nothing here"),
    (["listops", "--source=x", "--generate", "train=5"], "leave the source out"),
    (["retrieval"], "download lra_release.gz (7.7 GiB) "
                    "from https://github.com/google-research/long-range-arena"),
    (["image"], "download cifar-10-python.tar.gz (163 MiB) from https://www.cs.toronto.edu"),
])
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        options.run(lambda: main([f"--data_dir={tmp_path}", *arguments]))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and words in lines[0] and len(lines) == 1
    assert not list(tmp_path.glob("lra*"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot prepare listops in .*file"):
        prepare("listops", tmp_path / "file", generate=SMALL)


@pytest.mark.slow
def test_command_line_as_a_script(tmp_path):
    script = ROOT / "data" / "lra.py"
    command = [sys.executable, str(script), "listops", "--data_dir", str(tmp_path),
               "--generate", *(f"{k}={v}" for k, v in SMALL.items())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[2])
    assert json.loads((folder / "meta.json").read_text())["counts"]["train"] == 40
    assert "root operator" in done.stdout and isinstance(Split(folder, "val"), Split)


@pytest.mark.slow
def test_the_script_needs_no_torch():
    script = ROOT / "data" / "lra.py"
    code = f"""if True:
        import runpy, sys
        sys.argv = ["lra.py", "lisops"]
        try:
            runpy.run_path({str(script)!r}, run_name="__main__")
        finally:
            print("torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"] and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    """Ctrl-C, which a terminal sends to all processes at once."""
    code = f"""if True:
        from data import pathfinder
        from data.lra import main
        from engine import options

        def said(drawn, *args, **kwargs):
            for image in drawn:
                print("drawn", flush=True)
                yield image

        pathfinder.tqdm = said
        options.run(lambda: main(["pathfinder", "--data_dir={tmp_path}"]))"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT,
                             # Tests that a shell runs in its background begin with it ignored.
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert "preparing pathfinder" in child.stdout.readline()
    assert child.stdout.readline() == "drawn\n"
    os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err.split()) == (130, ["interrupted"])
    assert not list(tmp_path.glob("lra*"))


@pytest.mark.slow
def test_workers_end_when_the_process_that_draws_is_killed():
    """They hold its output open, which `run` reads to the end."""
    code = """if True:
        import os, signal
        from data import pathfinder

        def killed(drawn, *args, **kwargs):
            yield next(iter(drawn))
            os.kill(os.getpid(), signal.SIGKILL)

        pathfinder.tqdm = killed
        pathfinder.generate(300, seed=1, workers=2)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_an_interrupt_between_two_images_leaves_the_others_undrawn():
    """To draw them first would take minutes."""
    code = """if True:
        from data import pathfinder

        def interrupted(drawn, *args, **kwargs):
            yield next(iter(drawn))
            raise KeyboardInterrupt

        pathfinder.tqdm = interrupted
        try:
            pathfinder.generate(100_000, seed=1, workers=2)
        except KeyboardInterrupt:
            print("interrupted")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          cwd=ROOT)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
