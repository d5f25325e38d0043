"""SMA-VGG8, the network of the event data sets (paper, appendix, table of architectures)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from models.fast import in_sequence
from models.neurons import dropout, lif, per_step
from models.sma import SMA

__all__ = ["VGG8", "sma_vgg8_cifar10dvs", "sma_vgg8_dvs128", "sma_vgg8_ncaltech101"]

SMALLEST_FRAME = 32  # five poolings by 2 leave one pixel of it


class _Block(nn.Sequential):
    """Its layers one after the other; BatchNorm and neurons in one pass where that gives the same."""

    def forward(self, x: Tensor) -> Tensor:
        return in_sequence(self, x)


class VGG8(nn.Module):
    """Spiking VGG8 with SMA: five convolution blocks and three linear layers, ``[T, B, 2, H, W]`` to ``[T, B, K]``.

    A block is ``Conv3x3 [SMA] BN LIF MaxPool2``; then ``AdaptiveAvgPool(3) Linear LIF Dropout Linear LIF Dropout
    Linear``. Dropout draws one mask for all T steps of a forward pass. The prediction is the argmax of the mean over T.
    Call ``functional.reset_net`` after every batch: neurons and dropout masks last until then.

    Args:
        T: time steps; part of the weights of SMA.
        num_classes: K.
        width: multiplies all channel and feature numbers (64-128-256-512-512, 2048, 1024).
        sma_blocks: which of the blocks 1 to 5 carry SMA. Released: 2 and 3; the paper's appendix draws 2 to 5.
        branch_activation: ``"lif"`` (released) or ``"relu"`` inside SMA.
        AZO, RCR, RTR, C_reduction, T_reduction, kernels: see :class:`models.sma.SMA`.
        branch_groups, recompute: its ``groups`` and ``recompute``.

    Raises:
        ValueError: an argument is outside what can work; the message says what would.
    """

    def __init__(
        self,
        T: int = 16,
        num_classes: int = 11,
        width: float = 1.0,
        sma_blocks: Iterable[int] = (2, 3),
        branch_activation: str = "lif",
        AZO: bool = False,
        RCR: int = 4,
        RTR: int = 4,
        C_reduction: int = 4,
        T_reduction: float = 4,
        kernels: Sequence[int] = (1, 3, 5, 7),
        branch_groups: int | str = 1,
        recompute: bool = False,
    ):
        super().__init__()
        sma_blocks = tuple(sorted(set(sma_blocks)))
        if any(block not in range(1, 6) for block in sma_blocks):
            raise ValueError(f"sma_blocks={list(sma_blocks)} must name blocks from 1 to 5, for instance [2, 3]")
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r} must be a whole number of at least 1")
        if not 0 < width <= 16:
            raise ValueError(f"width={width!r} must be above 0 and at most 16; the published width is 1")
        if branch_activation not in ("lif", "relu"):
            raise ValueError(f"branch_activation={branch_activation!r} must be 'lif' or 'relu'")
        self.T, self.num_classes, self.sma_blocks = T, num_classes, sma_blocks
        c1, c2, c3, c4, c5, f1, f2 = (max(1, round(n * width)) for n in (64, 128, 256, 512, 512, 2048, 1024))

        def block(number: int, c_in: int, c_out: int) -> _Block:
            # Released names depend on the positions: Conv, [SMA], BN, LIF, MaxPool, plain layers one level down.
            layers = [per_step(nn.Conv2d(c_in, c_out, 3, padding=1))]
            if number in sma_blocks:
                activation = lif if branch_activation == "lif" else branch_activation
                azo: dict[str, Any] = {"AZO": AZO, "RCR": RCR, "RTR": RTR}
                form: dict[str, Any] = {"activation": activation, "groups": branch_groups, "recompute": recompute}
                layers.append(SMA(c_out, T, kernels, C_reduction, T_reduction, **azo, **form))
            layers += [per_step(nn.BatchNorm2d(c_out)), lif(), per_step(nn.MaxPool2d(2))]
            return _Block(*layers)

        self.block1 = block(1, 2, c1)
        self.block2 = block(2, c1, c2)
        self.block3 = block(3, c2, c3)
        self.block4 = block(4, c3, c4)
        self.block5 = block(5, c4, c5)
        self.others = nn.Sequential(
            per_step(nn.AdaptiveAvgPool2d(3)),
            nn.Flatten(2),  # [T, B, C, 3, 3] -> [T, B, C * 9]
            nn.Linear(c5 * 9, f1),
            lif(),
            dropout(0.5),
            nn.Linear(f1, f2),
            lif(),
            dropout(0.5),
            nn.Linear(f2, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[0] != self.T or x.shape[2] != 2 or min(x.shape[3:]) < SMALLEST_FRAME:
            raise ValueError(
                f"VGG8 takes [T={self.T}, B, 2, H, W] with H and W of at least {SMALLEST_FRAME} and got "
                f"{list(x.shape)}; time comes first, and T is part of the weights"
            )
        for block in (self.block1, self.block2, self.block3, self.block4, self.block5):
            x = block(x)
        return self.others(x)


def sma_vgg8_dvs128(
    T: int = 16, num_classes: int = 11, AZO: bool = True, RCR: int = 10, RTR: int = 4, **kwargs
) -> VGG8:
    """SMA-VGG8 of DVS128 Gesture: 22.452531 M parameters. Other keywords: see :class:`VGG8`."""
    return VGG8(T, num_classes, AZO=AZO, RCR=RCR, RTR=RTR, **kwargs)


def sma_vgg8_cifar10dvs(
    T: int = 10, num_classes: int = 10, AZO: bool = True, RCR: int = 4, RTR: int = 4, **kwargs
) -> VGG8:
    """SMA-VGG8 of CIFAR10-DVS: 22.451014 M parameters. Other keywords: see :class:`VGG8`."""
    return VGG8(T, num_classes, AZO=AZO, RCR=RCR, RTR=RTR, **kwargs)


def sma_vgg8_ncaltech101(
    T: int = 14, num_classes: int = 101, AZO: bool = True, RCR: int = 24, RTR: int = 4, **kwargs
) -> VGG8:
    """SMA-VGG8 of N-Caltech101: 22.544543 M parameters. Other keywords: see :class:`VGG8`."""
    return VGG8(T, num_classes, AZO=AZO, RCR=RCR, RTR=RTR, **kwargs)
