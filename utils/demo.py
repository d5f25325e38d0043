"""Built-in demo data: eleven gesture-like motions of a simulated hand before a simulated event camera.

Only numpy is used, nothing is downloaded, and every sample is a pure function of (gesture, subject, trial, seed).

What makes it a test of motion: the gestures come in four groups (circles, approach/recede, sideways, up and down).
Inside a group all motions sweep the same region, and each motion ends where it began, so that every pixel brightens
as often as it darkens. Counts of ON and OFF events per pixel therefore tell the groups apart but not the gestures of
one group; only the order of the events does.
"""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

# In alphabetical order: the label is then the same whether it is a folder's number (layout "gesture") or the rank of a
# folder's name (layout "folders"), and the first K gestures are the labels 0..K-1 in both.
GESTURES: tuple[str, ...] = (
    "circle_alternating",
    "circle_ccw",
    "circle_cw",
    "pull",
    "push",
    "swipe_down",
    "swipe_left",
    "swipe_right",
    "swipe_up",
    "wave_horizontal",
    "wave_vertical",
)
SENSOR = 128  # the simulated camera has SENSOR x SENSOR pixels
TRAIN_SUBJECTS: tuple[int, ...] = tuple(range(12))
TEST_SUBJECTS: tuple[int, ...] = tuple(range(12, 16))
TRIALS = 2  # recordings of each gesture by each subject
SEED = 2023
VERSION = 1  # part of the directory's name: raise it with every change of the generator, so that old sets are not used

_HAND_RESOLUTION = 96  # pixels along one side of a subject's hand picture, which covers [-1, 1] x [-1, 1]
_INSTANTS_PER_CYCLE = 40  # how often the scene is looked at while the hand makes its motion once


def _random(*key: int) -> np.random.Generator:
    """A generator of its own for every key, so that no sample depends on which were made before it."""
    return np.random.default_rng(key)


@functools.lru_cache(maxsize=64)
def _hand_picture(subject: int, seed: int) -> np.ndarray:
    """Brightness of a subject's upright hand against the background, 0 to 1: float32 [R, R], rows from top to bottom.

    A palm (ellipse) with a thumb and four fingers (rounded bars); shape, spread, tilt and handedness are the subject's.
    """
    rng = _random(seed, 0, subject)
    v, u = np.meshgrid(*(np.linspace(-1, 1, _HAND_RESOLUTION),) * 2, indexing="ij")
    tilt = rng.normal(0, 0.2)
    u, v = np.cos(tilt) * u + np.sin(tilt) * v, np.cos(tilt) * v - np.sin(tilt) * u
    if rng.random() < 0.3:  # left-handed
        u = -u
    palm_width, palm_height = rng.uniform(0.38, 0.5), rng.uniform(0.38, 0.5)
    # Distance from the outline, negative inside, in units of half the picture.
    distance = (np.hypot(u / palm_width, (v - 0.35) / palm_height) - 1) * min(palm_width, palm_height)
    spread, length, thickness = rng.uniform(0.15, 0.3), rng.uniform(0.55, 0.8), rng.uniform(0.08, 0.12)
    angles = [-1.1, *(spread * np.arange(-1.5, 2))]  # the thumb, then the fingers; 0 points up
    lengths = [0.75 * length, *(length * np.array([0.85, 1.0, 0.97, 0.8]))]
    for angle, bar in zip(angles, lengths, strict=True):
        root_u, root_v = 0.8 * palm_width * np.sin(angle), 0.35 - 0.8 * palm_height * np.cos(angle)
        along = np.clip((u - root_u) * np.sin(angle) - (v - root_v) * np.cos(angle), 0, bar)
        bar_distance = np.hypot(u - root_u - along * np.sin(angle), v - root_v + along * np.cos(angle)) - thickness
        distance = np.minimum(distance, bar_distance)
    return (1 / (1 + np.exp(distance / 0.025))).astype(np.float32)


# A motion maps the phase (0 to 1 is once through; shape [N]) to the centre of the hand and its size. Centre: in units
# of the path's half length; size: a factor. All of them are periodic, so a recording may start at any phase.
_Motion = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _triangle(phase: np.ndarray) -> np.ndarray:
    """There and back at constant speed: -1 at phase 0, +1 at phase 1/2."""
    return 1 - 4 * np.abs(phase % 1 - 0.5)


