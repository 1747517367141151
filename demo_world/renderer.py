"""The demo world: small pictures of 16 kinds of surface and object, whole or with one of 8 defects.

Everything is drawn from a few formulas and a random generator, so each picture comes with its exact defect mask,
its exact object mask and the facts that a caption may state. From the ground up: coordinates and noise, one
function per category, one function per defect, and `render`, which puts a picture together.

Pictures are `SIZE` x `SIZE` pixels. Positions inside a category function are relative: -1 to 1 from side to side
of the picture for a texture, -1 to 1 from side to side of the thing for an object. Brightness and colour are
fractions; 1 is white.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

SIZE = 96

COLOURS = {
    "red": (0.78, 0.16, 0.14),
    "green": (0.18, 0.55, 0.24),
    "blue": (0.18, 0.32, 0.72),
    "yellow": (0.86, 0.74, 0.2),
    "brown": (0.45, 0.28, 0.15),
    "grey": (0.55, 0.55, 0.56),
    "white": (0.88, 0.87, 0.84),
    "black": (0.16, 0.16, 0.17),
    "orange": (0.88, 0.48, 0.13),
    "purple": (0.5, 0.25, 0.6),
}
ANY_COLOUR = tuple(COLOURS)
BACKGROUNDS = ("white", "grey", "black", "blue", "brown")

# What the adjectives of the paper's templates mean in this world; see `render`.
ATTRIBUTES = ("cropped", "close-up", "bright", "dark", "jpeg", "blurry", "large", "small")
PLAIN_SHARE = 0.45  # share of pictures without any attribute

# Half of each group: in training no picture with a defect is shown of these. Textures and objects in
# equal proportion; each has a relative that is shown defective (capsule: pill, washer: nut, tile: grid, ...).
NEVER_DEFECTIVE = ("leather", "capsule", "screw", "button", "tile", "gear", "hazelnut", "washer")


@dataclass(frozen=True)
class Facts:
    """What is true of a picture. `background` is None for a texture, `attribute` and `defect` for a plain one."""

    category: str
    colour: str
    background: str | None
    attribute: str | None
    defect: str | None


@dataclass(frozen=True)
class Rendering:
    """image: SIZE x SIZE x 3 uint8; mask (the defect) and object_mask: SIZE x SIZE bool; mask is inside object_mask.

    object_mask is the thing as it was before the defect: what was cut off belongs to it.
    """

    image: np.ndarray
    mask: np.ndarray
    object_mask: np.ndarray
    facts: Facts


# Coordinates, noise, colour -------------------------------------------------------------------------------------

ROWS, COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
ACROSS = (COLUMNS + 0.5) / SIZE * 2 - 1
DOWN = (ROWS + 0.5) / SIZE * 2 - 1
SOFT_EDGE = 1.5 * 2 / SIZE  # an edge's width: 1.5 pixels

GRAIN, FINE, MEDIUM, COARSE, CLOUDY = range(5)  # noise by the size of its blobs
NOISE_SIGMAS = (0.5, 1.0, 2.0, 4.0, 9.0)  # pixels
NOISE_FIELD_SIZE = 420


@cache
def noise_fields() -> list[np.ndarray]:
    """One large field of smooth noise per scale, mean 0 and deviation 1; pictures use windows of them."""
    rng = np.random.default_rng(7)
    fields = []
    for sigma in NOISE_SIGMAS:
        white = rng.standard_normal((NOISE_FIELD_SIZE, NOISE_FIELD_SIZE)).astype(np.float32)
        smooth = gaussian_filter(white, sigma, mode="wrap")
        fields.append(((smooth - smooth.mean()) / smooth.std()).astype(np.float32))
    return fields


def noise(rng: np.random.Generator, scale: int) -> np.ndarray:
    """A random window of one of the noise fields, flipped at random: SIZE x SIZE."""
    row, column = rng.integers(0, NOISE_FIELD_SIZE - SIZE), rng.integers(0, NOISE_FIELD_SIZE - SIZE)
    window = noise_fields()[scale][row : row + SIZE, column : column + SIZE]
    flips = rng.integers(0, 8)
    if flips & 1:
        window = window[::-1]
    if flips & 2:
        window = window[:, ::-1]
    return window.T if flips & 4 else window


def inside(distance: np.ndarray, edge: float = SOFT_EDGE) -> np.ndarray:
    """1 where the signed distance is negative, 0 where it is positive, a ramp of width `edge` between."""
    return np.clip(0.5 - distance / edge, 0, 1)


def ring(radius: np.ndarray, middle: float, half_width: float, edge: float) -> np.ndarray:
    return inside(np.abs(radius - middle) - half_width, edge)


def tint(rng: np.random.Generator, name: str, variation: float = 0.06) -> np.ndarray:
    """The named colour, varied a little in hue and in brightness."""
    hue = rng.normal(0, variation, 3) * 0.6
    return np.clip(
        np.array(COLOURS[name], np.float32) + hue + rng.normal(0, variation), 0.03, 0.97
    ).astype(np.float32)


def shaded(brightness: np.ndarray, colour) -> np.ndarray:
    """H x W brightness times one colour: H x W x 3."""
    return brightness[..., None] * np.asarray(colour, np.float32)


def paint(rgb: np.ndarray, where: np.ndarray, colour, opacity: float = 1.0) -> np.ndarray:
    """Lay a colour (or a picture) over `rgb` where `where` (H x W, 0 to 1) says so."""
    alpha = opacity * where[..., None]
    return rgb * (1 - alpha) + alpha * np.asarray(colour, np.float32)


def contrasting(brightness: float, dark: float, light: float, threshold: float) -> float:
    return dark if brightness > threshold else light


# Textures: (rng, u, v, colour) -> SIZE x SIZE x 3 ---------------------------------------------------------------


def carpet(rng, u, v, colour):
    weave = np.sin(u * 38) * np.sin(v * 38)
    return shaded(1 + 0.13 * weave + 0.16 * noise(rng, GRAIN) + 0.05 * noise(rng, MEDIUM), colour)


def grid(rng, u, v, colour):
    wire = np.clip((np.maximum(np.abs(np.sin(u * 11)), np.abs(np.sin(v * 11))) - 0.9) / 0.06, 0, 1)
    behind = np.array([0.12, 0.12, 0.13], np.float32) * rng.uniform(0.6, 1.6)
    return shaded(wire * (1 + 0.1 * noise(rng, FINE)), colour) + shaded(1 - wire, behind)


def leather(rng, u, v, colour):
    creases = np.abs(noise(rng, FINE)) * 0.6 + np.abs(noise(rng, MEDIUM)) * 0.4
    return shaded(0.78 + 0.28 * np.clip(creases, 0, 1.2) + 0.04 * noise(rng, COARSE), colour)


def tile(rng, u, v, colour):
    joint = np.clip(
        (np.maximum(np.abs(np.sin(u * 3.2)), np.abs(np.sin(v * 3.2))) - 0.985) / 0.01, 0, 1
    )
    glaze = 1 + 0.07 * np.clip(noise(rng, MEDIUM) * 3, -1, 1)
    return shaded(glaze * (1 - joint), colour) + (joint * np.float32(0.35))[..., None]


def wood(rng, u, v, colour):
    rings = u * 9 + 0.35 * noise(rng, CLOUDY) + 0.6 * np.sin(v * 1.3)
    return shaded(
        1 + 0.13 * np.sin(rings * 2.2) + 0.07 * np.sin(rings * 7.1 + 1) + 0.05 * noise(rng, GRAIN),
        colour,
    )


def marble(rng, u, v, colour):
    folds = u * 2.2 + 0.8 * noise(rng, CLOUDY) + 0.25 * noise(rng, COARSE)
    vein = 0.45 * np.exp(-9 * np.abs(np.sin(folds)))
    vein_colour = contrasting(colour.mean(), 0.25, 0.85, threshold=0.45)
    stone = 1 + 0.04 * noise(rng, COARSE)
    return shaded(stone * (1 - vein), colour) + (vein * np.float32(vein_colour))[..., None]


# Objects: (rng, body, colour) -> (SIZE x SIZE x 3, SIZE x SIZE coverage) -----------------------------------------


@dataclass(frozen=True)
class Body:
    """Coordinates on an object that lies turned and lit at random; its half-width is 1."""

    u: np.ndarray
    v: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    edge: float  # width of a soft edge
    light: float  # direction that the light comes from, radians
    shade: np.ndarray  # brightness: light from one side, slight grain
    second_colour: np.ndarray


def place_body(rng: np.random.Generator, half_width: float, x: float, y: float) -> Body:
    turn = rng.uniform(0, 2 * np.pi)
    u = ((ACROSS - x) * np.cos(turn) + (DOWN - y) * np.sin(turn)) / half_width
    v = (-(ACROSS - x) * np.sin(turn) + (DOWN - y) * np.cos(turn)) / half_width
    light = rng.uniform(0, 2 * np.pi)
    shade = 1 + 0.18 * (np.cos(light) * u + np.sin(light) * v) + 0.03 * noise(rng, FINE)
    second = tint(rng, ("white", "grey", "black", "yellow")[rng.integers(4)])
    return Body(
        u, v, np.hypot(u, v), np.arctan2(v, u), SOFT_EDGE / half_width, light, shade, second
    )


def bottle(rng, body, colour):
    """From above, as MVTec-AD photographs it: a rim, a wall, the dark inside."""
    r, edge = body.radius, body.edge
    brightness = body.shade * (
        0.75
        + 0.35 * ring(r, 0.86, 0.07, 2 * edge)
        - 0.35 * inside(r - 0.6, 2 * edge)
        + 0.2 * ring(r, 0.6, 0.03, edge)
    )
    rgb = shaded(brightness, colour) + 0.25 * ring(r, 0.93, 0.02, edge)[..., None]
    return rgb, inside(r - 1, edge)


def cable(rng, body, colour):
    """The cross-section: a sheath around three insulated copper wires."""
    edge = body.edge
    rgb = paint(
        shaded(body.shade, colour), inside(body.radius - 0.82, edge), (0.22 * body.shade)[..., None]
    )
    insulation = ("yellow", "blue", "red") if rng.random() < 0.5 else ("green", "grey", "brown")
    for k, name in enumerate(insulation):
        around = 2 * np.pi / 3 * k
        distance = np.hypot(body.u - 0.44 * np.cos(around), body.v - 0.44 * np.sin(around))
        rgb = paint(rgb, inside(distance - 0.36, edge), shaded(body.shade, COLOURS[name]))
        copper = shaded(body.shade * (1 + 0.2 * noise(rng, GRAIN)), (0.75, 0.45, 0.25))
        rgb = paint(rgb, inside(distance - 0.22, edge), copper)
    return rgb, inside(body.radius - 1, edge)


def capsule(rng, body, colour):
    """Two halves of different colour and a streak of gloss."""
    u, v = body.u, body.v
    coverage = inside(np.hypot(u - np.clip(u, -0.66, 0.66), v) - 0.34, body.edge)
    brightness = body.shade * (1.05 - 0.36 * (v / 0.34) ** 2) + 0.3 * np.exp(
        -(((v + 0.12) / 0.05) ** 2)
    )
    return paint(
        shaded(brightness, body.second_colour), inside(u, body.edge), shaded(brightness, colour)
    ), coverage


def hazelnut(rng, body, colour):
    """A ribbed shell, narrower on one side, with the pale cap it grew from."""
    u, v = body.u, body.v
    egg = np.sqrt((u / 0.95) ** 2 + (v / (0.8 - 0.12 * u)) ** 2)
    shell = body.shade * (1.1 - 0.35 * egg**2 + 0.1 * np.sin(np.arctan2(v, u + 0.9) * 40))
    cap = inside(0.55 - u + 0.048 * noise(rng, MEDIUM), 3 * body.edge)
    return paint(shaded(shell, colour), cap, shaded(body.shade, (0.72, 0.58, 0.4))), inside(
        egg - 1, body.edge
    )


def nut(rng, body, colour):
    """A hexagon with a round hole, seen from above."""
    u, v, edge = body.u, body.v, body.edge
    hexagon = (
        np.maximum(np.maximum(np.abs(u), np.abs(0.5 * u + 0.866 * v)), np.abs(0.5 * u - 0.866 * v))
        - 0.88
    )
    brightness = (
        body.shade * (1 + 0.12 * np.cos(6 * body.angle))
        + 0.15 * ring(body.radius, 0.55, 0.05, edge)
        - 0.15 * ring(hexagon, -0.06, 0.03, edge)
    )
    return shaded(brightness, colour), inside(hexagon, edge) * inside(0.46 - body.radius, edge)


def washer(rng, body, colour):
    r, edge = body.radius, body.edge
    brightness = (
        body.shade * (1 + 0.14 * np.cos(2 * body.angle + body.light))
        + 0.06 * noise(rng, GRAIN)
        - 0.15 * ring(r, 0.93, 0.03, edge)
    )
    return shaded(brightness, colour), inside(r - 1, edge) * inside(0.52 - r, edge)


def gear(rng, body, colour):
    """9 to 14 teeth around a small hole."""
    r, edge = body.radius, body.edge
    teeth = int(rng.integers(9, 15))
    outline = 0.86 + 0.12 * np.clip(np.sin(teeth * body.angle) * 3, -1, 1)
    brightness = body.shade * (1 + 0.1 * np.cos(2 * body.angle + body.light)) - 0.2 * ring(
        r, 0.6, 0.04, edge
    )
    return shaded(brightness, colour), inside(r - outline, edge) * inside(0.24 - r, edge)


def pill(rng, body, colour):
    """An oval tablet with a break line and a few reddish specks."""
    oval = np.sqrt(body.u**2 + (body.v / 0.64) ** 2)
    brightness = body.shade * (1.05 - 0.22 * oval**3) - 0.22 * inside(
        np.abs(body.u) - 0.025, body.edge
    )
    specks = (noise(rng, FINE) > 1.7).astype(np.float32)
    reddish = shaded(body.shade, colour * np.float32([1.0, 0.5, 0.4]))
    return paint(shaded(brightness, colour), specks, reddish, 0.5), inside(oval - 1, body.edge)


def screw(rng, body, colour):
    """From the side: head at u = 0.8, thread, point at u = -1."""
    u, v = body.u, body.v
    half_thickness = 0.15 + 0.035 * np.sin(u * 42)
    half_thickness = np.where(
        u < -0.75, half_thickness * np.clip((u + 1.02) / 0.27, 0, 1), half_thickness
    )
    shaft = np.maximum(np.abs(v) - half_thickness, np.abs(u + 0.2) - 0.82)
    head = np.maximum(np.abs(v) - 0.42 * np.clip((u - 0.3) / 0.3, 0.3, 1), np.abs(u - 0.78) - 0.2)
    brightness = (
        body.shade * (1.15 - 2.2 * np.minimum(v**2, 0.12))
        + 0.16 * np.sin(u * 42 + v * 4) * (u < 0.5)
        - 0.25 * inside(np.abs(u - 0.58) - 0.02, body.edge)
    )
    return shaded(brightness, colour), inside(np.minimum(shaft, head), body.edge)


def button(rng, body, colour):
    """A disc with a raised rim and two or four holes."""
    r, edge = body.radius, body.edge
    coverage = inside(r - 1, edge)
    holes = 4 if rng.random() < 0.5 else 2
    for k in range(holes):
        around = 2 * np.pi * k / holes
        coverage = coverage * inside(
            0.13 - np.hypot(body.u - 0.3 * np.cos(around), body.v - 0.3 * np.sin(around)), edge
        )
    brightness = body.shade * (1 - 0.18 * ring(r, 0.7, 0.05, 2 * edge)) + 0.1 * ring(
        r, 0.88, 0.05, 2 * edge
    )
    return shaded(brightness, colour), coverage


@dataclass(frozen=True)
class Category:
    """draw: one of the functions above; colours: names that it is seen in; upright: a texture whose lines stay
    within 0.3 radians of the picture's sides."""

    draw: Callable
    colours: tuple[str, ...]
    is_texture: bool = False
    upright: bool = False


