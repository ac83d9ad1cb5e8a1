"""What a Sounding Shapes clip shows and plays: random scenes of shapes, their pictures and sounds.

Every shape has a timbre of its own, and loudness follows the visible pulsing of an object. Which object
sounds is drawn last and independently, so nothing visible gives it away.

A scene of "binding" has moving objects of distinct shapes, and pitch follows their height on screen: one
frame and the sound name the one that sounds. In one of "synchrony" the objects have one shape and one pitch,
so that only *when* they are large and loud tells them apart. They rest in the middle of the scene, where a
reader of one frame looks: large and loud by half, all of them. This frame and the sound are at chance, and so
are the pictures alone and the sound alone. A frame from elsewhere, with the sound, does tell something, and
must: if each were at chance, so would be any evidence that adds up over frames.

(0, 0) is the top left and (1, 1) the bottom right of the square frame; lengths are shares of its side.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...choices import SceneKind

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RGB = {
    "red": (235, 50, 45),
    "yellow": (240, 210, 40),
    "green": (45, 200, 70),
    "cyan": (40, 210, 225),
    "blue": (60, 90, 245),
    "magenta": (225, 60, 215),
}
COLOURS = tuple(RGB)

LOW, HIGH = 0.125, 0.875  # centres stay in the middle 75 %, so that crops rarely lose an object
BOTTOM_PITCH, TOP_PITCH = 150.0, 1500.0  # Hz, at those two heights
OVERLAP = 0.02  # two outlines may come this far into each other
CANDIDATES = 400  # motions tried for a scene
STRIKES = 4  # of the plucked timbre in every visible pulse
OBJECTS = {"binding": 3, "synchrony": 4}  # of a scene, unless a number is asked for
REST = 0.25  # of a scene of synchrony: where the middles of all windows of 3 out of 4 seconds fall
SLOT = 0.375  # seconds for which its objects stay large or small, about as many as between 8 frames of 3 s
RAMP = 0.1  # seconds from one to the other
RHYTHMS = 30  # tried for such a scene


@dataclass(frozen=True)
class MovingShape:
    """An object that swings about `centre` and pulses in size and light; rates in Hz, phases in radians."""

    shape: str
    colour: str
    size: float  # radius, between pulses
    centre: tuple[float, float]  # x, y
    swing: tuple[float, float]  # how far it moves from the centre
    swing_rate: tuple[float, float]
    swing_phase: tuple[float, float]
    pulse_rate: float
    pulse_phase: float

    def position(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x and y of its centre at `times` (seconds)."""
        axes = zip(self.centre, self.swing, self.swing_rate, self.swing_phase, strict=True)
        return tuple(_swing(*axis, times) for axis in axes)

    def pulse(self, times: np.ndarray) -> np.ndarray:
        """0 (smallest, darkest, softest) to 1 (largest, brightest, loudest)."""
        return 0.5 - 0.5 * np.cos(2 * np.pi * self.pulse_rate * times + self.pulse_phase)

    def strikes(self, times: np.ndarray) -> np.ndarray:
        """How often it was struck, if its timbre is plucked."""
        return STRIKES * (self.pulse_rate * times + self.pulse_phase / (2 * np.pi))

    def radius(self, times: np.ndarray) -> np.ndarray:
        return self.size * (0.8 + 0.4 * self.pulse(times))

    def pitch(self, times: np.ndarray) -> np.ndarray:
        """Hz, from the height on screen: 1500 at the top of the middle 75 %, 150 at its bottom, log scale."""
        _, y = self.position(times)
        return BOTTOM_PITCH * (TOP_PITCH / BOTTOM_PITCH) ** ((HIGH - y) / (HIGH - LOW))


@dataclass(frozen=True)
class SwitchingShape:
    """An object that stands still, and changes between small and large at moments of its own."""

    shape: str
    colour: str
    size: float
    centre: tuple[float, float]  # x, y
    tone: float  # Hz
    changes: tuple[float, ...]  # seconds
    levels: tuple[float, ...]  # of the pulse, before, between and after them

    def position(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.full(len(times), place) for place in self.centre)

    def pulse(self, times: np.ndarray) -> np.ndarray:
        return _pulse(self.changes, self.levels, times)

    def strikes(self, times: np.ndarray) -> np.ndarray:
        return 2 * STRIKES * times

    def radius(self, times: np.ndarray) -> np.ndarray:
        return self.size * (0.6 + 0.6 * self.pulse(times))

    def pitch(self, times: np.ndarray) -> np.ndarray:
        return np.full(len(times), self.tone)


@dataclass(frozen=True)
class ShapeScene:
    """Objects from back to front, which of them sound (the first gives the labels), and the background."""

    objects: tuple[MovingShape, ...] | tuple[SwitchingShape, ...]
    sounding: tuple[int, ...]
    background: dict  # see `_background`


