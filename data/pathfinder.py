"""Pathfinder: do two discs lie on the same dashed curve? A generator of such images.

An image holds two long snakes of dashes ("paddles"), some short distractor snakes, and two discs.
One disc marks the start of a target snake; the other the far end of the same snake (label 1) or of
the other one (label 0). Task: Linsley et al. 2018, "Learning long-range spatial dependencies with
horizontal gated recurrent units", as used by Long Range Arena (Tay et al. 2020) at 32 x 32
(Pathfinder) and 128 x 128 (Path-X).

    images, labels = generate(160_000, seed=1)             # Pathfinder: (n, 32, 32), (n,), uint8
    images, labels = generate(1000, size=128, seed=1)      # Path-X
    images, labels = generate(1000, contour_length=5, distractors=1, seed=1)   # easy, for a laptop

How a snake grows. A paddle turns about its pivot, the middle of the gap before it. Its head is one
of the K pixels on the circle of radius paddle_length + margin around the pivot. So there are K
paddles: each is drawn once, and every image is made of copies. The next pivot lies
paddle_length + 2 * margin further along the paddle. The two targets grow in turns; if one gets
stuck, both start again.

Where a paddle may go. A head that turns by dtheta has the weight
cos^2(min(continuity * dtheta, pi / 2)). Every paddle lies in a band, `margin` wider than itself on
all sides, and in a halo, 2 * margin wider. No head may be in another paddle's halo. Where the bands
of two paddles overlap, the later one is drawn again, up to 3 times.

The original tests overlap on antialiased images with some tolerance, and not against the other
target's newest paddle, so that its targets cross now and then, and a disc may hide a piece of the
snake that it does not mark. Here neither happens: no label rests on what is hidden.
"""
import math
import multiprocessing
import os
import random
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
from tqdm import tqdm

from data.paddles import Field, Geometry, Paddle, Snake, Stencils, make_stencils
from engine.options import DataError

CHUNK = 100  # images that a worker draws at a time
PADDLE_TRIES = 3
DISTRACTOR_TRIES = 100  # for each distractor; most begin on a pixel that is taken and cost nothing
TARGET_TRIES = 50_000  # for each image

# Parameters of the released files, as Long Range Arena's data builder documents them.
RELEASED = {
    32: Geometry(),
    128: Geometry(size=128, distractors=8, paddle_length=5, thickness=1.5, margin=(2, 3),
                  continuity=1.8, seed_distance=20, marker_radius=3, contrast=0.9,
                  distractor_contrast=0.9),
}


def geometry_of(size: int, **options) -> Geometry:
    """The released task's of this size, or Pathfinder-32's, but for `options`. Raises DataError."""
    released = RELEASED.get(size, Geometry())
    return replace(released, size=size, **{"distractor_length": 0, **options})


def generate(n: int, *, size: int = 32, seed: int, workers: int | None = None,
             **options) -> tuple[np.ndarray, np.ndarray]:
    """n images (n, size, size) uint8 and their labels (n,) uint8, a fair coin each.

    Image i depends on i, seed, size and options alone.
    options: fields of Geometry, see `geometry_of`.
    workers: processes, None for one per core; more than one are spawned, so a script that calls
        this needs its __main__ guard.
    Raises DataError where the geometry is impossible.
    """
    draw = partial(_draw, geometry_of(size, **options), seed)
    images = np.empty((n, size, size), np.uint8)
    labels = np.empty(n, np.uint8)
    workers = min(workers or os.cpu_count() or 1, math.ceil(n / CHUNK))
    try:
        with ExitStack() as stack:
            drawn = map(draw, range(n))
            if workers > 1:  # spawned, because forking a process that runs torch's threads may hang
                pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"),
                                           initializer=_begin_worker)
                # Without cancel_futures it would first have all other images drawn.
                stack.callback(pool.shutdown, cancel_futures=True)
                drawn = pool.map(draw, range(n), chunksize=CHUNK)
            bar = tqdm(drawn, "pathfinder", n, unit="image", disable=None)
            for i, (image, label) in enumerate(bar):
                images[i] = image
                labels[i] = label
    except BrokenProcessPool:
        raise DataError("pathfinder: a process that draws images was killed, perhaps for want of "
                        "memory: free some and try again") from None
    return images, labels


def _begin_worker():
    # Ctrl-C reaches all processes of a terminal: the one that wants the images answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Where the process that wants the images is killed, its workers would wait for it forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _draw(geometry: Geometry, seed: int, i: int) -> tuple[np.ndarray, int]:
    """Image i, (size, size) uint8, and its label."""
    rng = random.Random(f"{seed} {i}")
    label = rng.getrandbits(1)
    stencils = make_stencils(geometry, rng.choice(geometry.margin))
    return render(stencils, *draw_scene(rng, stencils, label)), label


def draw_scene(rng: random.Random, stencils: Stencils, label: int) -> tuple:
    """Two targets, the distractors that found room, and the pixels that the discs mark.

    The label only decides which ends are marked, so nothing else can tell it. Raises DataError
    where the targets find no room.
    """
    geometry = stencils.geometry
    for _ in range(TARGET_TRIES):
        grown = two_targets(rng, stencils)
        if grown:
            break
    else:
        raise DataError(f"pathfinder: no room for two contours of {geometry.contour_length} "
                        f"paddles at size {geometry.size} in {TARGET_TRIES} tries; take a smaller "
                        "contour_length or a larger size")
    targets, (bands, halos) = grown
    ends = [stencils.ends(snake) for snake in targets]
    for tip in sum(ends, ()):  # all four, so that the label changes nothing
        clearing = stencils.clearing << stencils.corner(tip)
        bands |= clearing
        halos |= clearing
    field = bands, halos
    distractors = []
    for _ in range(geometry.distractors):
        for _ in range(DISTRACTOR_TRIES):
            grown = distractor(rng, stencils, field)
            if grown:
                snake, field = grown
                distractors.append(snake)
                break
    marked = rng.getrandbits(1)
    other = marked if label else 1 - marked
    return targets, distractors, (ends[marked][0], ends[other][1])


