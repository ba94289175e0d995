"""data/pathfinder.py, paddles.py: what is drawn, that the label tells nothing but the answer, and
the reader of released files."""

import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from data.lra_sources import read_metadata, read_png
from data.paddles import Geometry, make_stencils
from data.pathfinder import CHUNK, RELEASED, draw_scene, generate, next_paddle
from engine.options import DataError


@pytest.fixture(scope="module")
def images_and_labels():
    return generate(1200, seed=1, workers=2)


def scenes(n, size, margin):
    """The stencils, and (label, targets, distractors, discs) of n images; snakes as polylines."""
    rng, s = random.Random(0), make_stencils(RELEASED[size], margin)
    images = []
    for i in range(n):
        targets, distractors, discs = draw_scene(rng, s, i % 2)
        images.append((i % 2, [polyline(s, snake) for snake in targets],
                       [polyline(s, snake) for snake in distractors], place(s, discs)))
    return s, images


def place(s, pixels):
    return np.stack(np.divmod(pixels, s.width), -1).astype(float)


def polyline(s, snake):
    """Tails and heads in order: (2 * paddles, 2) as y, x."""
    return place(s, [pivot + end[k] for pivot, k in snake for end in (s.tails, s.heads)])


def cross(a, b):
    """Does any segment of polyline a properly cross one of polyline b?"""
    def side(p, q, r):  # of point r, seen along p -> q
        return np.sign((q - p)[..., 0] * (r - p)[..., 1] - (q - p)[..., 1] * (r - p)[..., 0])
    p, q, r, t = a[:-1, None], a[1:, None], b[None, :-1], b[None, 1:]
    return bool(((side(p, q, r) * side(p, q, t) < 0) & (side(r, t, p) * side(r, t, q) < 0)).any())


@pytest.mark.slow
def test_images_have_the_published_form(images_and_labels):
    images, labels = images_and_labels
    assert images.shape == (1200, 32, 32) and images.dtype == labels.dtype == np.uint8
    assert (images.max((1, 2)) == 255).all() and (images.min((1, 2)) == 0).all()
    # no paddle on the rim
    assert (images[:, [0, -1]] < 128).all() and (images[:, :, [0, -1]] < 128).all()
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / 1200**0.5
    assert len(np.unique(images, axis=0)) == 1200


@pytest.mark.slow
@pytest.mark.parametrize("size, margin, n", [(32, 1, 200), (128, 3, 8)])
def test_discs_mark_one_snake_or_two_and_snakes_keep_apart(size, margin, n):
    s, images = scenes(n, size, margin)
    radius = RELEASED[size].marker_radius
    for label, targets, distractors, (disc_0, disc_1) in images:
        start_of = [(disc_0 == target[0]).all() for target in targets]
        end_of = [(disc_1 == target[-1]).all() for target in targets]
        assert sum(start_of) == sum(end_of) == 1 and (start_of == end_of) == bool(label)
        assert [len(target) for target in targets] == [28, 28]
        assert {len(d) for d in distractors} <= {8}
        snakes = targets + distractors
        assert not any(cross(a, b) for i, a in enumerate(snakes) for b in snakes[:i + 1])
        for disc, marked in (disc_0, start_of.index(True)), (disc_1, end_of.index(True)):
            # a disc hides no part of a snake that it does not mark
            for snake in [targets[1 - marked], *distractors]:
                assert np.linalg.norm(snake - disc, axis=1).min() > radius + 1
    found = np.mean([len(distractors) for _, _, distractors, _ in images])
    assert found > 0.6 * RELEASED[size].distractors
    every = [target for _, targets, _, _ in images for target in targets]
    gaps = np.concatenate([np.linalg.norm(t[2::2] - t[1:-1:2], axis=1) for t in every])
    lengths = np.concatenate([np.linalg.norm(t[1::2] - t[::2], axis=1) for t in every])
    assert gaps.min() >= 1 and gaps.mean() == pytest.approx(2 * margin, abs=0.6)
    assert lengths.mean() == pytest.approx(RELEASED[size].paddle_length, abs=0.3)


def test_turns_follow_their_weights_where_nothing_is_in_the_way():
    s, rng = make_stencils(Geometry(continuity=1.5), 1), random.Random(0)
    middle = s.pixel(16, 16)
    heads = place(s, np.array(s.heads) + middle) - place(s, middle)
    ahead = heads / np.linalg.norm(heads, axis=1, keepdims=True)
    for k in 0, 5:
        angle = np.arccos(np.clip(ahead @ ahead[k], -1, 1))
        weight = np.cos(np.minimum(1.5 * angle, np.pi / 2)) ** 2
        drawn = [next_paddle(rng, s, s.empty, (middle, k))[1] for _ in range(4000)]
        share = np.bincount(drawn, minlength=len(heads)) / 4000
        assert np.abs(share - weight / weight.sum()).max() < 4 * 0.5 / 4000**0.5