def sample_scene(
    rng: np.random.Generator,
    *,
    scene: SceneKind = "binding",
    objects: int | None = None,
    sounding: int = 1,
    seconds: float = 4.0,
) -> ShapeScene:
    """Draw a scene of objects in distinct colours, by default as many as OBJECTS says; rounded, so that JSON
    keeps it exactly.
    """
    if scene not in OBJECTS:
        raise ValueError(f"scene must be one of {tuple(OBJECTS)}, got {scene!r}")
    objects = OBJECTS[scene] if objects is None else objects
    things = (_moving if scene == "binding" else _switching)(rng, objects, seconds)
    background = {
        "dark": _rounded(rng.uniform(25, 65, 3)),
        "light": _rounded(rng.uniform(150, 190, 3)),
        "angle": _rounded(rng.uniform(0, 2 * np.pi)),
        "waves": [_rounded(wave) for wave in rng.uniform((-1.5, -1.5, 0), (1.5, 1.5, 2 * np.pi), (2, 3))],
    }
    chosen = rng.permutation(objects)[:sounding]  # last, from nothing that was drawn before
    return ShapeScene(things, tuple(int(n) for n in chosen), background)


def _moving(rng: np.random.Generator, objects: int, seconds: float) -> tuple[MovingShape, ...]:
    """Objects of distinct shapes and colours."""
    shapes = rng.permutation(len(SHAPES))[:objects]
    colours = rng.permutation(len(COLOURS))[:objects]
    many = (CANDIDATES, objects)
    size = rng.uniform(0.105, 0.155, many)
    swing = rng.uniform(0.04, 0.22, (*many, 2))
    centre = rng.uniform(LOW + swing, HIGH - swing)
    swing_rate = rng.uniform(0.08, 0.25, (*many, 2))
    swing_phase = rng.uniform(0, 2 * np.pi, (*many, 2))
    best = _most_apart(size, centre, swing, swing_rate, swing_phase, seconds)
    pulse_rate = rng.uniform(1.0, 2.5, objects)  # Hz: 4 frames or more a pulse at 10 frames per second
    pulse_phase = rng.uniform(0, 2 * np.pi, objects)
    motion = dict(size=size, centre=centre, swing=swing, swing_rate=swing_rate, swing_phase=swing_phase)
    motion = {name: values[best] for name, values in motion.items()}
    return _objects(MovingShape, shapes, colours, **motion, pulse_rate=pulse_rate, pulse_phase=pulse_phase)


def _switching(rng: np.random.Generator, objects: int, seconds: float) -> tuple[SwitchingShape, ...]:
    """Objects of one shape and pitch, in distinct colours."""
    shape, colours = rng.integers(len(SHAPES)), rng.permutation(len(COLOURS))[:objects]
    many = (CANDIDATES, objects)
    size = rng.uniform(0.105, 0.155, many)
    centre = rng.uniform(LOW, HIGH, (*many, 2))
    still = np.zeros_like(centre)
    best = _most_apart(size, centre, still, still, still, seconds)
    tone = BOTTOM_PITCH * (TOP_PITCH / BOTTOM_PITCH) ** rng.uniform()
    changes, levels = _most_different(*_rhythms(rng, objects, seconds), seconds)
    own = dict(size=size[best], centre=centre[best], changes=changes, levels=levels)
    return _objects(SwitchingShape, [shape] * objects, colours, tone=[tone] * objects, **own)


def _objects(kind: type, shapes: Sequence[int], colours: Sequence[int], **drawn: Sequence) -> tuple:
    """Objects of a kind, given what was drawn for each: its shape, its colour and its other fields."""
    return tuple(
        kind(SHAPES[shapes[n]], COLOURS[colours[n]], **{name: _rounded(of[n]) for name, of in drawn.items()})
        for n in range(len(shapes))
    )


