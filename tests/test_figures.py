"""study/: what is drawn are the numbers of metrics.jsonl and of the checkpoints."""
import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="pip install -r requirements-extra.txt")
pytest.importorskip("scipy", reason="pip install -r requirements-extra.txt")

import plot
import train_vision
from conftest import error, teach
from drawn_runs import column, invent, read, records
from engine.options import DataError
from precond import record
from study import figures, spectra, stats
from study.comparisons import conditioning, forest, read_comparison
from study.runs import Run


@pytest.mark.parametrize("x", ["step", "tokens", "seconds"])
def test_validation_draws_mean_and_standard_deviation(lm, x):
    figure = figures.validation(read(lm), x)
    upper = figure.axes[0]
    for drawn, band, (label, folders) in zip(upper.lines, upper.collections, lm.items(),
                                             strict=True):
        steps, losses = column(folders, "val_loss")
        # there is a record at each step, an evaluation at every second one
        seconds = column(folders, "elapsed_s")[1][:, ::2]
        places = {"step": [steps] * 2, "tokens": [[step * 4 * 16 for step in steps]] * 2,
                  "seconds": seconds}[x]
        assert drawn.get_label() == label
        assert np.allclose(drawn.get_xdata(), np.mean(places, axis=0), rtol=1e-12)
        assert np.allclose(drawn.get_ydata(), losses.mean(axis=0), rtol=1e-12)
        sd = np.abs(losses[0] - losses[1]) / 2**0.5
        corners = band.get_paths()[0].vertices[:, 1]
        for edge in (losses.mean(axis=0) - sd, losses.mean(axis=0) + sd):
            assert np.abs(corners[:, None] - edge).min(axis=0).max() < 1e-12
    if x == "seconds":  # the groups have no x in common
        assert len(figure.axes) == 1
    else:
        difference = figure.axes[1].lines[0].get_ydata()
        off, on = (column(lm[label], "val_loss")[1] for label in ("off", "on"))
        assert np.allclose(difference, (on - off).mean(axis=0), atol=1e-12)


def test_differences_pair_the_seeds(tmp_path):
    off = [invent(tmp_path / f"off{seed}", seed=seed) for seed in (1, 2, 3)]
    # 1 and 3 are in both groups
    on = [invent(tmp_path / f"on{seed}", seed=seed, precond=True) for seed in (3, 1, 7)]
    figure = figures.validation(read({"off": off, "on": on}), "step")
    assert np.array_equal(figure.axes[1].lines[0].get_ydata(), [0, 0, 0])
    assert figures.final_differences(read({"off": off, "on": on})) == {"on": [0, 0]}
    assert figures.final_differences(read({"off": off, "on": on[2:]})) == {}
    assert np.allclose(figure.axes[0].lines[1].get_ydata(), np.array([0, 10, 20]) + 11 / 3)
    alone = figures.validation(read({"off": off[1:2], "on": on}), "step")
    assert len(alone.axes) == 1


def test_final_differences_have_the_intervals_of_the_report(lm):
    runs = read(lm)
    off, on = (column(lm[label], "val_loss")[1][:, -1] for label in ("off", "on"))
    values = figures.final_differences(runs)
    assert list(values) == ["on"] and np.allclose(values["on"], on - off)
    result = stats.paired(values["on"])
    ax, = figures.difference(runs, values).axes
    assert np.allclose(ax.collections[0].get_segments()[0][:, 0], [result.low, result.high])
    assert np.array_equal(ax.lines[1].get_xdata(), values["on"])  # the first line is zero
    assert ax.get_xlabel() == "Difference to off (nats per token; left of 0 is better)"


def test_accuracy_in_percent(lra):
    figure = figures.validation(read(lra), "step")
    assert figure.axes[0].get_ylabel() == "Validation accuracy (%)"
    values = [column(folders, "val_accuracy")[1][0] for folders in lra.values()]
    for drawn, value in zip(figure.axes[0].lines, values, strict=True):
        assert np.allclose(drawn.get_ydata(), 100 * value, rtol=1e-12)
    assert np.allclose(figure.axes[1].lines[0].get_ydata(), 100 * (values[1] - values[0]))