@pytest.mark.slow
def test_discs_are_drawn_where_they_are_said_to_be(images_and_labels):
    images, labels = images_and_labels
    full = np.pad(images > 250, ((0, 0), (1, 1), (1, 1)))
    plus = (full[:, 1:-1, 1:-1] & full[:, :-2, 1:-1] & full[:, 2:, 1:-1]
            & full[:, 1:-1, :-2] & full[:, 1:-1, 2:])
    # the middle of a disc and its four neighbours are white, no paddle's are
    assert (plus.sum((1, 2)) == 2).all()


@pytest.mark.slow
def test_label_does_not_leak_into_pixel_statistics(images_and_labels):
    images, labels = images_and_labels
    flat = images.reshape(len(images), -1)
    bright = [(flat > level).mean(1) for level in (0, 32, 64, 128, 192, 254)]
    histogram = [(flat // 16 == bin).mean(1) for bin in range(16)]
    features = np.stack([flat.mean(1), *bright, *histogram], 1)
    features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    x, y = np.column_stack([features, np.ones(len(features))]), labels.astype(float)
    train, test = slice(0, 600), slice(600, 1200)
    weight = np.zeros(x.shape[1])
    for _ in range(500):  # logistic regression by gradient descent
        p = 1 / (1 + np.exp(-x[train] @ weight))
        weight -= 0.5 * (x[train].T @ (p - y[train]) / 600 + 1e-4 * weight)
    accuracy = ((x[test] @ weight > 0) == y[test]).mean()
    error = 0.5 / 600**0.5
    assert abs(accuracy - 0.5) < 4 * error, f"accuracy {accuracy:.3f} from pixel statistics"


@pytest.mark.slow
def test_same_images_for_any_number_of_workers():
    n, easy = CHUNK + 30, dict(contour_length=5, distractors=1)
    one, two, fewer = (generate(count, seed=3, workers=workers, **easy)
                       for count, workers in ((n, 1), (n, 2), (5, 1)))
    assert all((a == b).all() for a, b in zip(one, two))
    assert all((a[:5] == b).all() for a, b in zip(one, fewer))
    assert (generate(5, seed=4, workers=1, **easy)[0] != fewer[0]).any()


@pytest.mark.slow
def test_workers_start_from_a_script_that_runs_torch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from data.pathfinder import generate\n"
                      "if __name__ == '__main__':\n"
                      "    import torch\n"
                      "    torch.ones(500, 500) @ torch.ones(500, 500)\n"
                      "    images, _ = generate(300, seed=0, contour_length=4, distractors=0,\n"
                      "                         workers=2)\n"
                      "    print(images.shape)\n")
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); "
    code = path + f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "(300, 32, 32)", done.stderr


def die(*job):
    os._exit(9)


@pytest.mark.slow
def test_a_killed_worker_is_one_line(monkeypatch):
    monkeypatch.setattr("data.pathfinder._draw", die)
    with pytest.raises(DataError, match="a process that draws images was killed"):
        generate(300, seed=0, workers=2)


def test_path_x_and_easy_presets():
    images, labels = generate(2, size=128, seed=0, workers=1)
    assert images.shape == (2, 128, 128) and images.max() == 255
    for contour_length, distractors in (4, 0), (6, 2):
        images, _ = generate(40, seed=0, contour_length=contour_length, distractors=distractors,
                             workers=1)
        assert (images.max((1, 2)) == 255).all()
    assert generate(0, seed=0)[0].shape == (0, 32, 32)
    assert Geometry(contour_length=4).distractor_length == 1


@pytest.mark.parametrize("options, words", [
    (dict(size=28), "size is 28, needs more than 4 . seed_distance = 28"),
    (dict(contour_length=200), "no room for two contours of 200 paddles"),
    (dict(contour_length=1), "contour_length is 1, needs a whole number, at least 2"),
    (dict(contour_length="14"), "contour_length is '14'"),
    (dict(margin=[1, 0]), "margin is 0"),
    (dict(contrast=2), "contrast is 2, needs a number, at least 0.01, at most 1"),
    (dict(contrast=float("nan")), "contrast is nan, needs a number"),
    (dict(thickness=1e-320), "thickness is 1e-320, needs a number, at least 0.01"),
    (dict(size=2.5), "size is 2.5, needs a whole number"),
    (dict(paddle_length=10**6), "paddle_length is 1000000, needs a whole number, at least 1, at "),
    (dict(distractors=10**9), "distractors is 1000000000, needs a whole number, at least 0, at m"),
])
def test_impossible_geometry_is_one_line(options, words, monkeypatch):
    monkeypatch.setattr("data.pathfinder.TARGET_TRIES", 500)
    with pytest.raises(DataError, match=words) as error:
        generate(1, seed=0, workers=1, **options)
    assert "\n" not in str(error.value)


