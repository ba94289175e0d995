"""The generated images: reproducible, within their bounds, with masks of what is seen."""
import numpy as np
import pytest

from data import shapes

SAMPLES = [shapes.sample(3, i) for i in range(300)]


def test_a_sample_depends_on_seed_and_index_alone():
    for i in (0, 17):
        again = shapes.sample(3, i)
        assert all(np.array_equal(a, b) for a, b in zip(again, SAMPLES[i]))
    assert not np.array_equal(shapes.sample(4, 17)[0], SAMPLES[17][0])
    assert len({image.tobytes() for image, *_ in SAMPLES}) == len(SAMPLES)


@pytest.mark.parametrize("size, most", [(64, 4), (32, 2), (48, 9)])
def test_forms_and_bounds(size, most):
    counts = set()
    for i in range(60):
        image, labels, masks = shapes.sample(1, i, size, most)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert masks.shape == (len(labels), size, size) and masks.dtype == bool
        # What is seen of each: nothing twice.
        assert masks.any(axis=(1, 2)).all() and masks.sum(axis=0).max() == 1
        assert labels.dtype == np.int64 and set(labels) <= set(range(len(shapes.CLASSES)))
        counts.add(len(labels))
    assert max(counts) <= most and {1, 2} <= counts


def test_every_class_and_every_number():
    labels = np.concatenate([labels for _, labels, _ in SAMPLES])
    share = np.bincount(labels, minlength=len(shapes.CLASSES)) / len(labels)
    assert (abs(share - 1 / len(shapes.CLASSES)) < 0.05).all()
    assert min(np.bincount([len(labels) for _, labels, _ in SAMPLES])[1:]) > 30  # 1 to 3 shapes


def test_masks_are_the_shapes():
    """A mask differs from its surroundings in the image: moved by half the image, it does not."""
    def contrast(image, mask):
        ring = np.zeros_like(mask)
        y, x = np.nonzero(mask)
        ring[max(y.min() - 2, 0):y.max() + 3, max(x.min() - 2, 0):x.max() + 3] = True
        ring &= ~mask
        return np.linalg.norm(image[mask].mean(axis=0) - image[ring].mean(axis=0))
    alone = [(image.astype(float), masks[0]) for image, _, masks in SAMPLES if len(masks) == 1]
    true = np.median([contrast(*sample) for sample in alone])
    moved = np.median([contrast(image, np.roll(mask, 32, axis=(0, 1))) for image, mask in alone])
    assert true > 150 and moved < 40


def test_areas_of_the_classes_are_alike():
    """No class is told by its size: at one radius the areas are within a factor of two."""
    y, x = np.mgrid[-1.2:1.2:200j, -1.2:1.2:200j].astype(np.float32)
    areas = [shapes._inside(name, x, y).mean() for name in shapes.CLASSES]
    assert max(areas) < 2 * min(areas)
    for name in shapes.CLASSES:
        # The window that is painted holds all of it.
        assert not shapes._inside(name, x, y)[np.hypot(x, y) > 1.2].any()


def test_colours_do_not_tell_the_class():
    means = np.array([image[mask].mean(axis=0) for image, _, masks in SAMPLES for mask in masks])
    labels = np.concatenate([labels for _, labels, _ in SAMPLES])
    for k in range(len(shapes.CLASSES)):
        difference = means[labels == k].mean(axis=0) - means[labels != k].mean(axis=0)
        assert (abs(difference) < 4 * means.std(axis=0) / np.sqrt((labels == k).sum())).all()
