"""Deterministic parameters and inputs for the reference vectors (numpy only)."""

import zlib

import numpy as np


def tensor_for(key, shape):
    """Value of one state-dict entry, float64, a pure function of its key and shape."""
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_mean":
        return 0.1 * z
    if leaf == "running_var":
        return 0.5 + 0.5 * np.abs(z)
    if leaf == "bias":
        return 0.1 * z
    if len(shape) == 1:  # normalisation weight
        return 4.0 + 0.4 * z
    fan_in = int(np.prod(shape[1:]))
    gain = 4.0 if len(shape) == 2 else 1.0  # linear layers have no normalisation before them
    return gain * z * np.sqrt(2.0 / fan_in)


def fill(state_dict):
    """Same keys, same shapes, deterministic values (counters become 0)."""
    out = {}
    for k, v in state_dict.items():
        if k.endswith("num_batches_tracked"):
            out[k] = np.zeros((), np.int64)
        else:
            out[k] = tensor_for(k, tuple(v.shape))
    return out


def events(seed, *shape, rate=0.3):
    """Event-count frames, float64."""
    return np.random.RandomState(seed).poisson(rate, shape).astype(np.float64)


def images(seed, *shape):
    """Normalised images, float64."""
    return np.random.RandomState(seed).standard_normal(shape)
