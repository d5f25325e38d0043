"""Built-in demo data: eleven gesture-like motions of a simulated hand before a simulated event camera.

Only numpy is used, nothing is downloaded, and every sample is a pure function of (gesture, subject, trial, seed).

What makes it a test of motion: the gestures come in five groups (circles; approach and recede; vertical, diagonal and
horizontal swipes, the last with the wave). Inside a group all motions sweep the same region, and each motion ends where
it began, so that every pixel brightens as often as it darkens. Counts of ON and OFF events per pixel therefore tell the
groups apart but not the gestures of one group; for these it takes the order of the events.
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

# In alphabetical order: in the layout "folders" a label is the rank of its folder's name.
GESTURES: tuple[str, ...] = (
    "circle_ccw",
    "circle_cw",
    "pull",
    "push",
    "swipe_down",
    "swipe_down_left",
    "swipe_left",
    "swipe_right",
    "swipe_up",
    "swipe_up_right",
    "wave",
)
SENSOR = 128  # the simulated camera has SENSOR x SENSOR pixels
TRAIN_SUBJECTS: tuple[int, ...] = tuple(range(12))
TEST_SUBJECTS: tuple[int, ...] = tuple(range(12, 16))
TRIALS = 2  # recordings of each gesture by each subject
SEED = 2023
VERSION = 1  # part of the directory's name: raise it with every change of the generator, so that old sets are not used

_HAND_RESOLUTION = 96  # pixels along one side of a subject's hand picture, which covers [-1, 1] x [-1, 1]
_INSTANTS = 80  # how often the scene is looked at in a recording (three times as often in a wave)
_WAVES = 3  # how often a waving hand goes there and back


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
    palm_width, palm_height = rng.uniform(0.46, 0.58), rng.uniform(0.4, 0.5)
    # Distance from the outline, negative inside, in units of half the picture.
    distance = (np.hypot(u / palm_width, (v - 0.35) / palm_height) - 1) * min(palm_width, palm_height)
    spread, length, thickness = rng.uniform(0.16, 0.26), rng.uniform(0.5, 0.7), rng.uniform(0.1, 0.14)
    angles = [-1.1, *(spread * np.arange(-1.5, 2))]  # the thumb, then the fingers; 0 points up
    lengths = [0.75 * length, *(length * np.array([0.85, 1.0, 0.97, 0.8]))]
    for angle, bar in zip(angles, lengths, strict=True):
        root_u, root_v = 0.8 * palm_width * np.sin(angle), 0.35 - 0.8 * palm_height * np.cos(angle)
        along = np.clip((u - root_u) * np.sin(angle) - (v - root_v) * np.cos(angle), 0, bar)
        bar_distance = np.hypot(u - root_u - along * np.sin(angle), v - root_v + along * np.cos(angle)) - thickness
        distance = np.minimum(distance, bar_distance)
    return (1 / (1 + np.exp(distance / 0.025))).astype(np.float32)


# Which way a swipe goes, in units of pi, clockwise from the right.
_SWIPES = {"right": 0.0, "down": 0.5, "down_left": 0.75, "left": 1.0, "up": 1.5, "up_right": 1.75}


def _triangle(phase: np.ndarray) -> np.ndarray:
    """There and back at constant speed: -1 at phase 0, +1 at phase 1/2."""
    return 1 - 4 * np.abs(phase % 1 - 0.5)


def _path(name: str, phase: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the hand is at a phase of its motion, phase [N] (0 to 1 is once through, and all motions are periodic).

    Returns the hand's place along and across the path, in units of half the path's length, and its size as a factor,
    each [N].
    """
    zero, one = np.zeros_like(phase), np.ones_like(phase)
    if name.startswith("circle"):
        turn = 2 * np.pi * (phase if name == "circle_cw" else -phase)  # y points down: growing angles are clockwise
        return np.cos(turn), np.sin(turn), one
    if name.startswith("swipe"):
        # At the end of a stroke the hand is out of sight, and returns there to the side where it began.
        return 2 * (phase % 1) - 1, zero, one
    if name == "wave":
        return _triangle(phase), zero, one
    # pull: the hand enters the picture large and then recedes until nothing is left of it; backwards that is a push.
    phase = (phase if name == "pull" else -phase) % 1
    entering = phase < 0.4
    return np.where(entering, 1 - phase / 0.4, 0), zero, np.where(entering, 1, 1 - (phase - 0.4) / 0.6)


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
    hand_size = person.uniform(27, 34)  # pixels from the centre to the finger tips
    seconds = person.uniform(1.0, 1.8)  # the length of a recording
    thresholds_crossed = person.uniform(3.0, 5.0)  # contrast of the skin over the camera's threshold
    rng = _random(seed, 2, subject, gesture, trial)
    hand_size *= rng.uniform(0.9, 1.1)
    seconds *= rng.uniform(0.8, 1.25)
    start = rng.random()
    # Waving is quick: several times there and back, while the other motions are made once, one way.
    cycles, passes, instants = (_WAVES, 2 * _WAVES, 3 * _INSTANTS) if name == "wave" else (1, 1, _INSTANTS)
    duration = 1e6 * seconds

    # Where the hand is at every instant.
    phase = start + np.linspace(0, cycles, instants + 1)
    along, across, size = _path(name, phase)
    direction, half_length = rng.normal(0, 0.1), SENSOR / 2 + hand_size  # past the border: the hand leaves the picture
    if name.startswith("swipe"):
        direction += _SWIPES[name.removeprefix("swipe_")] * np.pi
        half_length *= 1.3 if name in ("swipe_down_left", "swipe_up_right") else 1  # the diagonal is longer
    elif name.startswith("circle"):
        direction, half_length = 2 * np.pi * rng.random(), rng.uniform(28, 36)
    elif name != "wave":  # pull and push, from below and to below
        direction, hand_size = 0.5 * np.pi + direction, 1.2 * hand_size
        half_length += 0.3 * hand_size
    middle = SENSOR / 2 + rng.normal(0, 4, 2)
    centre_x = middle[0] + half_length * (along * np.cos(direction) - across * np.sin(direction))
    centre_y = middle[1] + half_length * (along * np.sin(direction) + across * np.cos(direction))
    scale = np.maximum(size, 0.02) * hand_size

    # One pixel of every 2 x 4 block is simulated, a different one in every recording: enough for the eye, and cheap.
    blocks = np.mgrid[0:SENSOR:4, 0:SENSOR:2].reshape(2, -1)
    y, x = (blocks + rng.integers(0, [[4], [2]], blocks.shape)).astype(np.int16)
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
    # A pixel's circuit misses many changes, and more of them the faster they are: the count of events is then the same
    # however often the hand passes.
    seen = rng.random(step.size) < rng.uniform(0.4, 0.8) / passes
    step, pixel, p = step[seen], pixel[seen], p[seen]
    latency = rng.exponential(1500, step.size)  # microseconds; it differs from event to event: jitter
    t = (step + rng.random(step.size)) * duration / instants + latency

    # Background activity everywhere, and a few hot pixels that fire all the time.
    noise = rng.poisson(0.05 * step.size)
    hot = rng.integers(0, SENSOR, (2, 3))[:, rng.integers(0, 3, rng.poisson(60 * duration * 1e-6))]
    t = np.concatenate([t, rng.uniform(0, duration, noise + hot.shape[1])]).astype(np.int64)
    x = np.concatenate([x[pixel], rng.integers(0, SENSOR, noise), hot[0]]).astype(np.int16)
    y = np.concatenate([y[pixel], rng.integers(0, SENSOR, noise), hot[1]]).astype(np.int16)
    p = np.concatenate([p, rng.integers(0, 2, noise + hot.shape[1])]).astype(np.int8)
    order = np.argsort(t, kind="stable")
    return {"t": t[order] - t[order[0]], "x": x[order], "y": y[order], "p": p[order]}