@pytest.fixture
def release(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pip install -r requirements-extra.txt")
    pictures, labels = generate(5, seed=0, workers=1)
    (tmp_path / "metadata").mkdir()
    for batch, numbers in (10, [3, 4]), (2, [0, 1, 2]):
        folder = tmp_path / "imgs" / str(batch)
        folder.mkdir(parents=True)
        lines = []
        for i in numbers:
            image.fromarray(pictures[i]).save(folder / f"sample_{i}.png")
            lines.append(f"imgs/{batch} sample_{i}.png {i} {labels[i]} 1.0 14 4 2 0.5 1 1\n")
        (tmp_path / "metadata" / f"{batch}.npy").write_text("".join(lines))
    return tmp_path, pictures, labels


def read_released(root):
    return [(read_png(path, 32**2), label) for path, label in read_metadata(root)]


def test_reads_the_release_in_numeric_order(release):
    root, pictures, labels = release
    read = read_released(root)
    assert [label for _, label in read] == list(labels)
    assert [image for image, _ in read] == [picture.tobytes() for picture in pictures]


def test_damaged_images_are_empty(release):
    root, pictures, _ = release
    files = sorted(root.glob("imgs/*/*.png"), key=lambda path: path.name)
    content = files[1].read_bytes()
    files[0].write_bytes(b"")
    files[1].write_bytes(content[:len(content) // 2])
    files[2].write_bytes(content[:60] + b"????" + content[64:])
    files[3].unlink()
    assert [image == b"" for image, _ in read_released(root)] == [True] * 4 + [False]
    os.mkfifo(files[3])  # a pipe is not waited for
    os.mkfifo(root / "metadata" / "3.npy")
    assert [image == b"" for image, _ in read_released(root)] == [True] * 4 + [False]


def test_wrong_layout_is_one_line(release, tmp_path):
    root, _, _ = release
    (root / "metadata" / "2.npy").write_text("imgs/2 sample_0.png 0 7\n")
    with pytest.raises(DataError, match="2.npy, line 1: .*label 0 or 1"):
        read_released(root)
    for file in root.glob("metadata/*.npy"):
        file.write_text("")
    with pytest.raises(DataError, match="no samples"):
        read_released(root)
    with pytest.raises(DataError, match="no samples in .*metadata: give the folder"):
        read_released(tmp_path / "imgs")


@pytest.mark.parametrize("name", ["/etc/passwd", "../../outside.png", "imgs/../../outside.png"])
def test_metadata_that_points_outside_is_refused(release, name):
    root, _, _ = release
    folder, _, file = name.rpartition("/")
    (root / "metadata" / "2.npy").write_text(f"{folder or '/'} {file} 0 1\n")
    with pytest.raises(DataError, match=f"2.npy, line 1: '{name}' is outside {root}"):
        read_metadata(root)


def test_images_of_another_kind_are_refused(release):
    root, pictures, _ = release
    from PIL import Image
    path = root / "image.png"
    Image.fromarray(pictures[0]).convert("RGBA").save(path)
    assert read_png(path, 32**2) == pictures[0].tobytes()
    with pytest.raises(DataError, match="image.png has 32 x 32 pixels, mode RGBA, expected 256"):
        read_png(path, 16**2)
    Image.fromarray(pictures[0].astype(np.uint16) * 257).save(path)  # convert("L") whitens these
    with pytest.raises(DataError, match="mode I;16, expected 1024 pixels of 8 bits"):
        read_png(path, 32**2)
    Image.fromarray(pictures[0]).save(path, "bmp")  # by name a PNG
    assert read_png(path, 32**2) == b""
    header = b"IHDR" + struct.pack(">IIBBBBB", 10**5, 10**5, 8, 0, 0, 0, 0)  # 10 GB of pixels
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + checked)
    assert read_png(path, 32**2) == b""


def test_pillow_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match="pip install -r requirements-extra.txt"):
        read_png(Path("anywhere"), 32**2)
