"""The things of a synthetic street: one function each, standing at (x, z) metres.

All of them draw the image and the label at once. `rng` chooses looks, never sizes in pixels, so a
scene is the same at any resolution.
"""

from numpy.random import Generator

from dataloaders.info import CITYSCAPES, IGNORE_INDEX
from dataloaders.painter import Colour, Painter, mix

ID = {name: i for i, name in enumerate(CITYSCAPES.classes)}
_BLACK = (25, 25, 28)
_GLASS = (52, 62, 74)
_METAL = (98, 100, 104)
_SKIN = (214, 164, 136)
_CLOTHES = ((160, 40, 45), (40, 60, 120), (45, 45, 50), (200, 195, 185), (60, 100, 70))
_CAR_PAINT = ((30, 50, 130), (150, 25, 30), (205, 208, 212), (45, 46, 50), (110, 116, 124))


def pick(rng: Generator, options: tuple) -> tuple:
    return options[int(rng.integers(len(options)))]


def vary(rng: Generator, colour: Colour, amount: float = 12) -> Colour:
    """The colour, a little lighter or darker and a little off in hue."""
    grey, *off = ((2 * u - 1) * amount for u in rng.random(4).tolist())
    return tuple(int(min(255, max(0, c + grey + 0.4 * o))) for c, o in zip(colour, off))


def pole(p: Painter, rng: Generator, x: float, z: float, height: float, arm: float = 0.0) -> None:
    """A post; with an arm (metres, signed) it is a street lamp."""
    grey = vary(rng, _METAL, 15)
    p.face(x - 0.07, x + 0.07, 0, height, z, grey, ID["pole"])
    if arm:
        p.face(min(x, x + arm), max(x, x + arm), height - 0.1, height, z, grey, ID["pole"])
        end = x + arm
        p.face(end - 0.35, end + 0.35, height - 0.18, height + 0.05, z, grey, ID["pole"])


def _lamps(p: Painter, rng: Generator, x: float, low: float, z: float) -> None:
    """The dark box of a traffic light, from `low` up, with one lamp lit."""
    r = 0.13
    p.face(x - 0.2, x + 0.2, low, low + 1.0, z, _BLACK, ID["traffic light"])
    lamps = ((40, 215, 120), (245, 190, 40), (240, 45, 35))  # from the lowest
    lit = int(rng.integers(3))
    y = low + 0.2 + 0.3 * lit
    p.face(x - r, x + r, y - r, y + r, z, lamps[lit], ID["traffic light"], disc=True)


def traffic_light(p: Painter, rng: Generator, x: float, z: float) -> None:
    pole(p, rng, x, z, 2.5)
    _lamps(p, rng, x, 2.4, z)


def _plate(p: Painter, x: float, y: float, z: float, r: float, colour: Colour, kind: str) -> None:
    """One layer of a sign: a disc, square, diamond or triangle of half-width r round (x, y)."""
    sign = ID["traffic sign"]
    if kind in ("disc", "square"):
        p.face(x - r, x + r, y - r, y + r, z, colour, sign, disc=kind == "disc")
    elif kind == "diamond":
        p.shape([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], z, colour, sign)
    else:
        p.shape([(x - r, y - 0.8 * r), (x + r, y - 0.8 * r), (x, y + r)], z, colour, sign)


def _sign(p: Painter, rng: Generator, x: float, y: float, z: float) -> None:
    """A plate round (x, y): no entry, limit, yield, parking or priority."""
    red, white, blue, yellow = (195, 30, 35), (232, 232, 228), (30, 75, 170), (235, 185, 40)
    kind, rim, inner, stroke = pick(
        rng,
        (
            ("disc", red, red, white),
            ("disc", red, white, _BLACK),
            ("triangle", red, white, _BLACK),
            ("square", blue, blue, white),
            ("diamond", white, yellow, yellow),
        ),
    )
    r = rng.uniform(0.36, 0.46)
    _plate(p, x, y, z, r, rim, kind)
    _plate(p, x, y, z, 0.68 * r, inner, kind)
    p.face(x - 0.4 * r, x + 0.4 * r, y - 0.14 * r, y + 0.14 * r, z, stroke, ID["traffic sign"])


def traffic_sign(p: Painter, rng: Generator, x: float, z: float) -> None:
    high = rng.uniform(2.3, 2.8)
    pole(p, rng, x, z, high)
    _sign(p, rng, x, high, z)


def gantry(p: Painter, rng: Generator, x: float, z: float, right: float) -> None:
    """A beam over the whole road, from x to `right`, with lights and signs hung from it."""
    high, grey = rng.uniform(5.2, 6.2), vary(rng, _METAL, 15)
    for post in (x, right):
        p.face(post - 0.1, post + 0.1, 0, high, z, grey, ID["pole"])
    p.face(x, right, high - 0.18, high, z, grey, ID["pole"])
    for at in rng.uniform(x + 1, right - 1, int(rng.integers(2, 6))):
        if rng.random() < 0.5:
            _lamps(p, rng, at, high - 1.1, z)
        else:
            _sign(p, rng, at, high - 0.6, z)