def _rhythms(rng: np.random.Generator, objects: int, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Changes (RHYTHMS, objects, 2 * slots) and levels (RHYTHMS, objects, 2 * slots + 1) of uneven slots
    before and after the rest. Every object is large in one half of them.
    """
    many = (RHYTHMS, objects)
    before = (1 - REST) / 2 * seconds - RAMP / 2
    slots = max(1, round(before / SLOT))
    length = before / slots
    to_rest = np.arange(1, slots + 1) * length
    uneven = np.repeat([0.25 * length, 0, 0.25 * length], [slots - 1, 2, slots - 1])  # the rest is for all
    changes = np.concatenate([to_rest, seconds - to_rest[::-1]])
    changes = changes + uneven * rng.uniform(-1, 1, (*many, 2 * slots))
    levels = rng.permuted(np.tile([0.0, 1.0], (*many, slots)), axis=2)
    return changes, np.insert(levels, slots, 0.5, axis=2)


def _most_different(changes: np.ndarray, levels: np.ndarray, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Of all rhythms those whose two most alike objects are least alike, by the correlation of pulses."""
    times = np.arange(0, seconds, 0.05)
    alike = []
    for own in zip(changes, levels, strict=True):
        pulses = np.array([_pulse(*one, times) for one in zip(*own, strict=True)])
        alike.append(np.triu(np.atleast_2d(np.corrcoef(pulses)), k=1).max())
    best = int(np.argmin(alike))
    return changes[best], levels[best]


def _pulse(changes, levels, times: np.ndarray) -> np.ndarray:
    """The level at each time, with a ramp at each change."""
    ramps = np.add.outer(changes, (-RAMP / 2, RAMP / 2)).ravel()
    return np.interp(times, ramps, np.repeat(levels, 2)[1:-1])


def shape_from(fields: dict) -> MovingShape | SwitchingShape:
    """The object whose fields a manifest holds, besides others."""
    kind = MovingShape if "swing" in fields else SwitchingShape
    return kind(**{field.name: fields[field.name] for field in dataclasses.fields(kind)})


def _swing(centre, swing, rate, phase, times):
    return centre + swing * np.sin(2 * np.pi * rate * times + phase)


def _most_apart(size, centre, swing, rate, phase, seconds) -> int:
    """The first candidate whose objects never overlap much, or else the one that overlaps least."""
    times = np.arange(0, seconds, 0.2)
    places = _swing(*(a[..., None] for a in (centre, swing, rate, phase)), times)  # (..., objects, 2, times)
    first, second = np.triu_indices(size.shape[1], k=1)
    if not len(first):
        return 0
    apart = np.linalg.norm(places[:, first] - places[:, second], axis=2).min(-1)  # (candidates, pairs)
    free = apart - 1.2 * (size[:, first] + size[:, second]) + OVERLAP
    return int(np.minimum(free.min(-1), 0).argmax())


def _rounded(value):
    return tuple(np.round(value, 4).tolist()) if np.ndim(value) else float(np.round(value, 4))


# --- pictures -----------------------------------------------------------------------------------------------


def draw(scene: ShapeScene, times: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Anti-aliased pictures of the scene at `times`, and which pixels show each sounding object.

    Returns:
        frames (T, size, size, 3) uint8, and masks (S, T, size, size) bool in the order of `scene.sounding`:
        the pixels of which more than half shows the object, given what is in front of it.
    """
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    frames = np.repeat(_background(scene.background, pixels)[None], len(times), axis=0)  # (T, size, size, 3)
    visible = np.zeros((len(scene.objects), len(times), size, size), np.float32)
    for n, thing in enumerate(scene.objects):
        x, y = (place.astype(np.float32)[:, None] for place in thing.position(times))
        radius = thing.radius(times).astype(np.float32)[:, None]
        columns, rows = (_reach(place, radius, size) for place in (x, y))  # it never leaves them
        across, down = ((pixels[columns] - x) / radius)[:, None, :], ((pixels[rows] - y) / radius)[:, :, None]
        distance = OUTLINES[thing.shape](across, down) * radius[..., None] * size  # pixels; below 0 is inside
        coverage = np.clip(0.5 - distance, 0, 1)
        light = (0.7 + 0.3 * thing.pulse(times).astype(np.float32))[:, None, None] * (0.9 - 0.15 * down)
        colour = np.clip(light[..., None] * np.float32(RGB[thing.colour]), 0, 255)
        under = frames[:, rows, columns]
        under += coverage[..., None] * (colour - under)
        visible[:n, :, rows, columns] *= 1 - coverage
        visible[n, :, rows, columns] = coverage
    return np.round(frames).astype(np.uint8), visible[list(scene.sounding)] > 0.5


def _reach(place: np.ndarray, radius: np.ndarray, size: int) -> slice:
    """The pixels, along one axis, that an outline of at most 1.3 radii ever comes to."""
    low, high = (place - 1.3 * radius).min() * size - 1, (place + 1.3 * radius).max() * size + 1
    return slice(max(math.floor(low), 0), math.ceil(high))


def _background(background: dict, pixels: np.ndarray) -> np.ndarray:
    """(size, size, 3): a ramp from dark to light grey, hardly ever flat, or H.264's noise would stand out."""
    x, y = pixels[None, :], pixels[:, None]
    across, down = np.cos(background["angle"]), np.sin(background["angle"])
    ramp = 0.5 + ((x - 0.5) * across + (y - 0.5) * down) / (abs(across) + abs(down))
    for rate_x, rate_y, phase in background["waves"]:
        ramp = ramp + 0.06 * np.sin(2 * np.pi * (rate_x * x + rate_y * y) + phase)
    dark, light = (np.float32(background[end]) for end in ("dark", "light"))
    return dark + (light - dark) * ramp[..., None].astype(np.float32)


# Signed distances to outlines of about unit radius; y points down.


def _star(x, y):
    point = 2 * np.pi / 5
    angle = np.arctan2(x, -y)  # 0 is up
    folded = abs((angle + point / 2) % point - point / 2)  # between a tip (0) and the notch beside it
    return np.hypot(x, y) * np.cos(folded - 1.17) - 0.47  # straight from a tip at 1.2 to a notch at 0.55


def _cross(x, y):
    x, y = abs(x), abs(y)
    return np.minimum(np.maximum(x - 1, y - 0.34), np.maximum(y - 1, x - 0.34))


OUTLINES: dict[str, Callable] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.86,
    "triangle": lambda x, y: np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.6,
    "star": _star,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.72) - 0.28,
    "cross": _cross,
}