def two_targets(rng, stencils: Stencils) -> tuple[list[Snake], Field] | None:
    """Two snakes and what they take.

    None if one gets stuck, or if a disc at one's end would touch the other.
    """
    geometry = stencils.geometry
    distance = geometry.seed_distance
    y, x = (rng.randrange(2 * distance, geometry.size - 2 * distance) for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)
    first = first_paddle(rng, stencils, stencils.empty, stencils.pixel(y, x))
    if not first:
        return None
    y += round(distance * math.sin(angle))
    x += round(distance * math.cos(angle))
    field = stencils.occupy(stencils.empty, first)
    second = first_paddle(rng, stencils, field, stencils.pixel(y, x))
    if not second:
        return None
    snakes = [[first], [second]]
    field = stencils.empty  # it lacks the last paddle of both: a next one may touch its own
    for _ in range(geometry.contour_length - 1):
        for snake, other in snakes, snakes[::-1]:
            last = snake[-1]
            paddle = next_paddle(rng, stencils, stencils.occupy(field, other[-1]), last)
            if not paddle:
                return None
            field = stencils.occupy(field, last)
            snake.append(paddle)
    if not discs_are_clear(stencils, snakes, geometry.marker_radius):
        return None
    for snake in snakes:
        field = stencils.occupy(field, snake[-1])
    return snakes, field


def distractor(rng, stencils: Stencils, field: Field) -> tuple[Snake, Field] | None:
    """A short snake from a random pixel, and what is taken with it; None if it finds no room."""
    geometry = stencils.geometry
    tail = stencils.pixel(rng.randrange(geometry.size), rng.randrange(geometry.size))
    if field[1] >> tail & 1:  # in a halo
        return None
    paddle = first_paddle(rng, stencils, field, tail)
    snake = []
    while paddle:
        snake.append(paddle)
        if len(snake) == geometry.distractor_length:
            return snake, stencils.occupy(field, paddle)
        following = next_paddle(rng, stencils, field, paddle)
        field = stencils.occupy(field, paddle)
        paddle = following
    return None


def first_paddle(rng, stencils: Stencils, field: Field, tail: int) -> Paddle | None:
    """A paddle of random direction that begins at this pixel, if it fits."""
    k = rng.randrange(len(stencils.heads))
    paddle = tail - stencils.tails[k], k
    return paddle if stencils.fits(field, paddle) else None


def next_paddle(rng, stencils: Stencils, field: Field, last: Paddle) -> Paddle | None:
    """A paddle that continues a snake, if one is found.

    field: what is in the way, without the last paddle itself.
    """
    pivot = last[0] + stencils.steps[last[1]]
    near = field[1] >> stencils.corner(pivot) & stencils.square
    free = {k: weight for k, head, weight in stencils.turns[last[1]] if not near >> head & 1}
    if not free:
        return None
    for k in rng.choices(list(free), list(free.values()), k=PADDLE_TRIES):
        if stencils.fits(field, (pivot, k)):
            return pivot, k
    return None


def discs_are_clear(stencils: Stencils, snakes: list[Snake], radius: float) -> bool:
    """Whichever ends are marked: do the discs keep apart, and off the snake they do not mark?"""
    def points(pixels) -> np.ndarray:
        return np.stack(np.divmod(pixels, stencils.width), -1)

    ends = points([stencils.ends(snake) for snake in snakes])  # (snake, start or end, 2)
    tails_and_heads = stencils.tails, stencils.heads
    bodies = points([[pivot + end[k] for pivot, k in snake for end in tails_and_heads]
                     for snake in snakes])
    apart = np.linalg.norm(ends[:, None, 0] - ends[None, :, 1], axis=-1).min()
    free = np.linalg.norm(ends[:, :, None] - bodies[::-1, None], axis=-1).min()
    return bool(apart >= 2 * radius + 2 and free >= radius + 1.5)


def render(stencils: Stencils, targets: list[Snake], distractors: list[Snake],
           discs: tuple[int, int]) -> np.ndarray:
    """Paddles and discs, merged by maximum: (size, size) uint8; the middle of a disc has 255."""
    canvas = np.zeros((stencils.width, stencils.width), np.float32)

    def stamp(pixel: int, drawing: np.ndarray):
        y, x = divmod(stencils.corner(pixel), stencils.width)
        window = canvas[y:y + len(drawing), x:x + len(drawing)]
        np.maximum(window, drawing, out=window)

    geometry = stencils.geometry
    for snakes, contrast in ((targets, geometry.contrast),
                             (distractors, geometry.distractor_contrast)):
        for pivot, k in sum(snakes, []):
            stamp(pivot, contrast * stencils.lines[k])
    for tip in discs:
        stamp(tip, stencils.disc)
    inside = slice(stencils.pad, -stencils.pad)
    return np.rint(255 * canvas[inside, inside]).astype(np.uint8)
