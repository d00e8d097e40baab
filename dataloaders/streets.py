"""Composes synthetic street scenes: road, pavements, frontages, and clusters of small things.

Sizes and distances are in metres. The layout draws its random numbers without looking at the
picture's resolution, so (seed, split, index) gives the same scene at any size of one aspect ratio.
"""

from itertools import pairwise

import numpy as np
from numpy.random import Generator

from dataloaders import things
from dataloaders.painter import Camera, Colour, Painter, mix
from dataloaders.things import ID, pick, vary

_NEAR, _FAR = 1.0, 160.0
_FACADES = ((176, 150, 118), (150, 92, 74), (188, 178, 158), (142, 130, 120), (200, 170, 120))


def _sky(p: Painter, rng: Generator, aspect: float) -> None:
    top, low = vary(rng, (112, 156, 208), 18), vary(rng, (196, 212, 226), 12)
    bands = 24
    for i in range(bands):
        y0, y1 = (p.camera.horizon * k / bands for k in (i, i + 1))
        colour = p.shade(mix(top, low, i / (bands - 1)), 0)
        p.box(0, y0, aspect, y1 + 0.01, colour, ID["sky"])


def _skyline(p: Painter, rng: Generator, aspect: float) -> None:
    """A hazy row of far houses and woods along the horizon."""
    x, horizon = -0.1, p.camera.horizon
    while x < aspect:
        wide, high = rng.uniform(0.08, 0.3), rng.uniform(0.02, 0.09)
        if rng.random() < 0.55:
            colour = p.shade(vary(rng, pick(rng, _FACADES)), 95)
            p.box(x, horizon - high, x + wide, horizon + 0.01, colour, ID["building"])
        else:
            colour = p.shade(vary(rng, (70, 104, 60)), 95)
            box = (x - 0.05, horizon - 0.8 * high, x + wide + 0.05, horizon + 0.8 * high)
            p.box(*box, colour, ID["vegetation"], disc=True)
        x += 0.8 * wide


def _surface(p: Painter, rng: Generator, kerbs: dict[int, float], walks: dict[int, float]) -> None:
    """Grass everywhere, then pavements and the road with its markings."""
    grass, stone = vary(rng, (112, 138, 72), 14), vary(rng, (168, 152, 150), 10)
    tar, white = vary(rng, (88, 88, 92), 10), (214, 214, 208)
    p.ground(-900, 900, _NEAR, 900, grass, ID["terrain"])
    # In short stretches, so that the haze sets in gradually.
    for z0, z1 in pairwise((_NEAR, 4, 6, 9, 13, 18, 25, 35, 50, 80, 130, 220, 900)):
        p.ground(-900, 900, z0, z1, grass, None)
        for side, kerb in kerbs.items():
            p.ground(side * kerb, side * (kerb + walks[side]), z0, z1, stone, ID["sidewalk"])
        p.ground(-kerbs[-1], kerbs[1], z0, z1, tar, ID["road"])
    for side, kerb in kerbs.items():
        edge = mix(stone, (255, 255, 255), 0.3)
        p.ground(side * kerb, side * (kerb + 0.18), _NEAR, 90, edge, ID["sidewalk"])
        joint = mix(stone, (0, 0, 0), 0.12)
        for z in (2.5, 4, 6, 9, 13, 18):
            p.ground(side * (kerb + 0.2), side * (kerb + walks[side]), z, 1.03 * z, joint, None)
    middle = (kerbs[1] - kerbs[-1]) / 2 + rng.uniform(-0.5, 0.5)
    for z in np.arange(rng.uniform(2, 6), 60, 6.0):
        p.ground(middle - 0.07, middle + 0.07, z, z + 3, white, None)


def _facade(p: Painter, rng: Generator, side: int, x: float, z0: float, z1: float) -> None:
    """A house front along the street: bands of windows between piers, and its gable end."""
    colour, high = vary(rng, pick(rng, _FACADES)), rng.uniform(7, 18)
    pane = vary(rng, (92, 98, 108), 15)
    far = sorted((side * x, side * (x + 14)))
    p.face(far[0], far[1], 0, high, z0, mix(colour, (0, 0, 0), 0.12), ID["building"])
    p.side(side * x, 0, high, z0, z1, colour, ID["building"])
    shop = mix(vary(rng, pick(rng, _FACADES), 40), (60, 60, 70), 0.4)
    p.side(side * x, 0.3, 2.9, z0 + 0.5, z1 - 0.5, shop, None)
    for y in np.arange(4.2, high - 1.6, 3.0):
        p.side(side * x, y, y + 1.5, z0 + 0.8, z1 - 0.8, pane, None)
    for z in np.arange(z0 + 2.2, min(z1, 45.0), 2.6):
        p.side(side * x, 3.4, high - 0.4, z, z + 1.1, colour, None)


