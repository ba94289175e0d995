"""train_vision.py: exact resume, the preconditioner in all three models, evaluation, mistakes."""
import copy
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXTRA = "pip install -r requirements-extra.txt"
for package in ("transformers", "scipy", "pycocotools", "PIL"):
    pytest.importorskip(package, reason=EXTRA)

import coco_folder  # noqa: E402
import precond  # noqa: E402
import train_vision  # noqa: E402
from conftest import error, read_metrics, torchrun  # noqa: E402
from data import coco  # noqa: E402
from data.images import make_truth  # noqa: E402
from engine import checkpoint, options, trainer  # noqa: E402
from engine.device import Compute  # noqa: E402
from vision import models as vision  # noqa: E402

# From pycocotools with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TASKS = vision.TASKS
TINY = ("--image_size=32 --n_layer=2 --n_head=2 --n_embd=16 --batch_size=4 --queries=6 "
        "--query_blocks=1 --upscale_blocks=1 --mask_points=32 --n_val=8 --eval_iters=2 "
        "--device=cpu").split()
RUN = [*TINY, "--max_iters=6", "--eval_interval=2", "--log_interval=1", "--dropout=0.1",
       "--precond=True"]


def configure(task, *more):
    return options.parse(train_vision.Config, [f"--task={task}", *TINY, *more], "")[0]


def build(task, *more):
    config = configure(task, *more)
    torch.manual_seed(0)
    return train_vision.VisionTask(config), vision.Vision(config, 6)