def _pull(phase: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hand enters the picture large, from the side, and then recedes until nothing is left of it."""
    phase = phase % 1
    entering = phase < 0.4
    x = np.where(entering, 1 - phase / 0.4, 0)
    size = np.where(entering, 1.0, 1 - (phase - 0.4) / 0.6)
    return x, np.zeros_like(x), size


def _along_path(position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return position, np.zeros_like(position), np.ones_like(position)


def _around(turn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """On a circle; y points down, so that growing turns are clockwise for the viewer."""
    return np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn), np.ones_like(turn)


def render_events(gesture: int, subject: int, trial: int, seed: int = SEED) -> dict[str, np.ndarray]:
    """One recording: the events of a 128 x 128 camera, a pure function of the arguments.

    Returns arrays of equal length, in the order of time: `t` (int64, microseconds, from 0, ascending), `x` and `y`
    (int16, 0..127, y downwards), `p` (int8: 1 brighter, 0 darker).
    """
    if not 0 <= gesture < len(GESTURES):
        raise ValueError(f"gesture {gesture} is out of range: there are {len(GESTURES)}, numbered from 0")
    if subject < 0 or trial < 0:
        raise ValueError(f"subject {subject} and trial {trial} must not be negative")
    name = GESTURES[gesture]
    # What belongs to the person is drawn before, and apart from, what belongs to the recording.
    person = _random(seed, 1, subject)
    hand_size = person.uniform(34, 44)  # pixels from the centre to the finger tips
    pace = person.uniform(0.5, 0.9)  # seconds for one motion
    thresholds_crossed = person.uniform(1.5, 2.5)  # contrast of the skin over the camera's threshold
    rng = _random(seed, 2, subject, gesture, trial)
    hand_size *= rng.uniform(0.9, 1.1)
    pace *= rng.uniform(0.8, 1.25)
    start = rng.random()
    cycles = 2

    # Where the hand is at every instant.
    phase = start + np.linspace(0, cycles, cycles * _INSTANTS_PER_CYCLE + 1)
    direction, half_length = rng.normal(0, 0.1), SENSOR / 2 + hand_size  # past the border: the hand leaves the picture
    if name.startswith("swipe"):
        # At the end of a stroke the hand is out of sight, and returns there to the side where it began.
        along, across, size = _along_path(2 * (phase % 1) - 1)
        direction += {"right": 0.0, "down": 0.5, "left": 1.0, "up": 1.5}[name.removeprefix("swipe_")] * np.pi
    elif name.startswith("wave"):
        along, across, size = _along_path(_triangle(phase))
        direction += 0.5 * np.pi * (name == "wave_vertical")
    elif name.startswith("circle"):
        turn = _triangle(phase) / 2 if name == "circle_alternating" else phase if name == "circle_cw" else -phase
        along, across, size = _around(turn)
        direction, half_length = 2 * np.pi * rng.random(), rng.uniform(26, 34)
    else:  # a pull backwards in time is a push: the hand comes nearer and then leaves the picture
        along, across, size = _pull(phase if name == "pull" else -phase)
        direction, hand_size = 0.5 * np.pi * rng.integers(4) + direction, 1.3 * hand_size
        half_length += 0.3 * hand_size
    middle = SENSOR / 2 + rng.normal(0, 4, 2)
    centre_x = middle[0] + half_length * (along * np.cos(direction) - across * np.sin(direction))
    centre_y = middle[1] + half_length * (along * np.sin(direction) + across * np.cos(direction))
    scale = np.maximum(size, 0.02) * hand_size

    # One pixel of every 2 x 2 block is simulated, a different one in every recording: enough for the eye, and cheap.
    blocks = np.arange(0, SENSOR, 2)
    x = (blocks[None, :] + rng.integers(0, 2, (SENSOR // 2, SENSOR // 2))).ravel().astype(np.int16)
    y = (blocks[:, None] + rng.integers(0, 2, (SENSOR // 2, SENSOR // 2))).ravel().astype(np.int16)
    picture = np.pad(_hand_picture(subject, seed), 1)  # the border is background, where all positions outside end up
    to_picture = ((_HAND_RESOLUTION - 1) / 2 / scale).astype(np.float32)[:, None]  # [N, 1], against pixels [1, P]
    column = (x - centre_x.astype(np.float32)[:, None]) * to_picture + (_HAND_RESOLUTION + 1) / 2
    row = (y - centre_y.astype(np.float32)[:, None]) * to_picture + (_HAND_RESOLUTION + 1) / 2
    column = np.clip(column, 0, _HAND_RESOLUTION + 1).astype(np.int16)
    row = np.clip(row, 0, _HAND_RESOLUTION + 1).astype(np.int16)
    brightness = picture[row, column]  # [N, P], the logarithm of the intensity up to a factor

    # A pixel reports every crossing of a threshold. Thresholds differ from pixel to pixel, as in a real sensor.
    level = np.floor(brightness * np.float32(thresholds_crossed) + rng.random(x.size, dtype=np.float32))
    step, pixel = np.nonzero(change := np.diff(level.astype(np.int8), axis=0))
    change = change[step, pixel]
    repeat = np.abs(change)
    step, pixel, p = (np.repeat(a, repeat) for a in (step, pixel, change > 0))
    seen = rng.random(step.size) < 0.5  # the circuit of a pixel misses many
    step, pixel, p = step[seen], pixel[seen], p[seen]
    microseconds = 1e6 * pace / _INSTANTS_PER_CYCLE
    t = (step + rng.random(step.size)) * microseconds + rng.exponential(1500, step.size)  # latency differs: jitter

    # Background activity everywhere, and a few hot pixels that fire all the time.
    duration = cycles * 1e6 * pace
    noise = rng.poisson(0.1 * step.size)
    hot = rng.integers(0, SENSOR, (2, 3))[:, rng.integers(0, 3, rng.poisson(60 * duration * 1e-6))]
    t = np.concatenate([t, rng.uniform(0, duration, noise + hot.shape[1])]).astype(np.int64)
    x = np.concatenate([x[pixel], rng.integers(0, SENSOR, noise), hot[0]]).astype(np.int16)
    y = np.concatenate([y[pixel], rng.integers(0, SENSOR, noise), hot[1]]).astype(np.int16)
    p = np.concatenate([p, rng.integers(0, 2, noise + hot.shape[1])]).astype(np.int8)
    order = np.argsort(t, kind="stable")
    return {"t": t[order] - t[order[0]], "x": x[order], "y": y[order], "p": p[order]}