def _split(subject: int) -> str:
    return "train" if subject in TRAIN_SUBJECTS else "test"


def _is_whole(directory: Path) -> bool:
    return (directory / "demo.json").is_file()


def _fill(directory: Path, layout: str, sensor: tuple[int, int], num_classes: int) -> None:
    """Write every recording into `directory`, and last of all the file that says that the set is whole."""
    height, width = sensor
    lines = []
    for gesture, name in enumerate(GESTURES[:num_classes]):
        for subject in (*TRAIN_SUBJECTS, *TEST_SUBJECTS):
            if layout == "gesture":
                folder = directory / "events_np" / _split(subject) / str(gesture)
            else:
                folder = directory / "events_np" / name
            folder.mkdir(parents=True, exist_ok=True)
            for trial in range(TRIALS):
                events = render_events(gesture, subject, trial)
                if sensor != (SENSOR, SENSOR):
                    # The picture is stretched to the sensor, as resizing its frames to a square will undo. A pixel
                    # lands anywhere in the place it is stretched to, so that no stripes of silent pixels appear.
                    rng = _random(SEED, 3, subject, gesture, trial)
                    for axis, size in (("x", width), ("y", height)):
                        place = (events[axis] + rng.random(events[axis].size)) * (size / SENSOR)
                        events[axis] = place.astype(np.int16)
                stem = f"subject{subject:02d}_trial{trial}"
                np.savez(folder / f"{stem}.npz", **events)  # type: ignore[arg-type]
                lines.append(f"{_split(subject)},{name}/{stem}\n")
    if layout == "folders":
        (directory / "split.csv").write_text("".join(lines), encoding="utf-8")
    facts = {"version": VERSION, "layout": layout, "sensor": list(sensor), "classes": num_classes, "files": len(lines)}
    (directory / "demo.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


def write_demo(
    root: Path, layout: Literal["gesture", "folders"], sensor: tuple[int, int], num_classes: int = len(GESTURES)
) -> Path:
    """Write the demo data set below `root`, unless it is there already, and return the directory to load it from.

    Args:
        root: a cache directory; it is made if need be. The set gets a directory of its own in it, named after the
            arguments and the version of the generator, so a newer generator never meets an older set.
        layout: `"gesture"` as SpikingJelly's DVS128Gesture (`events_np/{train,test}/<label>/<name>.npz`), `"folders"`
            as its CIFAR10DVS and NCaltech101 (`events_np/<gesture>/<name>.npz`), with a file `split.csv` of lines
            `train,<gesture>/<name>` and `test,<gesture>/<name>`. Names are `subject03_trial1`; in both layouts the
            subjects of the test set are not in the training set.
        sensor: height and width of the frames to come, in pixels: (128, 128) or, for N-Caltech101, (180, 240).
        num_classes: only the first so many of `GESTURES`.

    The set appears in one step, under its name, when it is whole: a killed process leaves nothing that could be taken
    for a data set, and of several processes that write at once the first to end wins and the others use its result.
    """
    if layout not in ("gesture", "folders"):
        raise ValueError(f'layout {layout!r} is unknown: choose "gesture" or "folders"')
    if not 1 <= num_classes <= len(GESTURES):
        raise ValueError(f"num_classes {num_classes} is not possible: the demo has 1 to {len(GESTURES)} gestures")
    height, width = sensor
    if min(height, width) < 1:
        raise ValueError(f"sensor {sensor} is not possible: height and width must be positive")
    final = Path(root) / f"demo_v{VERSION}_{layout}_{height}x{width}_{num_classes}"
    return made_once(final, lambda directory: _fill(directory, layout, (height, width), num_classes))


def made_once(final: Path, fill: Callable[[Path], None]) -> Path:
    """The directory `final`, made by `fill` unless it is there already: whole or not at all.

    `fill` gets an empty directory and writes `demo.json` into it last of all.
    """
    if _is_whole(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{final.name}.", suffix=".part", dir=final.parent))
    try:
        data = scratch / "data"  # made with the user's own permissions; mkdtemp's directory is closed to others
        data.mkdir()
        fill(data)
        try:
            os.rename(data, final)
        except OSError:  # something is there
            if not _is_whole(final):  # not ours: a copy that was interrupted, for instance
                os.rename(final, scratch / "broken")
                os.rename(data, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final