def test_axis_shows_what_follows_the_first_tenth(tmp_path):
    run = invent(tmp_path / "run", steps=range(0, 101, 10))
    records = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    for r in records:
        r["val_loss"] = 9.0 if r["step"] == 0 else 2 - r["step"] / 100
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    low, high = figures.validation(read({"run": [run]}), "step").axes[0].get_ylim()
    assert 0.9 < low < 1 and 1.9 < high < 2


def test_kappa_draws_medians_by_layer(lm):
    figure = figures.kappa(read(lm), "step")
    assert [ax.get_title() for ax in figure.axes] == ["layer 0", "layer 1"]
    for layer, ax in enumerate(figure.axes):
        assert ax.get_yscale() == "log"
        curves = [(folders, name) for folders in lm.values()
                  for name in ("kappa_after", "kappa_before")]
        for drawn, (folders, name) in zip(ax.lines, curves, strict=True):
            assert np.allclose(drawn.get_ydata(),
                               np.median(column(folders, name, layer)[1], axis=0), rtol=1e-12)
        # C is not applied in the first group
        assert [drawn.get_linestyle() for drawn in ax.lines] == [":", "--", "-", "--"]


def test_kappa_draws_median_and_range_of_three_seeds(tmp_path):
    runs = [invent(tmp_path / f"{seed}", kappa=(value,), seed=seed)
            for seed, value in ((1, 2.0), (2, 10.0), (3, 3.0))]
    ax, = figures.kappa(read({"runs": runs}), "step").axes
    assert list(ax.lines[0].get_ydata()) == [3.0] * 3
    assert set(ax.collections[0].get_paths()[0].vertices[:, 1]) == {2.0, 10.0}


def test_infinite_kappa_is_marked(tmp_path):
    run = invent(tmp_path / "run", kappa=(2.0, None))
    finite, infinite = figures.kappa(read({"run": [run]}), "step").axes
    assert len(finite.lines) == 2 and len(infinite.lines) == 4
    line, marks = infinite.lines[:2]
    assert np.isnan(line.get_ydata()).all() and marks.get_marker() == "^"
    assert list(marks.get_xdata()) == [0, 10, 20]


def test_training_draws_rates_and_norms(lm, tmp_path):
    rate, norm = figures.training(read(lm), "step").axes
    steps, rates = column(lm["on"], "learning_rate")
    assert len(rate.lines) == 1 and list(rate.lines[0].get_xdata()) == steps
    assert np.array_equal(rate.lines[0].get_ydata(), rates[0])
    for drawn, folders in zip(norm.lines, lm.values()):
        assert np.allclose(drawn.get_ydata(), np.median(column(folders, "grad_norm")[1], axis=0),
                           rtol=1e-12)
    other = invent(tmp_path / "a"), invent(tmp_path / "b", learning_rate=0.02)
    lines = figures.training(read({"a": other[:1], "b": other[1:]}), "step").axes[0].lines
    assert [set(drawn.get_ydata()) for drawn in lines] == [{0.01}, {0.02}]


def test_one_record_is_a_point(tmp_path):
    """Only the last step has a gradient norm and a learning rate."""
    runs = read({"off": [invent(tmp_path / "1", steps=(0, 9))],
                 "on": [invent(tmp_path / "2", steps=(0, 9), precond=True, learning_rate=0.02)]})
    for ax in figures.training(runs, "step").axes:
        for drawn in ax.lines[:2]:
            assert list(drawn.get_xdata()) == [9] and drawn.get_marker() == "o"