CATEGORIES = {
    "carpet": Category(carpet, ANY_COLOUR, is_texture=True, upright=True),
    "grid": Category(grid, ("grey", "yellow", "white", "brown"), is_texture=True, upright=True),
    "leather": Category(leather, ("brown", "black", "red", "orange", "white"), is_texture=True),
    "tile": Category(
        tile, ("white", "grey", "blue", "green", "red"), is_texture=True, upright=True
    ),
    "wood": Category(wood, ("brown", "yellow", "orange", "grey"), is_texture=True),
    "marble": Category(marble, ("white", "grey", "green", "black"), is_texture=True),
    "bottle": Category(bottle, ("green", "brown", "blue", "white", "grey")),
    "cable": Category(cable, ("grey", "black", "white", "blue", "orange")),
    "capsule": Category(capsule, ANY_COLOUR),
    "hazelnut": Category(hazelnut, ("brown", "orange")),
    "nut": Category(nut, ("grey", "yellow", "black", "brown")),
    "pill": Category(pill, ("white", "yellow", "red", "blue", "green", "purple")),
    "screw": Category(screw, ("grey", "yellow", "black")),
    "washer": Category(washer, ("grey", "yellow", "brown", "black")),
    "gear": Category(gear, ("grey", "yellow", "brown", "black", "blue")),
    "button": Category(button, ANY_COLOUR),
}