def _posters(p: Painter, rng: Generator, side: int, x: float, z0: float, z1: float) -> None:
    """Plain panels on a wall in the colours that signs have from afar; part of the building."""
    for z in rng.uniform(z0, z1, int(rng.integers(0, 3))):
        colour = pick(rng, ((206, 120, 118), (95, 120, 178), (228, 200, 120)))
        p.side(side * x, 1.8, 2.8, z, z + 1.2, vary(rng, colour), None)


def _fence(p: Painter, rng: Generator, side: int, x: float, z0: float, z1: float) -> None:
    """Rails and bars that one sees through; all of it counts as fence."""
    colour, high = vary(rng, pick(rng, ((78, 92, 84), (150, 150, 146), (92, 74, 58)))), 1.7
    p.side(side * x, 0, high, z0, z1, None, ID["fence"])
    for y in (0.2, high - 0.12):
        p.side(side * x, y, y + 0.12, z0, z1, colour, ID["fence"])
    for z in np.arange(z0, z1, 0.5 if z0 > 8 else 0.35):
        p.side(side * x, 0, high, z, z + 0.16, colour, ID["fence"])


def _frontage(p: Painter, rng: Generator, side: int, x: float) -> None:
    """What lines one side of the street at x metres, from far to near."""
    urban = rng.uniform(0.25, 0.8)
    rest = (1 - urban) / 4
    kinds = ("building", "trees", "wall", "fence", "open")
    odds = (urban, 1.5 * rest, rest, rest, 0.5 * rest)
    edges = [3.0]
    while edges[-1] < _FAR:
        edges.append(edges[-1] * rng.uniform(1.25, 1.7) + rng.uniform(2, 8))
    for z0, z1 in zip(edges[-2::-1], edges[:0:-1]):
        kind = str(rng.choice(kinds, p=odds))
        if kind == "building":
            _facade(p, rng, side, x, z0, z1)
            _posters(p, rng, side, x, z0, z1)
        elif kind == "trees":
            for z in sorted(rng.uniform(z0, z1, 5), reverse=True):
                things.tree(p, rng, side * (x + 2), z, rng.uniform(3.0, 5.5), rng.uniform(2.5, 4))
        elif kind == "wall":
            colour = vary(rng, (138, 134, 150), 12)
            high = rng.uniform(1.8, 3.2)
            p.side(side * x, 0, high, z0, z1, colour, ID["wall"])
            p.side(side * x, high - 0.25, high, z0, z1, mix(colour, (0, 0, 0), 0.2), ID["wall"])
        elif kind == "fence" and z0 > 4:
            _fence(p, rng, side, x, z0, z1)


def _place_traffic(rng: Generator, kerbs: dict[int, float]) -> list[tuple]:
    """Cars, buses, trucks and trams in their lanes and along the kerbs: (z, draw, x, ...)."""
    placed = []
    left, right = -kerbs[-1], kerbs[1]
    lanes = ((right - 1.4, things.car), (left + 1.4, things.car), (0.45 * left, things.car))
    for lane, draw in lanes:
        z = rng.uniform(6, 45)
        while z < 90:
            placed.append((z, draw, lane + rng.uniform(-0.2, 0.2)))
            z += 7 + rng.exponential(22)
    for draw, chance in ((things.bus, 0.3), (things.truck, 0.3), (things.train, 0.25)):
        if rng.random() < chance:
            lane = 0.55 * left if draw is things.train else pick(rng, (right - 1.7, left + 1.7))
            placed.append((rng.uniform(9, 32), draw, lane))
    return placed


def _place_posts(rng: Generator, side: int, kerb: float, busy: float) -> list[tuple]:
    """Lamps at regular steps, signs and traffic lights along one kerb."""
    placed = []
    post = side * (kerb + 0.4)
    if rng.random() < 0.8:
        step, high = rng.uniform(10, 20), rng.uniform(5.0, 7.5)
        for z in np.arange(rng.uniform(12, 22), 90, step):
            placed.append((z, things.pole, post, high, -side * 1.6))
    for draw, count in ((things.traffic_sign, 3.5), (things.traffic_light, 2.5)):
        for z in rng.uniform(13, 70, rng.poisson(count * busy)):
            placed.append((z, draw, post + side * rng.uniform(0, 1.0)))
    return placed


