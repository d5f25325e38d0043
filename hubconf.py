"""Entry points of ``torch.hub``, from a clone of this repository.

    net = torch.hub.load("DIR", "sma_vgg8_dvs128", source="local", weights="last.pt")

A program that has top-level packages ``models`` or ``utils`` of its own cannot load them: Python knows one of a name.
"""

from __future__ import annotations

import os
import typing

from torch import nn

import models
from utils import checkpoint as _checkpoint
from utils import networks as _networks

# torch.hub lists every function that is named here without an underscore, and every imported class.
dependencies = ["torch", "einops", "safetensors", "spikingjelly"]


def sma_vgg8_dvs128(weights: str | os.PathLike | None = None, **keywords: typing.Any) -> nn.Module:
    """SMA-VGG8 of DVS128 Gesture, ``[T, B, 2, H, W]`` to ``[T, B, K]``.

    Args:
        weights: a released, own or exported file, or a folder of ``tools/export.py hub``. T,
            classes, width and SMA blocks are read from it.
        keywords: of the function of this name in ``models``.
    """
    return _make("sma_vgg8_dvs128", weights, keywords)


def sma_vgg8_cifar10dvs(weights: str | os.PathLike | None = None, **keywords: typing.Any) -> nn.Module:
    """SMA-VGG8 of CIFAR10-DVS; see :func:`sma_vgg8_dvs128`."""
    return _make("sma_vgg8_cifar10dvs", weights, keywords)


def sma_vgg8_ncaltech101(weights: str | os.PathLike | None = None, **keywords: typing.Any) -> nn.Module:
    """SMA-VGG8 of N-Caltech101; see :func:`sma_vgg8_dvs128`."""
    return _make("sma_vgg8_ncaltech101", weights, keywords)


def sma_ms_resnet18(weights: str | os.PathLike | None = None, **keywords: typing.Any) -> nn.Module:
    """SMA-MS-ResNet-18, ``[B, 3, H, W]`` to ``[B, K]``; ``weights`` as in :func:`sma_vgg8_dvs128`."""
    return _make("sma_ms_resnet18", weights, keywords)


def sma_ms_resnet34(weights: str | os.PathLike | None = None, **keywords: typing.Any) -> nn.Module:
    """SMA-MS-ResNet-34; see :func:`sma_ms_resnet18`."""
    return _make("sma_ms_resnet34", weights, keywords)


def sma_ms_resnet104(weights: str | os.PathLike | None = None, **keywords: typing.Any) -> nn.Module:
    """SMA-MS-ResNet-104; see :func:`sma_ms_resnet18`."""
    return _make("sma_ms_resnet104", weights, keywords)


def _make(name: str, weights: str | os.PathLike | None, keywords: dict[str, typing.Any]) -> nn.Module:
    factory = getattr(models, name)
    if weights is None:
        return factory(**keywords)
    path = os.fspath(weights)
    if os.path.isdir(path):
        path = os.path.join(path, "model.safetensors")
    stored, known = _checkpoint.read_weights(path)
    network, inferred = _networks.describe_network(stored, known)
    if network == name or (network == "VGG8" and name.startswith("sma_vgg8")):
        keywords = {**inferred, **keywords}
    net = factory(**keywords)
    _checkpoint.put_weights(net, stored, path)
    return net