# Defects: (rng, site) -> (SIZE x SIZE x 3, coverage, mask) -------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A surface with a random point on it where a defect shall be. Lengths in pixels."""

    rgb: np.ndarray
    coverage: np.ndarray
    colour: np.ndarray
    is_texture: bool
    x: float
    y: float
    reach: float  # unit of length of a defect: larger on larger things
    brightness: float  # mean over the surface
    distance: np.ndarray = field(repr=False)  # of every pixel from the point


def choose_site(rng, rgb, coverage, colour, is_texture, scale: float) -> Site:
    on_surface = coverage > 0.8
    rows, columns = np.nonzero(on_surface)
    k = rng.integers(len(rows))
    x, y = float(columns[k]), float(rows[k])
    reach = scale * (0.55 + 0.45 * np.sqrt(on_surface.sum()) / SIZE) * SIZE
    distance = np.hypot(COLUMNS - x, ROWS - y)
    return Site(
        rgb, coverage, colour, is_texture, x, y, reach, float(rgb[on_surface].mean()), distance
    )


def drawn(draw: Callable[[ImageDraw.ImageDraw], object]) -> np.ndarray:
    """What `draw` leaves on a black canvas when it draws in 255: SIZE x SIZE, 0 to 1."""
    canvas = Image.new("L", (SIZE, SIZE))
    draw(ImageDraw.Draw(canvas))
    return np.asarray(canvas, np.float32) / 255


