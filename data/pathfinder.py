"""Pathfinder: do two discs lie on the same dashed curve? A generator, and a reader of the released files.

An image holds two long snakes of dashes ("paddles"), some short distractor snakes, and two discs. One disc marks the start of a target
snake; the other the far end of the same snake (label 1) or of the other one (label 0). Task: Linsley et al. 2018, "Learning long-range
spatial dependencies with horizontal gated recurrent units", as used by Long Range Arena (Tay et al. 2020) at 32 x 32 (Pathfinder) and
128 x 128 (Path-X).

    images, labels = generate(160_000, seed=1)                                # Pathfinder: (n, 32, 32) uint8, (n,) uint8
    images, labels = generate(1000, size=128, seed=1)                         # Path-X
    images, labels = generate(1000, contour_length=5, distractors=1, seed=1)  # easy enough for a laptop
    for image, label in read_released("pathfinder32/curv_contour_length_14"): ...

How a snake grows. A paddle turns about its pivot, the middle of the gap before it. Its head is one of the K pixels on the circle of
radius paddle_length + margin around the pivot, so K drawings of a paddle, made once, draw every image. A head that turns by dtheta has
the weight cos^2(min(continuity * dtheta, pi / 2)), or 0 in the halo: what other paddles cover when fattened by 2 * margin. A paddle that,
fattened by margin, meets another one so fattened is drawn again, up to 3 times. The next pivot lies paddle_length + 2 * margin further
along the paddle. The two targets grow in turns; if one gets stuck, both start again.

The original tests overlap on antialiased masks with some tolerance, and not against the other target's newest paddle, so that targets
cross now and then, and a disc may hide a piece of the snake that it does not mark. Here neither happens: no label rests on what is hidden.
"""
import math
import multiprocessing
import os
import random
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from engine.options import DataError

CHUNK = 100  # images that a worker draws at a time
PADDLE_TRIES = 3
DISTRACTOR_TRIES = 100  # for each distractor; most begin on a pixel that is taken and cost nothing
TARGET_TRIES = 50_000  # for each image