@pytest.mark.parametrize("layer", [0, 1])
def test_spectrum_agrees_with_the_kappa_that_training_measured(lm, layer):
    """kappa is the largest over the smallest singular value.

    Training wrote its median over the same matrices, one seed at a time.
    """
    for folders in lm.values():
        values = spectra.spectra(read({"run": folders[:1]}), layer)["run"]
        best = torch.load(folders[0] / "best.pt", weights_only=True)["step"]
        written = next(r for r in records(folders[0]) if r["step"] == best and "val_loss" in r)
        for (s, median), name in zip(values, ("kappa_before", "kappa_after"), strict=True):
            assert s.shape == (8, 16) or s.shape == (4, 16)  # samples x heads of 16 channels
            assert (s[:, 0] == 1).all() and (np.diff(s) <= 0).all()
            assert median == pytest.approx(written[name][layer], rel=1e-4)
            assert np.median(1 / s[:, -1]) >= 0.999 * median  # torch's median is the lower middle
    figure = figures.spectrum(read(lm), found := spectra.spectra(read(lm), layer), layer)
    for ax, values in zip(figure.axes, found.values(), strict=True):
        for drawn, (s, _) in zip(ax.lines, values, strict=True):
            assert np.allclose(drawn.get_ydata(), np.median(s, axis=0))
        lowest = min(s.min() for s, _ in values)
        assert ax.get_ylim()[0] < lowest and ax.get_ylim()[1] < 2  # no decade without a value
        assert f"C A {float(f'{values[1][1]:.3g}'):,.10g}" in ax.get_title()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_spectrum_of_a_vision_run_agrees_with_its_kappa(task, tmp_path):
    for package in ("transformers", "scipy", "pycocotools"):
        pytest.importorskip(package, reason="pip install -r requirements-extra.txt")
    teach(train_vision, task, "--device=cpu", "--precond=True", "--n_layer=2", "--n_head=2",
          "--n_embd=16", "--image_size=32", "--batch_size=4", "--queries=6", "--mask_points=32",
          "--n_val=8", "--eval_iters=1", "--max_iters=4", "--eval_interval=2", "--log_interval=1",
          f"--out_dir={tmp_path / 'run'}")
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["step"]
    written = next(r for r in records(tmp_path / "run") if r["step"] == best and "val_loss" in r)
    values = spectra.spectra(read({"run": [tmp_path / "run"]}), 1)["run"]
    for (_, median), name in zip(values, ("kappa_before", "kappa_after"), strict=True):
        assert median == pytest.approx(written[name][1], rel=1e-4)
    assert len(figures.draw({"run": [tmp_path / "run"]}, tmp_path / "figures")) == 8


def test_spectrum_leaves_padding_out(lra):
    """The same singular values as from each sequence on its own, without padding.

    Those of fewer tokens than channels are left out.
    """
    run = Run.read(lra["on"][0])
    (a, _), (ca, _) = spectra.spectra({"on": [run]}, -1)["on"]
    model, task, _ = spectra.load(run)
    expected = []
    for i in range(4):
        x, mask, _ = task.splits["val"].batch([i])
        with torch.no_grad(), record() as calls:
            model(x, mask)
        expected.append([np.linalg.svd(part[0, 0].double().numpy(), compute_uv=False)
                         for part in calls[-1]])
    lengths = [min(len(s[0]), 32) for s in expected]
    assert min(lengths) < max(lengths), lengths
    for mine, index in (a, 0), (ca, 1):
        theirs = np.array([s[index] / s[index][0] for s in expected
                           if len(s[index]) == max(lengths)])
        assert np.allclose(mine, theirs, atol=1e-5)


@pytest.mark.slow
def test_spectrum_is_left_out_where_its_sources_are_gone(lm, tmp_path, capsys):
    folder = shutil.copytree(lm["off"][0], tmp_path / "run")
    run = Run.read(folder)
    saved = torch.load(folder / "best.pt", weights_only=True)
    saved["config"]["data_dir"] = str(tmp_path / "nowhere")
    torch.save(saved, folder / "best.pt")
    with pytest.raises(DataError, match=f"the data of {folder} is not in {tmp_path / 'nowhere'}"):
        spectra.load(run)
    (folder / "best.pt").unlink()
    assert spectra.load(run)[2].data_dir != str(tmp_path / "nowhere")  # of ckpt.pt
    (folder / "ckpt.pt").unlink()
    assert len(figures.draw({"run": [folder]}, tmp_path / "figures")) == 6
    assert capsys.readouterr().out == f"no spectrum: {folder} holds no checkpoint\n"


def report(path, metric, **pairs):
    arms = {name: {"paired": dict(zip(("mean", "low", "high"), ends)) | {"n": 5}}
            for name, ends in pairs.items()}
    arms = {"off": {}} | arms
    for i, arm in enumerate(arms.values()):  # kappa falls as the metric rises
        arm |= {"kappa": [100.0 / (i + 1), 50.0 / (i + 1), None], "final": [i + 0.1, i + 0.2, None]}
    path.write_text(json.dumps({"metric": metric, "arms": arms}))
    return path