def stroke(points: list[tuple[float, float]], width: int) -> np.ndarray:
    return drawn(lambda pen: pen.line(points, fill=255, width=width, joint="curve"))


def wander(
    rng, start, steps: int, length: float, angle: float, unrest: float
) -> list[tuple[float, float]]:
    """A path of `steps` steps, each `length` pixels long, whose direction changes by `unrest` radians at a time."""
    points = [start]
    for _ in range(steps):
        angle += rng.normal(0, unrest)
        x, y = points[-1]
        points.append((float(x + length * np.cos(angle)), float(y + length * np.sin(angle))))
    return points


def through_point(site: Site, angle: float, length: float) -> tuple[float, float]:
    """Where a stroke of that length has to start to have the site's point in its middle."""
    return site.x - length / 2 * np.cos(angle), site.y - length / 2 * np.sin(angle)


def scratch(rng, site):
    """One thin line, nearly straight, or two side by side; bright on dark ground, dark on bright ground."""
    angle = rng.uniform(0, 2 * np.pi)
    length = rng.uniform(0.25, 0.5) * site.reach
    start = through_point(site, angle, length)
    mask = stroke(wander(rng, start, 5, length / 5, angle, 0.12), int(rng.integers(2, 4)))
    if rng.random() < 0.5:
        beside = (start[0] + rng.uniform(-8, 8), start[1] + rng.uniform(-8, 8))
        mask = np.maximum(mask, stroke(wander(rng, beside, 5, length / 5 * 0.8, angle, 0.1), 2))
    mask = mask * site.coverage
    tone = contrasting(site.brightness, 0.15, 0.95, threshold=0.6)
    return paint(site.rgb, mask, tone, 0.8), site.coverage, mask


