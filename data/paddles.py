"""The pieces of a Pathfinder image: the paddles that its geometry allows, and the disc.

Each is made once, as a drawing and as a set of pixels, and every image is made of copies. What a
paddle, a pivot, a band and a halo are stands in pathfinder.py.
"""
import math
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from engine.options import DataError

SMALLEST = 0.01  # real number; far below, dividing by it overflows
LEAST = {"contour_length": 2, "distractors": 0, "distractor_length": 0}  # others: 1
LARGEST = {"size": 4096, "paddle_length": 64, "margin": 64, "antialias": 16}  # others: 1024


@dataclass(frozen=True)
class Geometry:
    """What a task looks like; lengths in pixels. The defaults are the released Pathfinder-32's."""
    size: int = 32
    contour_length: int = 14  # paddles in each of the two target snakes
    distractors: int = 5  # short snakes, at most: one that finds no room is left out
    distractor_length: int = 0  # paddles; 0: contour_length // 3
    paddle_length: int = 2
    thickness: float = 0.5
    margin: int | tuple[int, ...] = 1  # half the gap between paddles; of several an image draws one
    continuity: float = 1.0  # higher is straighter
    seed_distance: int = 7  # between the starts of the two targets
    marker_radius: float = 1.5
    contrast: float = 0.75  # brightness of the targets, where a disc has 1
    distractor_contrast: float = 1.0
    antialias: int = 2  # strokes are drawn this many times finer

    def __post_init__(self):
        object.__setattr__(self, "margin", tuple(np.atleast_1d(self.margin).tolist()))
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            kinds, wanted = int, "a whole number"
            least, most = LEAST.get(name, 1), LARGEST.get(name, 1024)
            if field.type is float:
                kinds, wanted = (int, float), "a number"
                least, most = SMALLEST, 1 if "contrast" in name else self.size
            for number in value if name == "margin" else [value]:
                if not isinstance(number, kinds) or not least <= number <= most:
                    raise DataError(f"pathfinder: {name} is {number!r}, needs {wanted}, "
                                    f"at least {least}, at most {most}")
        if self.size <= 4 * self.seed_distance:
            raise DataError(f"pathfinder: size is {self.size}, needs more than "
                            f"4 * seed_distance = {4 * self.seed_distance}")
        length = self.distractor_length or self.contour_length // 3 or 1
        object.__setattr__(self, "distractor_length", length)


# A pixel (y, x) of the padded image is the integer y * width + x, and a set of pixels is an integer
# with those bits set: whether a paddle meets another one is then a shift and an `&`.
Paddle = tuple[int, int]  # pivot, a pixel, and k, which of the K directions it has
Snake = list[Paddle]
Field = tuple[int, int]  # what is taken: the bands and the halos of all paddles, sets of pixels