# --- sounds -------------------------------------------------------------------------------------------------


def play(scene: ShapeScene, seconds: float, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Sounds of the sounding objects: (S, seconds * sample_rate) int16, in the order of `scene.sounding`.

    Their sum stays within 80 % of full scale. `rng` is drawn from by the noise timbre only.
    """
    times = np.arange(round(seconds * sample_rate)) / sample_rate
    fade = np.clip(np.minimum(times, times[::-1]) / 0.01, 0, 1)  # no click at either end
    stems = []
    for thing in (scene.objects[n] for n in scene.sounding):
        pitch = thing.pitch(times)
        loudness = 10 ** ((thing.pulse(times) - 1) * 18 / 20)  # over 18 dB
        stem = TIMBRES[thing.shape](thing, times, pitch, sample_rate, rng) * loudness * fade
        stems.append(0.8 / len(scene.sounding) * stem / abs(stem).max())
    return np.round(32767 * np.stack(stems)).astype(np.int16)


def _turns(pitch, sample_rate):
    """Phase of a tone of changing pitch, in radians: the running sum, so that it never jumps."""
    return 2 * np.pi * np.cumsum(pitch) / sample_rate


def _harmonics(pitch, sample_rate, amplitude):
    """A tone whose overtone n has `amplitude(n)`; all there are, faded out towards where they would alias.

    High overtones also keep the spectrogram from being empty, with nothing but noise to reconstruct.
    """
    tone = step = np.exp(1j * _turns(pitch, sample_rate))
    room = 0.5 * sample_rate / pitch
    total = np.zeros(len(pitch))
    for n in range(1, math.ceil(room.max())):
        total += amplitude(n) * np.clip((room - n) / (0.1 * room), 0, 1) * tone.imag
        tone = tone * step
    return total


def _flute(thing, times, pitch, sample_rate, rng):
    """Nearly a pure tone: the overtones are faint."""
    return _harmonics(pitch, sample_rate, lambda n: n**-2.5)


def _clarinet(thing, times, pitch, sample_rate, rng):
    """Odd harmonics only."""
    return _harmonics(pitch, sample_rate, lambda n: n % 2 / n)


def _bell(thing, times, pitch, sample_rate, rng):
    """Frequency modulation at 1.41 times the pitch: inharmonic partials at |1 + 1.41 n| times the pitch."""
    turns = _turns(pitch, sample_rate)
    return np.sin(turns + np.clip(1200 / pitch, 1, 3) * np.sin(1.41 * turns))


def _plucked(thing, times, pitch, sample_rate, rng):
    """A string struck again and again; high overtones die first."""
    since = thing.strikes(times) % 1  # 0 to 1 between strikes
    ends = np.clip(np.minimum(since / 0.03, (1 - since) / 0.05), 0, 1)
    return ends * _harmonics(pitch, sample_rate, lambda n: np.exp(-(2 + 0.5 * n) * since) / n)


def _breath(thing, times, pitch, sample_rate, rng):
    """Noise in a band of about an octave around twice the pitch."""
    turns = _turns(pitch, sample_rate)
    halves = turns / np.pi  # noise that is new at every half cycle: the higher the pitch, the wider the band
    noise = rng.normal(size=(math.ceil(halves[-1]) + 1, 2)).view(complex)[:, 0]
    noise = np.interp(halves, np.arange(len(noise)), noise)
    noise /= np.sqrt(1 + abs(noise) ** 2)  # rare peaks would make the rest soft
    return (noise * np.exp(2j * turns)).real


def _siren(thing, times, pitch, sample_rate, rng):
    """All harmonics, with a vibrato of 5 % at 5 Hz."""
    vibrato = 1 + 0.05 * np.sin(2 * np.pi * 5 * times)
    return _harmonics(pitch * vibrato, sample_rate, lambda n: n**-0.7)


TIMBRES: dict[str, Callable] = {
    "circle": _flute,
    "square": _clarinet,
    "triangle": _bell,
    "star": _plucked,
    "ring": _breath,
    "cross": _siren,
}