def crack(rng, site):
    """A jagged line with one to three branches."""
    angle = rng.uniform(0, 2 * np.pi)
    length = rng.uniform(0.3, 0.55) * site.reach
    trunk = wander(rng, through_point(site, angle, length), 8, length / 8, angle, 0.6)
    mask = stroke(trunk, int(rng.integers(2, 5)))
    for _ in range(rng.integers(1, 4)):
        fork = trunk[rng.integers(2, 7)]
        aside = angle + rng.choice([-1, 1]) * rng.uniform(0.6, 1.3)
        mask = np.maximum(mask, stroke(wander(rng, fork, 4, length / 11, aside, 0.5), 2))
    mask = mask * site.coverage
    tone = contrasting(site.brightness, 0.04, 0.85, threshold=0.22)
    return paint(site.rgb, mask, tone, 0.92), site.coverage, mask


def hole(rng, site):
    """A round opening with a bright rim."""
    radius = rng.uniform(0.06, 0.12) * site.reach
    distance = site.distance + 1.2 * noise(rng, MEDIUM)
    opening = np.clip((radius - distance) / 1.5 + 0.5, 0, 1) * site.coverage
    rim = np.clip(1 - np.abs(distance - radius - 1.5) / 1.5, 0, 1) * site.coverage
    tone = contrasting(site.brightness, 0.03, 0.75, threshold=0.2)
    rgb = paint(site.rgb + 0.3 * rim[..., None], opening, tone)
    return rgb, site.coverage, np.maximum(opening, 0.6 * rim)