@pytest.mark.slow
def test_the_forest_has_every_difference_and_better_is_right(tmp_path, call):
    loss = report(tmp_path / "characters.json", "val_loss", paper=(0.07, -0.01, 0.15),
                  half=(-0.02, None, None))
    accuracy = report(tmp_path / "listops.json", "val_accuracy", paper=(-0.02, -0.06, 0.02))
    figure = forest({"characters": read_comparison(loss), "listops": read_comparison(accuracy)})
    one, two = figure.axes
    assert [tick.get_text() for tick in one.get_yticklabels()] == ["paper (5 seeds)",
                                                                   "half (5 seeds)"]
    assert list(one.lines[0].get_xdata()) == [-0.01, 0.15] and one.lines[1].get_xdata() == 0.07
    assert list(one.lines[2].get_xdata()) == [-0.02, -0.02]
    assert list(two.lines[0].get_xdata()) == [-6, 2]  # points
    assert one.get_xlim()[0] > one.get_xlim()[1] and two.get_xlim()[0] < two.get_xlim()[1]
    code, out, _ = call(plot, loss, accuracy, f"--out={tmp_path}")
    assert code == 0 and (tmp_path / "forest.png").exists() and "forest.svg" in out
    assert (tmp_path / "conditioning.png").exists()
    assert "cannot read" in error(call(plot, tmp_path / "nothere.json"))
    kept = []  # as compare.py writes them: by the names of their folders
    for folder in tmp_path / "out-one", tmp_path / "out-two":
        folder.mkdir()
        kept.append(shutil.copy(loss, folder / "compare.json"))
    assert call(plot, *kept, f"--out={tmp_path / 'both'}")[0] == 0
    drawn = (tmp_path / "both" / "forest.svg").read_text()
    assert "out-one: loss" in drawn and "out-two: loss" in drawn
    assert "two comparisons have the name out-one" in error(call(plot, *kept, kept[0]))
    loss.write_text("[]")
    assert "no compare.json" in error(call(plot, loss))


def test_the_final_metric_against_kappa(tmp_path):
    accuracy = report(tmp_path / "listops.json", "val_accuracy", paper=(-0.02, -0.06, 0.02))
    arms = json.loads(accuracy.read_text())["arms"]
    arms["off"]["kappa"][0] = None  # infinite: the highest, with the lowest accuracy
    accuracy.write_text(json.dumps({"metric": "val_accuracy", "arms": arms}))
    ax, = conditioning({"listops": read_comparison(accuracy)}).axes
    assert ax.get_title(loc="left").startswith("listops\n4 runs, rank correlation -0.95")
    assert ax.get_ylabel() == "accuracy (%; higher is better)"
    del arms["off"]["kappa"], arms["paper"]["kappa"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"metric": "val_accuracy", "arms": arms}))
    old, new = read_comparison(old), read_comparison(accuracy)
    few = new | {"points": {"off": new["points"]["off"]}}  # two runs have no correlation
    infinite = new | {"points": {"off": 4 * [[float("inf"), 0.5]]}}
    assert conditioning({"old": old, "few": few, "infinite": infinite}) is None
    assert len(conditioning({"old": old, "listops": new}).axes) == 1
    between = new | {"points": {"off": [[120, 0.5], [300, 0.4], [500, 0.6], [700, 0.5]]}}
    narrow, = conditioning({"listops": between}).axes
    low, high = narrow.get_xlim()
    assert any(low < tick < high for tick in narrow.get_xticks())  # no power of ten is among them
    close = new | {"points": {"off": [[190, 0.5], [300, 0.4], [400, 0.6], [430, 0.5]]}}
    narrow, = conditioning({"listops": close}).axes
    low, high = narrow.get_xlim()
    assert 1 <= sum(low < tick < high for tick in narrow.get_xticks()) <= 4  # room for labels
    edge, = [line for line in ax.lines if line.get_gid() == "infinite"]
    assert list(edge.get_ydata()) == pytest.approx([10.0])  # percent
    on = [line for line in ax.lines if list(line.get_xdata()) == [50.0, 25.0]]
    assert len(on) == 1