class Stencils:
    """The K paddles that a geometry allows, relative to their pivots, and the disc.

    Drawings are arrays (side, side), side = 2 * reach + 1, with the pivot in the middle. The sets
    of pixels that go with them have bit 0 at the drawing's first corner.
    """

    def __init__(self, geometry: Geometry, margin: int):
        length, thickness = geometry.paddle_length, geometry.thickness
        radius = length + margin
        around = np.indices((2 * radius + 1, 2 * radius + 1)).reshape(2, -1).T - radius
        nearest, farthest = (np.hypot(*np.abs(around + side * np.sign(around) / 2).T)
                             for side in (-1, 1))
        # the pixels that the circle passes through: (K, 2), as y, x
        heads = around[(nearest < radius) & (radius < farthest)]
        ahead = heads / np.linalg.norm(heads, axis=1, keepdims=True)
        tails = heads - length * ahead
        dtheta = np.arccos(np.clip(ahead @ ahead.T, -1, 1))  # (K, K)
        weights = np.cos(np.minimum(geometry.continuity * dtheta, math.pi / 2)) ** 2

        reach = max(radius + math.ceil(thickness), math.ceil(geometry.marker_radius)) + 2 * margin
        pad = reach + margin + 1  # of images, so that no drawing is cut
        width = geometry.size + 2 * pad  # of the padded image
        self.geometry, self.reach, self.pad, self.width = geometry, reach, pad, width

        def draw(fat: int) -> list[np.ndarray]:
            return [stroke(tail, head, thickness + 2 * fat, reach, geometry.antialias)
                    for tail, head in zip(tails, heads)]

        def disc(fat: int) -> np.ndarray:
            across = 2 * (geometry.marker_radius + fat)
            return stroke((0, 0), (0, 0), across, reach, geometry.antialias)

        def pixels(offsets: np.ndarray) -> list[int]:
            return (np.rint(offsets).astype(int) @ [width, 1]).tolist()

        def pixel_set(drawing: np.ndarray) -> int:
            return sum(1 << y * width + x for y, x in np.argwhere(drawing >= 0.5).tolist())

        def rim(inner: int) -> int:
            return pixel_set(np.pad(np.zeros((width - 2 * inner,) * 2), inner, constant_values=1))

        self.heads = pixels(heads)
        self.tails = pixels(tails)
        self.steps = pixels((length + 2 * margin) * ahead)  # to the next pivot
        from_corner = pixels(heads + reach)
        self.turns = []  # what may follow each: k, head from the corner, weight
        for row in weights.tolist():
            some = [(k, from_corner[k], weight) for k, weight in enumerate(row) if weight > 1e-4]
            self.turns.append(some)
        brighten = max(1, 1 / thickness)  # what is thinner than a pixel would be dark
        self.lines = np.clip(np.stack(draw(0)) * brighten, 0, 1)  # (K, side, side) brightness
        self.bands = [pixel_set(paddle) for paddle in draw(margin)]
        self.halos = [pixel_set(paddle) for paddle in draw(2 * margin)]
        self.disc = disc(0)  # (side, side) brightness
        self.clearing = pixel_set(disc(margin))  # what a disc keeps free of distractors
        self.square = (1 << (2 * reach + 1) * width) - 1  # all pixels of a drawing
        # An image without paddles: its outermost pixels, and all beyond, are taken.
        self.empty = rim(pad + 1), rim(pad + 1 + margin)

    def pixel(self, y: int, x: int) -> int:
        return (y + self.pad) * self.width + x + self.pad

    def corner(self, pixel: int) -> int:
        """The first corner of a drawing that has this pixel in the middle."""
        return pixel - self.reach * (self.width + 1)

    def ends(self, snake: Snake) -> tuple[int, int]:
        """The pixels of the first tail and the last head."""
        (first, i), (last, j) = snake[0], snake[-1]
        return first + self.tails[i], last + self.heads[j]

    def fits(self, field: Field, paddle: Paddle) -> bool:
        """Does its band overlap no other?"""
        pivot, k = paddle
        return not field[0] & self.bands[k] << self.corner(pivot)

    def occupy(self, field: Field, paddle: Paddle) -> Field:
        """The field with one more paddle."""
        pivot, k = paddle
        corner = self.corner(pivot)
        return field[0] | self.bands[k] << corner, field[1] | self.halos[k] << corner


make_stencils = lru_cache(Stencils)


def stroke(tail, head, thickness: float, reach: int, antialias: int) -> np.ndarray:
    """A line with round ends between two points (y, x) from the centre, float32 in [0, 1].

    (2 * reach + 1, 2 * reach + 1), drawn `antialias` times finer and reduced with a Lanczos-3
    filter.
    """
    coarse = np.arange(-reach, reach + 1)
    fine = (np.arange(len(coarse) * antialias) + 0.5) / antialias - 0.5 - reach
    y, x = np.meshgrid(fine - tail[0], fine - tail[1], indexing="ij")
    dy, dx = head[0] - tail[0], head[1] - tail[1]
    # the nearest point of the line, from 0 at the tail to 1 at the head
    along = np.clip((y * dy + x * dx) / max(dy * dy + dx * dx, 1e-9), 0, 1)
    distance = np.hypot(y - along * dy, x - along * dx)
    ink = np.clip((thickness / 2 - distance) * antialias + 0.5, 0, 1)
    away = coarse[:, None] - fine
    lanczos = np.where(abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0)
    lanczos /= lanczos.sum(1, keepdims=True)
    return np.clip(lanczos @ ink @ lanczos.T, 0, 1).astype(np.float32)