def stain(rng, site):
    """An irregular translucent blot of dirt."""
    radius = rng.uniform(0.12, 0.22) * site.reach
    distance = (
        site.distance + 0.22 * radius * noise(rng, COARSE) + 0.1 * radius * noise(rng, MEDIUM)
    )
    mask = np.clip((radius - distance) / 4 + 0.5, 0, 1) * site.coverage
    dirt = ((0.2, 0.13, 0.06), (0.75, 0.72, 0.62), (0.1, 0.1, 0.1))[rng.integers(3)]
    if abs(np.mean(dirt) - site.brightness) < 0.2:  # would hardly be seen
        dirt = (0.12, 0.08, 0.04) if site.brightness > 0.35 else (0.8, 0.78, 0.7)
    return paint(site.rgb, mask, dirt, rng.uniform(0.6, 0.85)), site.coverage, mask


def spot(rng, site):
    """One to three round dots of a colour that differs from the surface's."""
    mask = np.zeros((SIZE, SIZE), np.float32)
    for k in range(int(rng.integers(1, 4))):
        x, y = site.x, site.y
        if k > 0:
            x, y = x + rng.normal(0, 0.12 * site.reach), y + rng.normal(0, 0.12 * site.reach)
        radius = rng.uniform(0.05, 0.1) * site.reach
        mask = np.maximum(mask, np.clip(radius - np.hypot(COLUMNS - x, ROWS - y) + 0.5, 0, 1))
    mask = mask * site.coverage
    vivid = ("red", "green", "blue", "yellow", "purple", "orange")
    different = [
        name for name in vivid if np.abs(np.array(COLOURS[name]) - site.colour).sum() > 0.7
    ]
    return (
        paint(site.rgb, mask, COLOURS[different[rng.integers(len(different))]], 0.9),
        site.coverage,
        mask,
    )


def dent(rng, site):
    """A hollow: light on one flank, shadow on the other, no edge."""
    radius = rng.uniform(0.1, 0.17) * site.reach
    light = rng.uniform(0, 2 * np.pi)
    slope = ((COLUMNS - site.x) * np.cos(light) + (ROWS - site.y) * np.sin(light)) / radius
    relief = 1.15 * slope * np.exp(-((site.distance / radius) ** 2)) * site.coverage
    rgb = site.rgb * (1 + 0.8 * relief[..., None]) + 0.3 * np.maximum(relief, 0)[..., None]
    return rgb, site.coverage, np.clip((1.15 - site.distance / radius) * 4, 0, 1) * site.coverage


def cut(rng, site):
    """A slit in a texture; a piece cut off an object (there the background shows, and the mask is what is gone)."""
    angle = rng.uniform(0, 2 * np.pi)
    if site.is_texture:
        along = (COLUMNS - site.x) * np.cos(angle) + (ROWS - site.y) * np.sin(angle)
        across = -(COLUMNS - site.x) * np.sin(angle) + (ROWS - site.y) * np.cos(angle)
        half_width = rng.uniform(0.035, 0.06) * site.reach
        half_length = rng.uniform(0.2, 0.32) * site.reach
        mask = np.clip((1 - np.abs(across) / half_width - (along / half_length) ** 2) * 3, 0, 1)
        tone = contrasting(site.brightness, 0.05, 0.8, threshold=0.2)
        return paint(site.rgb, mask, tone, 0.9), site.coverage, mask
    along = COLUMNS * np.cos(angle) + ROWS * np.sin(angle)
    limit = np.quantile(along[site.coverage > 0.8], 1 - rng.uniform(0.12, 0.28))
    gone = np.clip((along + 1.5 * noise(rng, MEDIUM) - limit) / 1.5 + 0.5, 0, 1)
    return site.rgb, site.coverage * (1 - gone), site.coverage * gone


