"""Generated images for classification, detection and instance segmentation: textured shapes that overlap on a textured ground.

    python data/shapes.py --out=shapes.png       # a sheet of samples

A sample is a pure function of (seed, index). Its 1 to `max_objects` shapes differ in class, size, rotation, colours and texture, are
painted one over another, and keep at least VISIBLE of their area; masks and boxes are those of the visible part, as annotators draw
them. Shapes are brighter than the ground and turned little, which a small model needs to learn them in the minutes of a default run;
no colour and no texture tells a class.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
VISIBLE = 0.5  # least share of a shape's area that later shapes leave
BRIGHT = 130  # least mean of a shape's colour, in grey levels; the ground has at most DARK, but for its gradient and texture
DARK = 70
TURN = np.pi / 8  # most rotation, either way
NOISE = 6  # grey levels, uniform, on every pixel


def sample(seed: int, index: int, size: int = 64, max_objects: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> image (size, size, 3) uint8; labels (n,) int64 into CLASSES; masks (n, size, size) bool, disjoint and not empty; n >= 1."""
    rng = np.random.default_rng([seed, index])
    y, x = np.mgrid[:size, :size].astype(np.float32)
    ground = rng.uniform(20, DARK) + rng.uniform(-15, 15, 3).astype(np.float32)
    slope = rng.uniform(-30, 30, (2, 1, 1)).astype(np.float32) / size
    ramp = np.arange(size, dtype=np.float32) - np.float32(size / 2)
    image = (ground[:, None] + slope[0] * ramp)[:, None, :] + (slope[1] * ramp)[:, :, None]  # (3, size, size)
    if rng.random() < 0.5:
        image += np.float32(rng.uniform(-25, 25)) * _texture(rng, x, y, size)
    labels, masks, areas = [], [], []
    wanted = rng.integers(1, max_objects + 1)
    for _ in range(3 * max_objects):  # attempts: a crowded image may end up with fewer
        if len(labels) == wanted:
            break
        radius = size * rng.uniform(0.18, 0.32)
        centre = rng.uniform(0.8 * radius, size - 0.8 * radius, 2)  # may stick out of the image a little
        turn, label = rng.uniform(-TURN, TURN), int(rng.integers(len(CLASSES)))
        low, high = np.maximum(centre - 1.2 * radius, 0).astype(int), np.minimum(centre + 1.2 * radius + 1, size).astype(int)
        window = np.s_[low[1]:high[1], low[0]:high[0]]  # all of the shape is in it
        right, down = (x[window] - np.float32(centre[0])) / np.float32(radius), (y[window] - np.float32(centre[1])) / np.float32(radius)
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        u, v = right * cos + down * sin, down * cos - right * sin
        inside = _inside(CLASSES[label], u, v)
        left = [m[window] & ~inside for m in masks]
        lost = [np.count_nonzero(m[window]) - np.count_nonzero(rest) for m, rest in zip(masks, left)]
        if not inside.any() or any(np.count_nonzero(m) - n < VISIBLE * area for m, n, area in zip(masks, lost, areas)):
            continue
        for m, rest in zip(masks, left):
            m[window] = rest
        labels.append(label)
        masks.append(np.zeros((size, size), bool))
        masks[-1][window] = inside
        areas.append(np.count_nonzero(inside))
        light = _colour(rng)[:, None]
        spot = image[:, *window]
        spot[:, inside] = np.where(_texture(rng, u, v, 2)[inside], light, np.float32(rng.uniform(0.8, 0.95)) * light)
    image += np.float32(2 * NOISE) * (rng.random(image.shape, np.float32) - np.float32(0.5))
    return image.clip(0, 255, out=image).astype(np.uint8).transpose(1, 2, 0), np.array(labels), np.stack(masks)


def _colour(rng) -> np.ndarray:
    while True:
        colour = rng.uniform(20, 255, 3).astype(np.float32)
        if colour.mean() >= BRIGHT:
            return colour


def _texture(rng, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    """A bool pattern over coordinates u, v: plain, stripes, checks or dots, two to four periods in `period`."""
    kind, k = rng.integers(4), np.float32(2 * np.pi * rng.uniform(2, 4) / period)
    if kind == 0:
        return np.zeros(u.shape, bool)
    if kind == 1:
        return np.sin(k * u) > 0
    if kind == 2:
        return (np.sin(k * u) > 0) ^ (np.sin(k * v) > 0)
    return np.cos(k * u) + np.cos(k * v) > 0.8


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where (u, v), in units of the radius, is inside the shape. The areas differ by less than a factor of two."""
    if name == "circle":
        return u * u + v * v < 0.75
    if name == "square":
        return np.maximum(abs(u), abs(v)) < 0.78
    if name == "triangle":
        return np.maximum(-v, abs(u) * np.float32(3**0.5 / 2) + v / 2) < 0.6
    if name == "ring":
        return abs(u * u + v * v - 0.64) < 0.36
    if name == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 1)
    angle = np.arctan2(u, v) * np.float32(5 / (2 * np.pi))  # star: five arms, an edge from each tip to the notch beside it
    off = 2 * abs(angle - np.round(angle))
    return np.hypot(u, v) * (1 + 1.2 * off) < 1.1


def main():
    parser = argparse.ArgumentParser(description="Draw a sheet of generated images.")
    parser.add_argument("--out", default="shapes.png", help="PNG to write (default: shapes.png)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        from PIL import Image
    except ImportError:
        sys.exit("drawing needs pillow: pip install -r requirements-extra.txt")
    rows = [np.concatenate([sample(options.seed, 8 * row + column)[0] for column in range(8)], 1) for row in range(6)]
    Image.fromarray(np.concatenate(rows)).resize((1024, 768), Image.Resampling.NEAREST).save(Path(options.out))


if __name__ == "__main__":
    main()
