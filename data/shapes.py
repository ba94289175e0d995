"""Generated images for classification, detection and segmentation: textured shapes that overlap.

    image, labels, masks = sample(seed=1, index=0)

A sample is a pure function of (seed, index). Its 1 to `max_objects` shapes differ in class, size,
rotation, colours and texture. They are painted one over another, and each keeps at least VISIBLE of
its area; masks and boxes are those of the visible part, as annotators draw them. Shapes are
brighter than the ground and turned little, which a small model needs to learn them in the minutes
of a default run. No colour and no texture tells a class.
"""
import numpy as np

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
VISIBLE = 0.5  # least share of a shape's area that later shapes leave
BRIGHT = 130  # least mean of a shape's colour, in grey levels
DARK = 70  # most grey of the ground, before its gradient and texture
TURN = np.pi / 8  # most rotation, either way
NOISE = 6  # grey levels, uniform, on every pixel


def sample(seed: int, index: int, size: int = 64, max_objects: int = 3) -> tuple[np.ndarray, ...]:
    """-> image, labels, masks of n >= 1 shapes.

    image: (size, size, 3) uint8. labels: (n,) int64 into CLASSES. masks: (n, size, size) bool,
    disjoint, none empty.
    """
    rng = np.random.default_rng([seed, index])
    y, x = np.mgrid[:size, :size].astype(np.float32)
    image = _ground(rng, x, y)  # (3, size, size) float32
    labels, masks, areas = [], [], []
    wanted = rng.integers(1, max_objects + 1)
    for _ in range(3 * max_objects):  # attempts: a crowded image may end up with fewer shapes
        if len(labels) == wanted:
            break
        radius = size * rng.uniform(0.18, 0.32)
        centre = rng.uniform(0.8 * radius, size - 0.8 * radius, 2)  # may stick out a little
        turn = rng.uniform(-TURN, TURN)
        label = int(rng.integers(len(CLASSES)))
        # The shape's own coordinates: from its centre, in units of its radius, turned with it.
        right = (x - float(centre[0])) / radius
        down = (y - float(centre[1])) / radius
        cos = np.float32(np.cos(turn))
        sin = np.float32(np.sin(turn))
        u = right * cos + down * sin
        v = down * cos - right * sin
        inside = _inside(CLASSES[label], u, v)
        left = [m & ~inside for m in masks]
        hidden = any(m.sum() < VISIBLE * area for m, area in zip(left, areas))
        if hidden or not inside.any():
            continue
        masks = [*left, inside]
        labels.append(label)
        areas.append(inside.sum())
        light = _colour(rng)[:, None]
        pattern = _texture(rng, u, v, 2)[inside]
        dim = rng.uniform(0.8, 0.95) * light
        image[:, inside] = np.where(pattern, light, dim)
    image += 2 * NOISE * (rng.random(image.shape, np.float32) - 0.5)
    pixels = image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return pixels, np.array(labels), np.stack(masks)


def _ground(rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A dark colour with a gradient, half the time with a texture too: (3, size, size) float32."""
    size = len(x)
    colour = rng.uniform(20, DARK) + rng.uniform(-15, 15, 3).astype(np.float32)
    slope = rng.uniform(-30, 30, (2, 1, 1)).astype(np.float32) / size
    ramp = np.arange(size, dtype=np.float32) - size / 2
    across = colour[:, None] + slope[0] * ramp  # (3, size)
    down = slope[1] * ramp
    image = across[:, None, :] + down[:, :, None]
    if rng.random() < 0.5:
        image += np.float32(rng.uniform(-25, 25)) * _texture(rng, x, y, size)
    return image


def _colour(rng) -> np.ndarray:
    while True:
        colour = rng.uniform(20, 255, 3).astype(np.float32)
        if colour.mean() >= BRIGHT:
            return colour


def _texture(rng, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    """A bool pattern over u, v: plain, stripes, checks or dots, 2 to 4 periods in `period`."""
    kind = rng.integers(4)
    k = 2 * np.pi * rng.uniform(2, 4) / period
    if kind == 0:
        return np.zeros(u.shape, bool)
    if kind == 1:
        return np.sin(k * u) > 0
    if kind == 2:
        return (np.sin(k * u) > 0) ^ (np.sin(k * v) > 0)
    return np.cos(k * u) + np.cos(k * v) > 0.8


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where (u, v), in units of the radius, is inside the shape.

    The areas differ by less than a factor of two.
    """
    if name == "circle":
        return u * u + v * v < 0.75
    if name == "square":
        return np.maximum(abs(u), abs(v)) < 0.78
    if name == "triangle":
        return np.maximum(-v, abs(u) * (3**0.5 / 2) + v / 2) < 0.6
    if name == "ring":
        return abs(u * u + v * v - 0.64) < 0.36
    if name == "cross":
        near, far = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
        return (near < 0.28) & (far < 1)
    # A star has five arms, with an edge from each tip (away = 0) to the notch beside it (away = 1).
    angle = np.arctan2(u, v) * (5 / (2 * np.pi))
    away = 2 * abs(angle - np.round(angle))
    return np.hypot(u, v) * (1 + 1.2 * away) < 1.1