def test_a_diverged_detector_gives_all_weights_a_gradient():
    """Else copies in other processes wait for it."""
    task, model = build("detect")
    images, *targets = task.batch(0, 2)
    loss = model(images * torch.inf, *targets)[1]
    loss.backward()
    assert loss.isnan() and all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_resumes_bit_for_bit(task, tmp_path, call, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    code, out, err = call(train_vision, task, *RUN, f"--out_dir={whole}")
    assert code == 0, err
    step = trainer.Trainer.train_step

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", interrupted)
        assert call(train_vision, task, *RUN, f"--out_dir={stopped}")[0] == 143
    assert checkpoint.read(stopped / "ckpt.pt")["step"] == 3
    assert call(train_vision, "--init_from=resume", f"--out_dir={stopped}")[0] == 0
    assert read_metrics(stopped) == read_metrics(whole)
    a, b = (checkpoint.read(folder / "ckpt.pt")["model"] for folder in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    last = read_metrics(whole)[-1]
    metrics = {"val_accuracy"} if task == "classify" else {"val_ap", "val_ap50", "val_ap75"}
    assert metrics < last.keys() and len(last["kappa_before"]) == len(last["kappa_after"]) == 2
    assert last["tokens"] == 6 * 4 * 16  # 16 patches an image

    code, out, _ = call(train_vision, "--eval_only", "--show=2", f"--out_dir={whole}")
    best = checkpoint.read(whole / "best.pt")["best"]
    as_good = [r["step"] for r in read_metrics(whole) if r.get(best["metric"]) == best["value"]]
    assert best["step"] == as_good[-1]
    assert code == 0 and f"step {best['step']}: " in out
    assert f"{best['metric']} {best['value']:.4f}" in out
    from PIL import Image
    with Image.open(whole / "val_1.png") as picture:
        assert picture.size == ((384, 410) if task == "classify" else (776, 410))


@pytest.mark.parametrize("task", TASKS)
def test_the_preconditioner_reaches_every_attention(task):
    task_on, on = build(task, "--precond=True")
    _, off = build(task)
    a, b = on.state_dict(), off.state_dict()
    # Runs with and without pair exactly.
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    images, *targets = task_on.batch(0, 4)
    assert precond.check(on, images, *targets) == 2
    with precond.record() as calls:
        outputs, loss = on(images, *targets)
    for before, after in calls:
        assert (after.norm(dim=-1) - 1).abs().max() < 1e-5 < (before.norm(dim=-1) - 1).abs().max()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in on.parameters())
    with precond.record() as calls:
        assert not torch.equal(off(images, *targets)[0][0], outputs[0])
    assert len(calls) == 2 and all(before is after for before, after in calls)
    half = build(task, "--precond=True", "--precond_power=0.5", "--precond_grad=True")[1]
    with precond.record() as calls:
        half(images)
    before, after = calls[0]
    expected = before / before.norm(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    flow = build(task, "--precond=True", "--precond_grad=True")[1]
    gradients = []
    # Models with other options in the same process do not change those of the first.
    for model in (on, flow):
        model.zero_grad()
        torch.manual_seed(0)
        outputs, loss = model(images, *targets)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    with precond.record() as calls:
        torch.testing.assert_close(on(images)[0], outputs)  # the same forward pass
    assert (calls[0][1].norm(dim=-1) - 1).abs().max() < 1e-5
    assert (gradients[0] - gradients[1]).norm() > 0.05 * gradients[0].norm()


@pytest.mark.parametrize("task", TASKS)
def test_padding_and_order_of_objects_do_not_change_the_loss(task):
    data, model = build(task)
    images, *targets = data.batch(3, 4)
    if task == "classify":
        outputs, loss = model(images, *targets)
        expected = -outputs[0].double().log_softmax(-1)[range(4), targets[0]].mean()
        return torch.testing.assert_close(loss.double(), expected)
    counts, labels, objects = targets
    torch.manual_seed(0)
    loss = model(images, counts, labels, objects)[1]
    wide = [torch.cat([t, torch.ones_like(t)], dim=1) for t in (labels, objects)]
    for row, n in enumerate(counts.tolist()):
        for t in wide:
            t[row, :n] = t[row, :n].flip(0)
    torch.manual_seed(0)
    tolerance = 1e-3 if task == "segment" else 1e-5
    torch.testing.assert_close(model(images, counts, *wide)[1], loss, atol=0, rtol=tolerance)
    torch.manual_seed(0)
    fewer = model(images, counts.clamp(max=1), labels, objects)[1]
    assert counts.max() > 1 and abs(fewer - loss) > 0.02 * loss


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_perfect_outputs_have_an_average_precision_of_100(task):
    """Truth turned into outputs of a network and back, also for records of another size."""
    data, _ = build(task, "--image_size=64")
    images, counts, labels, objects = data.data.val.batch(range(8))
    logits = torch.full((8, 6, 7), -20.0)
    logits[:, :, 6] = 20
    shape = (8, 6, 4) if task == "detect" else (8, 6, 64, 64)
    other = torch.full(shape, 0.1 if task == "detect" else -20.0)
    for i, n in enumerate(counts.tolist()):
        logits[i, range(n), labels[i, :n]] = 40.0
        other[i, :n] = objects[i, :n] if task == "detect" else 40.0 * objects[i, :n] - 20
    truth = copy.deepcopy(data.data.truth)
    kind = "bbox" if task == "detect" else "segm"
    found = vision.detections(task, (logits, other), truth["images"])
    perfect = {"ap": 100, "ap50": 100, "ap75": 100}
    assert coco.average_precision(truth, found, kind) == pytest.approx(perfect)
    half = [d for d in found if d["image_id"] % 2]
    assert coco.average_precision(truth, half, kind)["ap"] < 80
    wrong = vision.detections(task, (logits.roll(1, dims=2), other), truth["images"])
    assert coco.average_precision(truth, wrong, kind)["ap50"] < 20

    stretched = []
    # The same objects in an image of twice the width and three times the height.
    for i in range(len(truth["images"])):
        annotations = []
        for a in truth["annotations"]:
            if a["image_id"] == i:
                mask = coco.rle.decode(a["segmentation"]).repeat(3, 0).repeat(2, 1)
                annotations.append({k: v for k, v in a.items() if k not in ("id", "image_id")})
                annotations[-1]["bbox"] = (np.array(a["bbox"]) * [2, 3, 2, 3]).tolist()
                annotations[-1]["segmentation"], = coco.encode(mask[None])
        stretched.append({"image": {"width": 128, "height": 192}, "annotations": annotations})
    truth = make_truth(stretched, data.data.classes)
    found = vision.detections(task, (logits, other), truth["images"])
    assert coco.average_precision(truth, found, kind)["ap50"] == pytest.approx(100)


def test_evaluation_is_the_same_each_time_and_leaves_the_random_numbers_alone():
    data, model = build("segment")
    with Compute("cpu", "float32", 16) as compute:
        before = torch.get_rng_state()
        first = data.evaluate(model.eval(), compute)
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(99)
        assert data.evaluate(model, compute) == first


@pytest.mark.slow
def test_bfloat16(tmp_path, call):
    for task in TASKS:
        code, _, err = call(train_vision, task, *TINY, "--dtype=bfloat16", "--max_iters=1",
                            f"--out_dir={tmp_path / task}")
        assert code == 0, err


def test_training_moves_on_through_its_images():
    task, _ = build("classify")
    together, first, second = task.batch(0, 8)[0], task.batch(0, 4)[0], task.batch(4, 4)[0]
    assert torch.equal(together, torch.cat([first, second])) and not torch.equal(first, second)


@pytest.mark.slow
def test_two_processes(tmp_path, call):
    """They evaluate to the numbers of one, and take as many images; all parameters take part."""
    arguments = ["detect", *TINY, "--max_iters=1", "--precond=True"]
    torchrun(2, "train_vision.py", *arguments, f"--out_dir={tmp_path / 'two'}")
    assert call(train_vision, *arguments, f"--out_dir={tmp_path / 'one'}")[0] == 0
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    for name in ("val_loss", "val_ap", "val_ap50", "val_ap75"):
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-6)
    assert one[-1]["tokens"] == two[-1]["tokens"]


@pytest.mark.slow
def test_a_process_without_a_batch_to_evaluate_does_not_stop_the_other(tmp_path):
    """EoMT has buffers, of which DDP must not wait for a broadcast."""
    torchrun(2, "train_vision.py", "segment", *TINY, "--eval_iters=1", "--max_iters=1",
             f"--out_dir={tmp_path}")
    assert read_metrics(tmp_path)[-1]["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_small_model_learns_a_few_images(task):
    """Trained on the evaluated images: targets, loss and evaluation speak of the same things."""
    data, model = build(task, "--precond=True", "--precond_grad=True")
    batch = data.data.val.batch(range(8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with Compute("cpu", "float32", 16) as compute:
        before = data.evaluate(model.eval(), compute)
        for _ in range(100):
            data.loss(model.train(), *batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        after = data.evaluate(model.eval(), compute)
    assert after["val_loss"] < 0.6 * before["val_loss"]
    if task == "classify":
        assert after["val_accuracy"] == 1
    else:
        assert after["val_ap50"] > 40 > 10 > before["val_ap50"]


def test_presets_are_complete():
    for task in TASKS:
        preset = train_vision.preset_of_task([task])
        config = options.parse(train_vision.Config, preset, "")[0]
        assert config.task == task and config.out_dir == f"out-vision-{task}"
    config = options.parse(train_vision.Config, ["config/vision_detect.toml"], "")[0]
    assert config == train_vision.Config()


@pytest.mark.parametrize("arguments, words", [
    (["detct"], "unknown task 'detct': did you mean detect?"),
    (["detect", "--image_size=60"], "patch_size=8 does not divide image_size=60"),
    (["segment", "--query_blocks=3"], "query_blocks=3 must not exceed n_layer=2"),
    (["detect", "--source=nothere"], "nothere: there is nothing of that name"),
    (["classify", "--source=nothere"], "cifar-10-python.tar.gz (163 MiB) is at https://"),
    (["detect", "--learning_rate=1e30", "--warmup_iters=0", "--max_iters=4", "--grad_clip=0"],
     "the loss is not finite"),
    (["detect", "--precond_eps=-1"], "precond_eps=-1.0 must not be negative"),
    (["detect", "--precond=True", "--precond_power=inf"],
     "precond_power=inf must be a finite number"),
    (["detect", "--precond=True", "--precond_power=learned"],
     "--precond_power='learned' is not of type float"),
    (["classify", "--show=-1"], "show=-1 must not be negative"),
    (["classify", "--precond_powr=1"], "did you mean --precond_power?"),
])
def test_mistakes(arguments, words, tmp_path, call):
    task, *more = arguments
    assert words in error(call(train_vision, task, *TINY, "--max_iters=2", *more,
                               f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}"))


def test_a_coco_file_without_masks_is_one_line(tmp_path, call):
    from PIL import Image
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    content = {"images": [{"id": 1, "file_name": "0.png", "width": 40, "height": 30}],
               "categories": [{"id": 1, "name": "box"}],
               "annotations": [{"id": 5, "image_id": 1, "category_id": 1,
                                "bbox": [3, 4, 20, 10], "area": 200, "iscrowd": 0}]}
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    shared = [*TINY, f"--source={tmp_path}", f"--data_dir={tmp_path / 'data'}", "--max_iters=2"]
    message = error(call(train_vision, "segment", *shared, f"--out_dir={tmp_path / 'out'}"))
    assert "annotation 5 has no mask" in message and "use the detect task" in message
    drawn = call(train_vision, "detect", *shared, "--show=1", f"--out_dir={tmp_path / 'out'}")
    assert drawn[0] == 0

    content["annotations"] = [content["annotations"][0] | {"id": i} for i in range(7)]
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    shared[-2] = f"--data_dir={tmp_path / 'data2'}"
    out = call(train_vision, "detect", *shared, f"--out_dir={tmp_path / 'out2'}")[1]
    assert "1 of the validation images have more than queries=6 objects" in out
    content["annotations"] = [content["annotations"][0] | {"iscrowd": 1},
                              content["annotations"][1] | {"image_id": 2}]
    content["images"].append(content["images"][0] | {"id": 2})
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    shared[-2] = f"--data_dir={tmp_path / 'data3'}"
    few = ["--batch_size=1", "--eval_iters=1", f"--out_dir={tmp_path / 'out3'}"]
    message = error(call(train_vision, "detect", *shared, *few))
    assert "none of the 1 validation images that are evaluated has an object" in message


@pytest.mark.parametrize("package", ["transformers", "scipy"])
def test_missing_packages(package, tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = error(call(train_vision, "detect", *TINY, f"--out_dir={tmp_path / 'out'}"))
    assert f"vision models need {package}: pip install -r requirements-extra.txt" in message


def test_a_folder_that_was_moved_with_its_source_is_resumed(tmp_path, call, monkeypatch):
    from PIL import Image
    coco_folder.make(tmp_path / "before" / "coco")
    monkeypatch.chdir(tmp_path / "before")
    code, said, err = call(train_vision, "detect", *TINY, "--source=coco", "--out_dir=out",
                           "--max_iters=1", "--batch_size=2", "--eval_iters=1")
    assert code == 0 and "2 of 7 validation images evaluated" in said, err
    # As checkpoints were before: they knew the folder.
    saved = checkpoint.read(Path("out/ckpt.pt"))
    saved["task"]["source"] = str(Path("coco").resolve())
    checkpoint.save(Path("out/ckpt.pt"), saved)
    monkeypatch.chdir((tmp_path / "before").rename(tmp_path / "after"))
    again = "--init_from=resume", "--out_dir=out"
    code, said, err = call(train_vision, *again, "--max_iters=2")
    assert code == 0 and "step 2" in said, err
    Path("coco").rename("images")
    code, said, err = call(train_vision, *again, "--source=images", "--max_iters=3")
    assert code == 0 and "step 3" in said, err
    saved = checkpoint.read(Path("out/ckpt.pt"))
    sha256 = saved["task"].pop("sha256")
    checkpoint.save(Path("out/ckpt.pt"), saved)
    assert "the data is not what the run" in error(call(train_vision, *again, "--max_iters=4"))
    checkpoint.save(Path("out/ckpt.pt"), saved | {"task": saved["task"] | {"sha256": sha256}})
    Image.new("RGB", (80, 48), "red").save("images/train2017/0.png")
    shutil.rmtree("data")
    message = error(call(train_vision, *again, "--max_iters=4"))
    assert "the data is not what the run was trained on" in message


def test_predictions_that_cannot_be_drawn_are_one_line(tmp_path, call, monkeypatch):
    assert call(train_vision, "classify", *TINY, "--max_iters=1", f"--out_dir={tmp_path}")[0] == 0
    draw = ["--eval_only", "--show=1", f"--out_dir={tmp_path}"]
    (tmp_path / "val_0.png").mkdir()
    assert f"cannot write to {tmp_path}: Is a directory" in error(call(train_vision, *draw))
    monkeypatch.setitem(sys.modules, "PIL", None)
    code, out, err = call(train_vision, *draw)
    assert code == 2 and "val_loss" not in out  # before it evaluates
    assert "--show saves images with pillow: pip install -r requirements-extra.txt" in err


def test_other_data_on_resume_is_refused(tmp_path, call):
    assert call(train_vision, "classify", *TINY, "--max_iters=1", f"--out_dir={tmp_path}")[0] == 0
    resumed = call(train_vision, "--init_from=resume", "--n_val=9", f"--out_dir={tmp_path}")
    assert "--n_val=9 cannot change on resume" in error(resumed)