def broken(rng, site):
    """A shard: a polygon whose surface is shifted and darkened, outlined and crossed by cracks."""
    corners = int(rng.integers(4, 7))
    radius = rng.uniform(0.14, 0.22) * site.reach
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners)) + np.linspace(0, 0.6, corners)
    points = [
        (
            float(site.x + radius * rng.uniform(0.7, 1.2) * np.cos(angle)),
            float(site.y + radius * rng.uniform(0.7, 1.2) * np.sin(angle)),
        )
        for angle in angles
    ]

    def cracks(pen):
        pen.line([*points, points[0]], fill=255, width=2)
        for corner in points[:3]:
            pen.line([(site.x, site.y), corner], fill=255, width=2)

    shard = drawn(lambda pen: pen.polygon(points, fill=255)) * site.coverage
    lines = drawn(cracks) * site.coverage
    shift = [int(rng.integers(3, 8)) * int(rng.choice([-1, 1])) for _ in range(2)]
    shifted = np.roll(site.rgb, shift, axis=(1, 0)) * rng.uniform(0.55, 0.8)
    tone = contrasting(site.brightness, 0.04, 0.85, threshold=0.22)
    rgb = paint(paint(site.rgb, shard, shifted), lines, tone, 0.9)
    return rgb, site.coverage, np.maximum(shard, lines)


DEFECTS = {
    "scratch": scratch,
    "crack": crack,
    "hole": hole,
    "stain": stain,
    "spot": spot,
    "dent": dent,
    "cut": cut,
    "broken": broken,
}
DEFECT_SCALE = (0.9, 1.5)
DEFECT_THRESHOLD = 0.35  # a pixel belongs to the mask where the defect is at least this strong
SMALLEST_DEFECT = 25  # pixels; a smaller one is drawn again elsewhere, up to 8 times


def add_defect(rng, name, rgb, coverage, colour, is_texture):
    scale = rng.uniform(*DEFECT_SCALE)
    for _ in range(8):
        result = DEFECTS[name](rng, choose_site(rng, rgb, coverage, colour, is_texture, scale))
        if (result[2] > DEFECT_THRESHOLD).sum() >= SMALLEST_DEFECT:
            break
    return result


# The picture ----------------------------------------------------------------------------------------------------


def background(rng: np.random.Generator, name: str) -> np.ndarray:
    """A plain ground, lit from one side, in 40 % of the cases with one to three foreign bodies on it."""
    cluttered = rng.random() < 0.4
    colour = tint(rng, name, 0.05)
    light = rng.uniform(0, 2 * np.pi)
    grain = rng.uniform(0.01, 0.06) * noise(rng, int(rng.integers(0, 4)))
    rgb = shaded(1 + 0.12 * (ACROSS * np.cos(light) + DOWN * np.sin(light)) + grain, colour)
    if not cluttered:
        return rgb

    def clutter(pen):
        for _ in range(rng.integers(1, 4)):
            x, y = rng.uniform(0, SIZE, 2)
            shape = ("line", "disc", "box")[rng.integers(3)]
            if shape == "line":
                end = x + rng.normal(0, 30), y + rng.normal(0, 30)
                pen.line([x, y, *end], fill=255, width=int(rng.integers(1, 4)))
            elif shape == "disc":
                r = rng.uniform(2, 7)
                pen.ellipse([x - r, y - r, x + r, y + r], fill=255)
            else:
                w, h = rng.uniform(3, 10, 2)
                pen.rectangle([x - w, y - h, x + w, y + h], fill=255)

    where = drawn(clutter)
    opacity = rng.uniform(0.5, 0.95)
    return paint(rgb, where, tint(rng, ANY_COLOUR[rng.integers(len(ANY_COLOUR))]), opacity)


def background_names(colour: str) -> list[str]:
    """The backgrounds on which an object of that colour can be told from its ground."""
    pale = ("grey", "white")
    return [
        name for name in BACKGROUNDS if name != colour and not (colour in pale and name in pale)
    ]