def _torso(
    p: Painter, rng: Generator, x: float, z: float, hip: float, tall: float, name: str
) -> None:
    """Head and upper body over a hip height."""
    shoulder = hip + 0.36 * tall
    p.face(x - 0.21, x + 0.21, hip, shoulder, z, vary(rng, pick(rng, _CLOTHES)), ID[name])
    head = shoulder + 0.02
    p.face(x - 0.11, x + 0.11, head, head + 0.25, z, vary(rng, _SKIN), ID[name], disc=True)


def person(p: Painter, rng: Generator, x: float, z: float) -> None:
    tall = rng.uniform(1.5, 1.9)
    hip, stride = 0.48 * tall, rng.uniform(0.05, 0.2)
    trousers = vary(rng, pick(rng, ((45, 50, 70), (60, 55, 50), (35, 35, 38))))
    for foot in (-stride, stride):
        p.shape(
            [(x - 0.13, hip), (x + 0.13, hip), (x + foot + 0.07, 0), (x + foot - 0.07, 0)],
            z,
            trousers,
            ID["person"],
        )
    _torso(p, rng, x, z, hip, tall, "person")


def bicycle(p: Painter, rng: Generator, x: float, z: float, turned: float = 1.0) -> None:
    """A bicycle seen from the side; `turned` below 1 narrows it, as if it were heading away."""
    wheel, gap = 0.34, 0.52 * turned
    frame = vary(rng, pick(rng, ((190, 60, 40), (50, 120, 160), (40, 40, 45), (210, 200, 60))), 20)
    bike, r = ID["bicycle"], wheel * max(0.3, turned)
    p.shape([(x - gap, wheel), (x, 0.15), (x + gap, wheel), (x + gap, 0.95), (x - gap, 0.8)], z,
            None, bike)  # fmt: skip
    for hub in (x - gap, x + gap):
        p.face(hub - r, hub + r, 0, 2 * wheel, z, _BLACK, bike, disc=True)
        p.face(hub - 0.72 * r, hub + 0.72 * r, 0.1, 2 * wheel - 0.1, z, (138, 136, 134), None, True)
    for bar in (
        [(x - gap, 0.3), (x - gap, 0.4), (x, 0.85), (x, 0.75)],
        [(x, 0.25), (x + 0.08, 0.25), (x + gap, 0.85), (x + gap - 0.08, 0.85)],
        [(x - 0.4 * gap, 0.72), (x + gap, 0.78), (x + gap, 0.88), (x - 0.4 * gap, 0.82)],
    ):
        p.shape(bar, z, frame, bike)
    p.face(x + gap - 0.12, x + gap + 0.12, 0.92, 1.0, z, _BLACK, bike)
    p.face(x - 0.5 * gap - 0.1, x - 0.5 * gap + 0.1, 0.85, 0.93, z, _BLACK, bike)


def motorcycle(p: Painter, rng: Generator, x: float, z: float, turned: float = 1.0) -> None:
    """Thick wheels and a solid coloured body, where a bicycle has rings and thin bars."""
    gap, r = 0.62 * turned, 0.32
    bike, half = ID["motorcycle"], r * max(0.35, turned)
    paint = vary(rng, pick(rng, ((200, 30, 30), (30, 60, 170), (220, 120, 30))))
    for hub in (x - gap, x + gap):
        p.face(hub - half, hub + half, 0, 2 * r, z, _BLACK, bike, disc=True)
    p.shape(
        [(x - 1.2 * gap, 0.75), (x - 0.4 * gap, 0.35), (x + 0.6 * gap, 0.35), (x + gap, 1.0),
         (x + 0.3 * gap, 0.95), (x - 0.2 * gap, 0.75)], z, paint, bike)  # fmt: skip
    p.face(x - 0.3, x + 0.3, 0.98, 1.06, z, _BLACK, bike)


def rider(p: Painter, rng: Generator, x: float, z: float, turned: float, motor: bool) -> None:
    """Somebody on a bicycle or motorcycle: what is below the hip tells a rider from a person."""
    (motorcycle if motor else bicycle)(p, rng, x, z, turned)
    seat = 0.8 if motor else 0.92
    trousers = vary(rng, (48, 50, 62))
    foot = x + 0.12 * turned
    p.shape([(x - 0.12, seat + 0.1), (x + 0.12, seat + 0.1), (foot + 0.07, 0.3),
             (foot - 0.06, 0.3)], z, trousers, ID["rider"])  # fmt: skip
    _torso(p, rng, x + 0.08 * turned, z, seat, 1.7, "rider")
    if motor:
        p.face(x - 0.05, x + 0.21, seat + 0.62, seat + 0.9, z, _BLACK, ID["rider"], disc=True)