@dataclass(frozen=True)
class Geometry:
    """What one task looks like; lengths in pixels. The defaults are those of the released Pathfinder-32."""
    size: int = 32
    contour_length: int = 14  # paddles in each of the two target snakes
    distractors: int = 5  # short snakes, at most: one that finds no room is left out
    distractor_length: int = 0  # paddles; 0: contour_length // 3
    paddle_length: int = 2
    thickness: float = 0.5
    margin: int | tuple[int, ...] = 1  # half the gap between paddles; of several, each image draws one
    continuity: float = 1.0  # higher is straighter
    seed_distance: int = 7  # between the starts of the two targets
    marker_radius: float = 1.5
    contrast: float = 0.75  # brightness of the targets, where a disc has 1
    distractor_contrast: float = 1.0
    antialias: int = 2  # strokes are drawn this many times finer

    def __post_init__(self):
        object.__setattr__(self, "margin", tuple(np.atleast_1d(self.margin).tolist()))
        least = dict(size=1, contour_length=2, distractors=0, distractor_length=0, paddle_length=1, margin=1, seed_distance=1, antialias=1)
        for name, bound in least.items():
            for value in self.margin if name == "margin" else [getattr(self, name)]:
                if not isinstance(value, int) or value < bound:
                    raise DataError(f"pathfinder: {name} is {value!r}, needs a whole number, at least {bound}")
        for name in "thickness", "continuity", "marker_radius", "contrast", "distractor_contrast":
            value, most = getattr(self, name), 1 if "contrast" in name else self.size
            if not isinstance(value, (int, float)) or not 0 < value <= most:
                raise DataError(f"pathfinder: {name} is {value!r}, needs a number above 0, at most {most}")
        if self.size <= 4 * self.seed_distance:
            raise DataError(f"pathfinder: size is {self.size}, needs more than 4 * seed_distance = {4 * self.seed_distance}")
        object.__setattr__(self, "distractor_length", self.distractor_length or self.contour_length // 3 or 1)


# Parameters of the released files, as Long Range Arena's data builder documents them.
RELEASED = {
    32: Geometry(),
    128: Geometry(size=128, distractors=8, paddle_length=5, thickness=1.5, margin=(2, 3), continuity=1.8, seed_distance=20,
                  marker_radius=3, contrast=0.9, distractor_contrast=0.9),
}


def generate(n: int, *, size: int = 32, seed: int, workers: int | None = None, progress: bool = True,
             **geometry) -> tuple[np.ndarray, np.ndarray]:
    """n images (n, size, size) uint8 and their labels (n,) uint8, a fair coin each. Image i depends on i, seed, size and geometry alone.

    geometry: fields of Geometry that differ from the released task of this size (from Pathfinder-32's for sizes without one).
    workers: processes, None for one per core; more than one are spawned, so a script that calls this needs its __main__ guard.
    Raises DataError where the geometry is impossible.
    """
    known = Geometry.__dataclass_fields__
    for name in geometry:
        if name not in known:
            raise DataError(f"pathfinder: unknown option {name}; take one of {', '.join(known)}")
    geometry = replace(RELEASED.get(size, Geometry()), size=size, **{"distractor_length": 0, **geometry})
    jobs = [(geometry, seed, range(first, min(first + CHUNK, n))) for first in range(0, n, CHUNK)]
    images, labels = np.empty((n, size, size), np.uint8), np.empty(n, np.uint8)
    workers = min(workers or os.cpu_count() or 1, len(jobs))

    # spawn, because forking a process that runs torch's threads may hang
    with (ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else nullcontext() as pool,
          tqdm(total=n, desc="pathfinder", unit="image", disable=None if progress else True) as bar):
        for (_, _, indices), chunk in zip(jobs, (pool.map if pool else map)(_draw_chunk, jobs)):
            images[indices.start:indices.stop], labels[indices.start:indices.stop] = chunk
            bar.update(len(indices))
    return images, labels


def _draw_chunk(job: tuple[Geometry, int, range]) -> tuple[np.ndarray, list[int]]:
    """(geometry, seed, indices) -> images (len(indices), size, size) uint8 and their labels."""
    geometry, seed, indices = job
    images, labels = [], []
    for i in indices:
        rng = random.Random(f"{seed} {i}")
        label = rng.getrandbits(1)
        s = shapes(geometry, rng.choice(geometry.margin))
        images.append(render(s, geometry, *draw_scene(rng, s, geometry, label)))
        labels.append(label)
    return np.stack(images), labels


# A pixel (y, x) of the padded image is the integer y * width + x, and a set of pixels is an integer with those bits set: whether a paddle
# meets another one is then a shift and an `&`. A paddle is (pivot, k): a pixel, and which of the K directions it has.
Paddle = tuple[int, int]
Snake = list[Paddle]
Field = tuple[int, int]  # what is taken, each a set of pixels: mask (paddles fattened by margin) and halo (by 2 * margin)


class Shapes(NamedTuple):
    """The K paddles, relative to their pivots. Drawings are arrays (side, side), side = 2 * reach + 1, with the pivot in the middle; the
    sets of pixels that go with them have bit 0 at the drawing's first corner."""
    heads: list[int]
    tails: list[int]
    steps: list[int]  # to the next pivot
    turns: list[list[tuple[int, int, float]]]  # for each paddle those that may follow: k, its head from the corner, its weight
    lines: np.ndarray  # (K, side, side) brightness
    masks: list[int]
    halos: list[int]
    disc: np.ndarray  # (side, side) brightness
    clearing: int  # what a disc keeps free of distractors
    square: int  # all pixels of a drawing
    empty: Field  # an image without paddles: its outermost pixels, and all beyond, are taken
    reach: int
    pad: int  # images are padded by this, so that no drawing is cut
    width: int  # of the padded image

    def pixel(self, y: int, x: int) -> int:
        return (y + self.pad) * self.width + x + self.pad

    def corner(self, pixel: int) -> int:
        """The first corner of a drawing that has this pixel in the middle."""
        return pixel - self.reach * (self.width + 1)

    def ends(self, snake: Snake) -> tuple[int, int]:
        """The pixels of the first tail and the last head."""
        (first, i), (last, j) = snake[0], snake[-1]
        return first + self.tails[i], last + self.heads[j]


@lru_cache
def shapes(geometry: Geometry, margin: int) -> Shapes:
    """Every paddle that this geometry allows. One thinner than a pixel is brightened by 1 / thickness."""
    length, thickness = geometry.paddle_length, geometry.thickness
    radius = length + margin
    around = np.indices((2 * radius + 1, 2 * radius + 1)).reshape(2, -1).T - radius
    nearest, farthest = (np.hypot(*np.abs(around + side * np.sign(around) / 2).T) for side in (-1, 1))
    heads = around[(nearest < radius) & (radius < farthest)]  # (K, 2), as y, x: the pixels that the circle passes through
    ahead = heads / np.linalg.norm(heads, axis=1, keepdims=True)
    tails = heads - length * ahead
    dtheta = np.arccos(np.clip(ahead @ ahead.T, -1, 1))
    weights = np.cos(np.minimum(geometry.continuity * dtheta, math.pi / 2)) ** 2

    reach = max(radius + math.ceil(thickness), math.ceil(geometry.marker_radius)) + 2 * margin
    pad = reach + margin + 1
    width = geometry.size + 2 * pad

    def draw(fat: int) -> list[np.ndarray]:
        return [stroke(tail, head, thickness + 2 * fat, reach, geometry.antialias) for tail, head in zip(tails, heads)]

    def disc(fat: int) -> np.ndarray:
        return stroke((0, 0), (0, 0), 2 * (geometry.marker_radius + fat), reach, geometry.antialias)

    def pixels(offsets: np.ndarray) -> list[int]:
        return (np.rint(offsets).astype(int) @ [width, 1]).tolist()

    def pixel_set(drawing: np.ndarray) -> int:
        return sum(1 << y * width + x for y, x in np.argwhere(drawing >= 0.5).tolist())

    def rim(inner: int) -> int:
        return pixel_set(np.pad(np.zeros((width - 2 * inner,) * 2), inner, constant_values=1))

    from_corner = pixels(heads + reach)
    return Shapes(
        heads=pixels(heads), tails=pixels(tails), steps=pixels((length + 2 * margin) * ahead),
        turns=[[(k, from_corner[k], weight) for k, weight in enumerate(row) if weight > 1e-4] for row in weights.tolist()],
        lines=np.clip(np.stack(draw(0)) * max(1, 1 / thickness), 0, 1),
        masks=[pixel_set(paddle) for paddle in draw(margin)], halos=[pixel_set(paddle) for paddle in draw(2 * margin)],
        disc=disc(0), clearing=pixel_set(disc(margin)), square=(1 << (2 * reach + 1) * width) - 1,
        empty=(rim(pad + 1), rim(pad + 1 + margin)), reach=reach, pad=pad, width=width)


def stroke(tail, head, thickness: float, reach: int, antialias: int) -> np.ndarray:
    """A line with round ends between two points (y, x) from the centre: (2 * reach + 1, 2 * reach + 1) float32 in [0, 1].
    Drawn `antialias` times finer and reduced with a Lanczos-3 filter."""
    coarse = np.arange(-reach, reach + 1)
    fine = (np.arange(len(coarse) * antialias) + 0.5) / antialias - 0.5 - reach
    y, x = np.meshgrid(fine - tail[0], fine - tail[1], indexing="ij")
    dy, dx = head[0] - tail[0], head[1] - tail[1]
    along = np.clip((y * dy + x * dx) / max(dy * dy + dx * dx, 1e-9), 0, 1)
    distance = np.hypot(y - along * dy, x - along * dx)
    ink = np.clip((thickness / 2 - distance) * antialias + 0.5, 0, 1)
    away = coarse[:, None] - fine
    lanczos = np.where(abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0)
    lanczos /= lanczos.sum(1, keepdims=True)
    return np.clip(lanczos @ ink @ lanczos.T, 0, 1).astype(np.float32)


def draw_scene(rng: random.Random, s: Shapes, geometry: Geometry, label: int) -> tuple[list[Snake], list[Snake], tuple[int, int]]:
    """What one image shows: two targets, the distractors that found room, and the pixels that the discs mark. The label only decides
    which ends are marked, so nothing else can tell it. Raises DataError where the targets find no room."""
    grown = next(filter(None, (two_targets(rng, s, geometry) for _ in range(TARGET_TRIES))), None)
    if not grown:
        raise DataError(f"pathfinder: no room for two contours of {geometry.contour_length} paddles at size {geometry.size} in "
                        f"{TARGET_TRIES} tries; take a smaller contour_length or a larger size")
    targets, (mask, halo) = grown
    ends = [s.ends(snake) for snake in targets]
    for tip in sum(ends, ()):  # all four, so that the label changes nothing
        clearing = s.clearing << s.corner(tip)
        mask, halo = mask | clearing, halo | clearing
    distractors = []
    for _ in range(geometry.distractors):
        for _ in range(DISTRACTOR_TRIES):
            if grown := distractor(rng, s, geometry, (mask, halo)):
                snake, (mask, halo) = grown
                distractors.append(snake)
                break
    marked = rng.getrandbits(1)
    return targets, distractors, (ends[marked][0], ends[marked if label else 1 - marked][1])


def two_targets(rng: random.Random, s: Shapes, geometry: Geometry) -> tuple[list[Snake], Field] | None:
    """Two snakes and what they take; None if one gets stuck, or if a disc at one's end would touch the other."""
    distance = geometry.seed_distance
    y, x = (rng.randrange(2 * distance, geometry.size - 2 * distance) for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)
    first = first_paddle(rng, s, s.empty, s.pixel(y, x))
    second = first and first_paddle(rng, s, occupy(s, s.empty, first),
                                    s.pixel(y + round(distance * math.sin(angle)), x + round(distance * math.cos(angle))))
    if not second:
        return None
    snakes, field = [[first], [second]], s.empty  # the field lacks the last paddle of both: a next one may touch its own
    for _ in range(geometry.contour_length - 1):
        for me in 0, 1:
            last = snakes[me][-1]
            paddle = next_paddle(rng, s, occupy(s, field, snakes[1 - me][-1]), last)
            if not paddle:
                return None
            field = occupy(s, field, last)
            snakes[me].append(paddle)
    if not discs_are_clear(s, snakes, geometry.marker_radius):
        return None
    return snakes, occupy(s, occupy(s, field, snakes[0][-1]), snakes[1][-1])


def distractor(rng: random.Random, s: Shapes, geometry: Geometry, field: Field) -> tuple[Snake, Field] | None:
    """A short snake from a random pixel, and what is taken with it; None if it finds no room."""
    tail = s.pixel(rng.randrange(geometry.size), rng.randrange(geometry.size))
    paddle = None if field[1] >> tail & 1 else first_paddle(rng, s, field, tail)
    snake = []
    while paddle:
        snake.append(paddle)
        if len(snake) == geometry.distractor_length:
            return snake, occupy(s, field, paddle)
        paddle, field = next_paddle(rng, s, field, paddle), occupy(s, field, paddle)
    return None


def first_paddle(rng: random.Random, s: Shapes, field: Field, tail: int) -> Paddle | None:
    """A paddle of random direction that begins at this pixel, if it fits."""
    k = rng.randrange(len(s.heads))
    pivot = tail - s.tails[k]
    return None if field[0] & s.masks[k] << s.corner(pivot) else (pivot, k)


def next_paddle(rng: random.Random, s: Shapes, field: Field, last: Paddle) -> Paddle | None:
    """A paddle that continues a snake, if one is found. The field is what is in the way, without the last paddle itself."""
    mask, halo = field
    pivot = last[0] + s.steps[last[1]]
    corner = s.corner(pivot)
    near = halo >> corner & s.square
    free = {k: weight for k, head, weight in s.turns[last[1]] if not near >> head & 1}
    for k in rng.choices(list(free), list(free.values()), k=PADDLE_TRIES) if free else ():
        if not mask & s.masks[k] << corner:
            return pivot, k
    return None


def occupy(s: Shapes, field: Field, paddle: Paddle) -> Field:
    """The field with one more paddle."""
    corner, k = s.corner(paddle[0]), paddle[1]
    return field[0] | s.masks[k] << corner, field[1] | s.halos[k] << corner


def discs_are_clear(s: Shapes, snakes: list[Snake], radius: float) -> bool:
    """Whichever ends of the two snakes are marked: the discs do not merge, and none touches the snake it does not mark."""
    def points(pixels) -> np.ndarray:
        return np.stack(np.divmod(pixels, s.width), -1)

    ends = points([s.ends(snake) for snake in snakes])  # (snake, start or end, 2)
    bodies = points([[pivot + end[k] for pivot, k in snake for end in (s.tails, s.heads)] for snake in snakes])
    apart = np.linalg.norm(ends[:, None, 0] - ends[None, :, 1], axis=-1).min()
    free = np.linalg.norm(ends[:, :, None] - bodies[::-1, None], axis=-1).min()
    return bool(apart >= 2 * radius + 2 and free >= radius + 1.5)


def render(s: Shapes, geometry: Geometry, targets: list[Snake], distractors: list[Snake], discs: tuple[int, int]) -> np.ndarray:
    """Paddles and discs, merged by maximum, as (size, size) uint8; the middle of a disc has 255."""
    canvas = np.zeros((s.width, s.width), np.float32)

    def stamp(pixel: int, drawing: np.ndarray):
        y, x = divmod(s.corner(pixel), s.width)
        window = canvas[y:y + len(drawing), x:x + len(drawing)]
        np.maximum(window, drawing, out=window)

    for snakes, contrast in (targets, geometry.contrast), (distractors, geometry.distractor_contrast):
        for pivot, k in sum(snakes, []):
            stamp(pivot, contrast * s.lines[k])
    for tip in discs:
        stamp(tip, s.disc)
    return np.rint(255 * canvas[s.pad:-s.pad, s.pad:-s.pad]).astype(np.uint8)


def read_released(root: str | Path) -> Iterator[tuple[np.ndarray | None, int]]:
    """(image (size, size) uint8, label) of each sample of a released folder (pathfinder32/curv_contour_length_14), in the order of its
    metadata. The image is None where the PNG is missing, empty or broken (one released file is), for the caller to skip and count.
    Needs pillow. Raises DataError when the folder's layout or a label is wrong.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DataError("reading Pathfinder's PNGs needs pillow: pip install -r requirements-extra.txt") from None
    root = Path(root)
    for part in "metadata", "imgs":
        if not (root / part).is_dir():
            raise DataError(f"no folder {root / part}: give the folder that holds imgs and metadata, such as "
                            "pathfinder32/curv_contour_length_14")
    samples = []
    for file in sorted((root / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem)):
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            columns = line.split()  # folder, file, index, label, ...
            if len(columns) < 4 or columns[3] not in ("0", "1"):
                raise DataError(f"{file}, line {number}: expected folder, file, index and a label 0 or 1, got {line[:60]!r}; "
                                "take the plain-text metadata of the release")
            samples.append((root / columns[0] / columns[1], int(columns[3])))
    if not samples:
        raise DataError(f"no samples in {root / 'metadata'}: unpack the release again")

    def read(path: Path) -> np.ndarray | None:
        try:
            with Image.open(path) as image:
                return np.array(image.convert("L"))
        except (OSError, SyntaxError, ValueError, zlib.error):  # what pillow raises for a damaged PNG
            return None

    return ((read(path), label) for path, label in samples)