def texture_surface(rng, category: Category, colour, attribute):
    scale = rng.uniform(0.85, 1.2)
    scale *= {"large": 1.6, "close-up": 1.6, "small": 0.6, "cropped": 1.25}.get(attribute, 1.0)
    turn = rng.uniform(-0.3, 0.3) if category.upright else rng.uniform(0, np.pi)
    u = (ACROSS * np.cos(turn) + DOWN * np.sin(turn)) / scale + rng.uniform(0, 3)
    v = (-ACROSS * np.sin(turn) + DOWN * np.cos(turn)) / scale + rng.uniform(0, 3)
    return category.draw(rng, u, v, colour), np.ones((SIZE, SIZE), np.float32)


# attribute: range of the half-width and largest offset from the centre, both relative to the picture's half
FRAMING = {
    "large": (0.82, 0.93, 0.12),
    "small": (0.38, 0.5, 0.3),
    "close-up": (1.0, 1.25, 0.12),
    "cropped": (0.75, 0.95, 0.6),
}


def object_surface(rng, category: Category, colour, attribute):
    smallest, largest, offset = FRAMING.get(attribute, (0.62, 0.78, 0.12))
    half_width = rng.uniform(smallest, largest)
    body = place_body(rng, half_width, rng.uniform(-offset, offset), rng.uniform(-offset, offset))
    return category.draw(rng, body, colour)


def photograph(rng: np.random.Generator, scene: np.ndarray, attribute: str | None) -> np.ndarray:
    """Exposure, focus, sensor noise and compression: SIZE x SIZE x 3 uint8."""
    if attribute == "bright":
        scene = scene * rng.uniform(1.35, 1.6) + 0.08
    scene = scene * (rng.uniform(0.35, 0.5) if attribute == "dark" else rng.uniform(0.9, 1.1))
    if attribute == "blurry":
        sigma = rng.uniform(1.1, 1.7)
        scene = gaussian_filter(scene, (sigma, sigma, 0))
    scene = scene + rng.normal(0, 0.01, (SIZE, SIZE, 1)).astype(np.float32)
    image = (np.clip(scene, 0, 1) * 255).astype(np.uint8)
    if attribute == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(7, 16)))
        image = np.asarray(Image.open(buffer).convert("RGB"))
    return image


def draw_attribute(rng: np.random.Generator) -> str | None:
    """None in 45 % of the cases, otherwise one of `ATTRIBUTES`, each as likely as the others."""
    return None if rng.random() < PLAIN_SHARE else ATTRIBUTES[rng.integers(len(ATTRIBUTES))]


def render(
    rng: np.random.Generator, category: str, defect: str | None = None, attribute: str | None = None
) -> Rendering:
    """One picture of `category`, without a defect or with the named one; everything else is drawn from `rng`.

    Attributes change the framing (cropped, close-up, large, small: an object's size and place, a texture's scale),
    the exposure (bright, dark), the focus (blurry) or the file (jpeg: quality 7 to 15, then decoded).

    Raises ValueError for a name that this world does not know.

    >>> picture = render(np.random.default_rng(0), "screw", defect="crack")
    >>> picture.image.shape, bool(picture.mask.any()), bool((picture.mask & ~picture.object_mask).any())
    ((96, 96, 3), True, False)
    """
    for value, known, what in (
        (category, CATEGORIES, "category"),
        (defect, (None, *DEFECTS), "defect"),
        (attribute, (None, *ATTRIBUTES), "attribute"),
    ):
        if value not in known:
            raise ValueError(
                f"the demo world has no {what} {value!r}; it has {', '.join(filter(None, known))}"
            )
    kind = CATEGORIES[category]
    colour_name = kind.colours[rng.integers(len(kind.colours))]
    colour = tint(rng, colour_name)
    ground_name = ground = None
    if kind.is_texture:
        rgb, coverage = texture_surface(rng, kind, colour, attribute)
    else:
        choices = background_names(colour_name)
        ground_name = choices[rng.integers(len(choices))]
        ground = background(rng, ground_name)
        rgb, coverage = object_surface(rng, kind, colour, attribute)
    object_mask = coverage > 0.5
    mask = np.zeros((SIZE, SIZE), bool)
    if defect is not None:
        rgb, coverage, strength = add_defect(rng, defect, rgb, coverage, colour, kind.is_texture)
        mask = (strength > DEFECT_THRESHOLD) & object_mask
    scene = (
        rgb if ground is None else rgb * coverage[..., None] + ground * (1 - coverage[..., None])
    )
    facts = Facts(category, colour_name, ground_name, attribute, defect)
    return Rendering(photograph(rng, scene, attribute), mask, object_mask, facts)