def car(p: Painter, rng: Generator, x: float, z: float) -> None:
    """A car from behind, 1.8 m wide, nearest end at z."""
    paint, w, long, me = vary(rng, pick(rng, _CAR_PAINT), 15), 0.9, 4.2, ID["car"]
    p.ground(x - w - 0.1, x + w + 0.1, z - 0.2, z + long, (48, 48, 52), None)  # its shadow
    p.cuboid(x - 0.8 * w, x + 0.8 * w, 0.8, 1.45, z + 0.5, z + 3.0, _GLASS, me)
    p.face(x - 0.8 * w, x + 0.8 * w, 1.38, 1.47, z + 0.5, paint, me)
    p.cuboid(x - w, x + w, 0.28, 0.88, z, z + long, paint, me)
    for side in (-1, 1):
        wheel = sorted((side * 0.95 * w, side * 0.7 * w))
        p.face(x + wheel[0], x + wheel[1], 0, 0.34, z, _BLACK, me)
        lamp = sorted((side * 0.95 * w, side * 0.72 * w))
        p.face(x + lamp[0], x + lamp[1], 0.64, 0.8, z, (205, 40, 40), me)
    p.face(x - 0.26, x + 0.26, 0.48, 0.6, z, (225, 225, 215), me)


def _wheels(p: Painter, x: float, w: float, z: float, long: float, me: int) -> None:
    p.cuboid(x - 0.9 * w, x + 0.9 * w, 0, 0.95, z + 0.1, z + long - 0.5, (32, 32, 35), me)


def bus(p: Painter, rng: Generator, x: float, z: float) -> None:
    """2.5 m wide, warm paint, a band of windows all round."""
    paint, me = vary(rng, pick(rng, ((215, 165, 45), (190, 55, 45), (225, 130, 50)))), ID["bus"]
    w, long, top = 1.25, 10.0, 3.1
    _wheels(p, x, w, z, long, me)
    p.cuboid(x - w, x + w, 0.4, top, z, z + long, paint, me)
    p.cuboid(x - w, x + w, 1.5, 2.5, z, z + long, _GLASS, me)
    for edge in (-w, w - 0.14):
        p.face(x + edge, x + edge + 0.14, 1.5, 2.5, z, paint, me)
    p.face(x - 0.8 * w, x + 0.8 * w, 2.62, 2.95, z, (30, 30, 32), me)
    p.face(x - 0.5 * w, x + 0.4 * w, 2.7, 2.86, z, (240, 200, 90), me)


def truck(p: Painter, rng: Generator, x: float, z: float) -> None:
    """2.5 m wide, a plain pale box with two doors on a dark chassis."""
    paint = vary(rng, pick(rng, ((216, 216, 210), (185, 198, 205), (205, 200, 180))))
    w, long, top, me = 1.25, 8.5, 3.4, ID["truck"]
    _wheels(p, x, w, z, long, me)
    p.cuboid(x - w, x + w, 0.95, top, z, z + long, paint, me)
    p.face(x - 0.03, x + 0.03, 1.0, top, z, (90, 90, 92), me)
    p.face(x - w, x + w, 0.75, 0.95, z, (60, 60, 62), me)
    for edge in (-w, w - 0.3):
        p.face(x + edge, x + edge + 0.3, 0.77, 0.93, z, (205, 40, 40), me)


def train(p: Painter, rng: Generator, x: float, z: float) -> None:
    """A tram: 2.6 m wide, 26 m long, cream over green or turquoise."""
    low, me = vary(rng, pick(rng, ((30, 120, 85), (25, 110, 125)))), ID["train"]
    w, long, top = 1.3, 26.0, 3.5
    for rail in (-0.75, 0.68):
        p.ground(x + rail, x + rail + 0.08, 2, z, (70, 70, 74), None)
    p.cuboid(x - w, x + w, 0.15, 1.6, z, z + long, low, me)
    p.cuboid(x - w, x + w, 1.6, top, z, z + long, (228, 220, 192), me)
    p.cuboid(x - 0.99 * w, x + 0.99 * w, 1.7, 2.7, z, z + long, _GLASS, me)
    p.face(x - w, x + w, 2.7, top, z, (228, 220, 192), me)
    p.face(x - 0.5 * w, x + 0.5 * w, 2.95, 3.2, z, (245, 170, 50), me)


def tree(p: Painter, rng: Generator, x: float, z: float, tall: float, spread: float) -> None:
    """A trunk, about as thin as a pole, under a crown of overlapping discs."""
    leaf, me = vary(rng, (62, 98, 46), 14), ID["vegetation"]
    p.face(x - 0.13, x + 0.13, 0, 0.6 * tall, z, vary(rng, (84, 66, 50)), me)
    for dx, dy, size in rng.uniform((-0.6, -0.3, 0.55), (0.6, 0.3, 0.85), (5, 3)):
        r, cx, cy = size * spread, x + dx * spread, tall + dy * spread
        tone = mix(leaf, (30, 50, 25), 0.35 * float(dy < 0))
        p.face(cx - r, cx + r, cy - 0.9 * r, cy + 0.9 * r, z, tone, me, disc=True)


def bin_(p: Painter, rng: Generator, x: float, z: float) -> None:
    """Street furniture without a class: void."""
    p.face(x - 0.3, x + 0.3, 0, 0.95, z, vary(rng, (72, 84, 70), 20), IGNORE_INDEX)