def _place_people(rng: Generator, side: int, kerb: float, walk: float, busy: float) -> list[tuple]:
    """Groups of people and parked two-wheelers on one pavement, riders along its kerb."""
    placed = []
    for centre in rng.uniform(12, 75, rng.poisson(7 * busy)):
        for _ in range(int(rng.integers(1, 6))):
            x = side * (kerb + rng.uniform(0.5, walk))
            placed.append((centre + rng.uniform(-2, 2), things.person, x))
    for z in rng.uniform(13, 50, rng.poisson(3.5 * busy)):
        draw = things.bicycle if rng.random() < 0.55 else things.motorcycle
        placed.append((z, draw, side * (kerb + rng.uniform(0.6, walk))))
    for z in rng.uniform(15, 55, rng.poisson(4.5 * busy)):
        x = side * (kerb - rng.uniform(0.3, 1.5))
        placed.append((z, things.rider, x, rng.uniform(0.4, 1.0), rng.random() < 0.4))
    return placed


def _place_crossing(rng: Generator, kerbs: dict[int, float]) -> list[tuple]:
    """People on foot and on wheels who cross the road, all at about one distance."""
    z, placed = rng.uniform(14, 40), []
    for x in rng.uniform(-kerbs[-1], kerbs[1], int(rng.integers(2, 9))):
        at = z + rng.uniform(-1.5, 1.5)
        if rng.random() < 0.65:
            placed.append((at, things.person, x))
        else:
            placed.append((at, things.rider, x, 1.0, rng.random() < 0.4))
    return placed


def _place_small(rng: Generator, kerbs: dict[int, float], walks: dict[int, float]) -> list[tuple]:
    """Poles, lights, signs, people and two-wheelers; each side of a street is busy or quiet."""
    placed = []
    for side in (-1, 1):
        busy, kerb, walk = rng.uniform(0.2, 1.2), kerbs[side], walks[side]
        placed += _place_posts(rng, side, kerb, busy)
        placed += _place_people(rng, side, kerb, walk, busy)
        if rng.random() < 0.4:
            placed.append((rng.uniform(9, 25), things.bin_, side * (kerb + walk - 0.4)))
        for z in rng.uniform(12, 60, rng.poisson(1.2)):
            x = side * (kerb + walk - 0.2)
            placed.append((z, things.tree, x, rng.uniform(4.0, 6.0), rng.uniform(1.2, 2.2)))
    if rng.random() < 0.5:
        placed += _place_crossing(rng, kerbs)
    if rng.random() < 0.45:
        placed.append((rng.uniform(14, 30), things.gantry, -kerbs[-1] - 0.5, kerbs[1] + 0.5))
    return placed


def compose(rng: Generator, height: int, width: int) -> Painter:
    """Draw one scene; the painter holds the clean RGB image and the label map."""
    aspect = width / height
    focal, horizon, vanish = rng.uniform((1.3, 0.39, 0.38), (1.7, 0.48, 0.62))
    camera = Camera(focal, horizon, vanish * aspect)
    bright, warm = rng.uniform(0.72, 1.08), rng.uniform(-0.05, 0.05)
    light = (bright * (1 + warm), bright, bright * (1 - warm))
    haze: Colour = tuple(round(c * k) for c, k in zip((196, 204, 212), light))
    painter = Painter(height, width, camera, light, haze)
    kerbs = {-1: rng.uniform(5, 8.5), 1: rng.uniform(3, 5)}
    walks = {side: rng.uniform(2, 4.5) for side in (-1, 1)}
    _sky(painter, rng, aspect)
    _skyline(painter, rng, aspect)
    _surface(painter, rng, kerbs, walks)
    for side in (-1, 1):
        lawn = rng.uniform(2, 7) if rng.random() < 0.45 else 0.2
        _frontage(painter, rng, side, kerbs[side] + walks[side] + lawn)
    placed = _place_traffic(rng, kerbs) + _place_small(rng, kerbs, walks)
    for z, draw, x, *looks in sorted(placed, key=lambda item: -item[0]):
        draw(painter, rng, x, z, *looks)
    return painter
