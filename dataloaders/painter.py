"""Drawing in a world of metres: a pinhole camera above a street, an image and its label map.

World axes: X metres to the right of the camera, Y metres above the ground, Z metres ahead. On the
picture, one unit is the image height, so that a scene looks the same at any resolution.
"""

from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]
_CAMERA_HEIGHT = 1.5  # metres
_NEAR = 0.8  # metres; what comes closer is cut off


@dataclass(frozen=True)
class Camera:
    """Pinhole camera: focal length, horizon (y) and vanishing point (x), in image heights."""

    focal: float
    horizon: float
    vanish: float

    def project(self, x: float, y: float, z: float) -> Point:
        z = max(z, _NEAR)
        scale = self.focal / z
        return self.vanish + scale * x, self.horizon + scale * (_CAMERA_HEIGHT - y)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Colour `a` with `share` of colour `b`."""
    keep = 1 - share
    return (
        int(a[0] * keep + b[0] * share),
        int(a[1] * keep + b[1] * share),
        int(a[2] * keep + b[2] * share),
    )


class Painter:
    """Draws shapes on an image (height x width RGB) and their class ids on a label map.

    A colour of None draws on the label map only, a class of None on the image only. `light`
    multiplies every colour, `haze` swallows what is far away.
    """

    def __init__(
        self,
        height: int,
        width: int,
        camera: Camera,
        light: tuple[float, float, float],
        haze: Colour,
    ) -> None:
        self.size = height
        self.camera = camera
        self.light = light
        self.haze = haze
        self.image = Image.new("RGB", (width, height))
        self.label = Image.new("L", (width, height))
        self._draw = ImageDraw.Draw(self.image)
        self._mark = ImageDraw.Draw(self.label)

    def shade(self, colour: Colour, z: float) -> Colour:
        """The colour of a thing z metres away, in this scene's light."""
        (r, g, b), (kr, kg, kb) = colour, self.light
        lit = min(255, int(r * kr)), min(255, int(g * kg)), min(255, int(b * kb))
        return mix(lit, self.haze, min(0.75, z / 260))

    def polygon(self, points: list[Point], colour: Colour | None, class_id: int | None) -> None:
        """Fill a polygon given on the picture; the colour is taken as it is."""
        pixels = [(x * self.size, y * self.size) for x, y in points]
        if colour is not None:
            self._draw.polygon(pixels, fill=colour)
        if class_id is not None:
            self._mark.polygon(pixels, fill=class_id)

    def box(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        colour: Colour | None,
        class_id: int | None,
        disc: bool = False,
    ) -> None:
        """Fill a rectangle given on the picture (or the ellipse in it), at least one pixel."""
        left, top = round(x0 * self.size), round(y0 * self.size)
        right = max(left, round(x1 * self.size) - 1)
        bottom = max(top, round(y1 * self.size) - 1)
        if right < 0 or left >= self.image.width:
            return
        for draw, fill in ((self._draw, colour), (self._mark, class_id)):
            if fill is not None:
                fn = draw.ellipse if disc else draw.rectangle
                fn((left, top, right, bottom), fill=fill)

    def face(
        self,
        x0: float,
        x1: float,
        y0: float,
        y1: float,
        z: float,
        colour: Colour | None,
        class_id: int | None,
        disc: bool = False,
    ) -> None:
        """An upright rectangle (or ellipse) facing the camera, x0..x1 by y0..y1 metres at z."""
        left, top = self.camera.project(x0, y1, z)
        right, bottom = self.camera.project(x1, y0, z)
        shaded = self.shade(colour, z) if colour is not None else None
        self.box(left, top, right, bottom, shaded, class_id, disc)

    def shape(
        self,
        points: list[Point],
        z: float,
        colour: Colour | None,
        class_id: int | None,
    ) -> None:
        """An upright polygon facing the camera; points are (x, y) in metres at z."""
        shaded = self.shade(colour, z) if colour is not None else None
        self.polygon([self.camera.project(x, y, z) for x, y in points], shaded, class_id)

    def side(
        self,
        x: float,
        y0: float,
        y1: float,
        z0: float,
        z1: float,
        colour: Colour | None,
        class_id: int | None,
    ) -> None:
        """An upright rectangle along the street, at x, from z0 to z1 metres."""
        project = self.camera.project
        corners = [project(x, y0, z0), project(x, y1, z0), project(x, y1, z1), project(x, y0, z1)]
        shaded = self.shade(colour, (z0 * z1) ** 0.5) if colour is not None else None
        self.polygon(corners, shaded, class_id)

    def ground(
        self,
        x0: float,
        x1: float,
        z0: float,
        z1: float,
        colour: Colour | None,
        class_id: int | None,
    ) -> None:
        """A rectangle lying on the ground."""
        project = self.camera.project
        corners = [project(x0, 0, z0), project(x1, 0, z0), project(x1, 0, z1), project(x0, 0, z1)]
        shaded = self.shade(colour, (z0 * z1) ** 0.5) if colour is not None else None
        self.polygon(corners, shaded, class_id)

    def cuboid(
        self,
        x0: float,
        x1: float,
        y0: float,
        y1: float,
        z0: float,
        z1: float,
        colour: Colour,
        class_id: int,
    ) -> None:
        """A solid block: the side that the camera sees, darker, and then its rear face."""
        if x0 > 0:
            self.side(x0, y0, y1, z0, z1, mix(colour, (0, 0, 0), 0.25), class_id)
        elif x1 < 0:
            self.side(x1, y0, y1, z0, z1, mix(colour, (0, 0, 0), 0.25), class_id)
        self.face(x0, x1, y0, y1, z0, colour, class_id)
