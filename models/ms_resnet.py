"""SMA-MS-ResNet, the networks of ImageNet-1K: residual networks on membrane potentials with SMA in their blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from einops import reduce
from torch import Tensor, nn

from models.neurons import ms_lif, per_step
from models.sma import SMA

__all__ = [
    "MSBlock",
    "MSResNet",
    "ms_resnet18",
    "ms_resnet34",
    "ms_resnet104",
    "sma_ms_resnet18",
    "sma_ms_resnet34",
    "sma_ms_resnet104",
]

SMALLEST_IMAGE = 32  # five halvings leave one pixel of it
SMA_PLACES = ("first-two", "all", "none")


class _Conv2d(nn.Conv2d):
    """A convolution on ``[T, B, C, H, W]`` whose parameters stay at its own name, as in the released files.

    Under autocast its products run in half precision and its output is float32, as published. So BatchNorm, membrane
    potentials and the residual stream are float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return y.float() if torch.is_autocast_enabled(x.device.type) else y


class BatchNorm(nn.Module):
    """BatchNorm on ``[T, B, C, H, W]``: one mean and variance a channel, over T, B, H and W.

    The layer inside sees ``[T * B, C, H, W]``, so that ``nn.SyncBatchNorm.convert_sync_batchnorm`` turns it into one
    over all processes. Its parameters are stored as ``bn.*``.

    Args:
        channels: C.
        scale: initial value of the scale.
        T: time steps. An input of one step stands for T equal ones; the running variance counts all of them.
    """

    def __init__(self, channels: int, scale: float = 0.5, T: int = 1):
        super().__init__()
        self.T = T
        self.bn: Any = nn.BatchNorm2d(channels)
        nn.init.constant_(self.bn.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        copies = max(1, self.T // len(x))
        before = self.bn.running_var.clone() if self.training and copies > 1 else None
        y = self.bn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if before is not None:
            # The unbiased variance of n values has the factor n / (n - 1); of `copies` times as many, a smaller one.
            over_processes = isinstance(self.bn, nn.SyncBatchNorm) and dist.is_initialized()
            n = x.numel() // x.shape[2] * (dist.get_world_size() if over_processes else 1)
            old = (1 - self.bn.momentum) * before
            running = self.bn.running_var.data  # autograd keeps the buffer, of which backward reads nothing in training
            running.sub_(old).mul_(copies * (n - 1) / (copies * n - 1)).add_(old)
        return y


class MSBlock(nn.Module):
    """``out = branch(x) + shortcut(x)`` with ``branch = LIF Conv3x3 [SMA] BN LIF Conv3x3 BN``.

    Args:
        c_in, c_out: channels of the input and the output.
        stride: of the first convolution and of the shortcut.
        T: time steps. An input of one step stands for T equal ones: what does not depend on time is computed once.
        sma: makes the SMA of this block; None leaves it out.
        pool_shortcut: where the shape changes, halve the input by average pooling instead of by the stride of the
            shortcut's convolution (the form of ResNet-104).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        T: int,
        sma: Callable[[int], nn.Module] | None = None,
        pool_shortcut: bool = False,
    ):
        super().__init__()
        self.T = T
        # Released names depend on the positions.
        self.residual_function = nn.Sequential(
            ms_lif(),
            _Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
            *([] if sma is None else [sma(c_out)]),
            BatchNorm(c_out),
            ms_lif(),
            _Conv2d(c_out, c_out, 3, padding=1, bias=False),
            BatchNorm(c_out, scale=0.0),
        )
        if stride == 1 and c_in == c_out:
            self.shortcut = nn.Sequential()
        elif pool_shortcut:
            pool = per_step(nn.AvgPool2d(stride, ceil_mode=True))  # an odd size is halved as the branch halves it
            self.shortcut = nn.Sequential(pool, _Conv2d(c_in, c_out, 1, bias=False), BatchNorm(c_out, T=T))
        else:
            self.shortcut = nn.Sequential(_Conv2d(c_in, c_out, 1, stride, bias=False), BatchNorm(c_out, T=T))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_function(x.expand(self.T, -1, -1, -1, -1)) + self.shortcut(x)


class MSResNet(nn.Module):
    """Spiking residual network with SMA, images ``[B, 3, H, W]`` or sequences ``[T, B, 3, H, W]`` to ``[B, K]``.

    An image is the input of every step. Its stem and its first shortcut are computed once, with the result of T
    computations. Call ``functional.reset_net`` after every batch.

    Args:
        depths: number of blocks in each of the four stages; every stage starts with stride 2.
        block: makes a block from ``(c_in, c_out, stride, T, sma, pool_shortcut)``.
        deep_stem: three 3x3 convolutions with bias (strides 2, 1, 1) instead of one 7x7 of stride 2.
        pool_shortcut: see :class:`MSBlock`.
        dropout: probability before the classifier.
        T: time steps; part of the weights of SMA.
        num_classes: K.
        sma_blocks: ``"first-two"`` blocks of each stage (released), ``"all"`` (the paper's text) or ``"none"``.
        width: multiplies all channel numbers (64-128-256-512).
        AZO, RCR, RTR, C_reduction, T_reduction, kernels: see :class:`models.sma.SMA`.
        branch_groups, recompute: its ``groups`` and ``recompute``.

    Raises:
        ValueError: an argument is outside what can work; the message says what would.

    Source: MS-ResNet, Hu et al., "Advancing Spiking Neural Networks toward Deep Residual Learning"; with SMA, the
    paper named in models/sma.py, section on ImageNet-1K.
    """

    def __init__(
        self,
        depths: Sequence[int],
        block: Callable[..., nn.Module] = MSBlock,
        deep_stem: bool = False,
        pool_shortcut: bool = False,
        dropout: float = 0.0,
        T: int = 6,
        num_classes: int = 1000,
        sma_blocks: str = "first-two",
        width: float = 1.0,
        AZO: bool = False,
        RCR: int = 4,
        RTR: int = 2,
        C_reduction: int = 4,
        T_reduction: float = 1.5,
        kernels: Sequence[int] = (1, 3, 5, 7),
        branch_groups: int | str = 1,
        recompute: bool = False,
    ):
        super().__init__()
        _check_arguments(depths, T, num_classes, sma_blocks, width)
        self.T, self.num_classes, self.sma_blocks = T, num_classes, sma_blocks
        channels = [max(1, round(n * width)) for n in (64, 128, 256, 512)]

        def sma(c: int) -> SMA:
            form: dict[str, Any] = {"activation": "relu", "groups": branch_groups, "recompute": recompute}
            return SMA(c, T, kernels, C_reduction, T_reduction, AZO, RCR, RTR, **form)

        def stage(c_in: int, c_out: int, depth: int) -> nn.Sequential:
            with_sma = {"first-two": 2, "all": depth, "none": 0}[sma_blocks]
            return nn.Sequential(
                *(
                    block(
                        c_in if i == 0 else c_out,
                        c_out,
                        2 if i == 0 else 1,
                        T,
                        sma if i < with_sma else None,
                        pool_shortcut,
                    )
                    for i in range(depth)
                )
            )

        c = channels[0]
        if deep_stem:
            convs = [_Conv2d(3, c, 3, 2, padding=1), *(_Conv2d(c, c, 3, padding=1) for _ in range(2))]
        else:
            convs = [_Conv2d(3, c, 7, 2, padding=3, bias=False)]
        self.conv1 = nn.Sequential(*convs, BatchNorm(c, T=T))
        self.conv2_x = stage(c, channels[0], depths[0])
        self.conv3_x = stage(channels[0], channels[1], depths[1])
        self.conv4_x = stage(channels[1], channels[2], depths[2])
        self.conv5_x = stage(channels[2], channels[3], depths[3])
        self.lif = ms_lif()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        steps = x[None] if x.ndim == 4 else x  # [1 or T, B, 3, H, W]
        if (
            steps.ndim != 5
            or len(steps) not in {1, self.T}
            or steps.shape[2] != 3
            or min(x.shape[-2:]) < SMALLEST_IMAGE
        ):
            raise ValueError(
                f"MSResNet takes [B, 3, H, W] or [T={self.T}, B, 3, H, W] with H and W of at least {SMALLEST_IMAGE} "
                f"and got {list(x.shape)}"
            )
        x = self.conv1(steps)
        for stage in (self.conv2_x, self.conv3_x, self.conv4_x, self.conv5_x):
            x = stage(x)
        return self.fc(self.dropout(reduce(self.lif(x), "t b c h w -> b c", "mean")))


def _check_arguments(depths: Sequence[int], T: int, num_classes: int, sma_blocks: str, width: float) -> None:
    for name, value in {"T": T, "num_classes": num_classes}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if len(depths) != 4 or any(not isinstance(depth, int) or depth < 1 for depth in depths):
        raise ValueError(f"depths={list(depths)} must be four whole numbers of at least 1, for instance [2, 2, 2, 2]")
    if sma_blocks not in SMA_PLACES:
        raise ValueError(f"sma_blocks={sma_blocks!r} must be one of {', '.join(SMA_PLACES)}")
    if not 0 < width <= 16:
        raise ValueError(f"width={width!r} must be above 0 and at most 16; the published width is 1")


def sma_ms_resnet18(
    T: int = 6, num_classes: int = 1000, AZO: bool = False, RCR: int = 4, RTR: int = 2, **kwargs
) -> MSResNet:
    """SMA-MS-ResNet-18: 71.09 M parameters. Other keywords: see :class:`MSResNet`."""
    return MSResNet([2, 2, 2, 2], T=T, num_classes=num_classes, AZO=AZO, RCR=RCR, RTR=RTR, **kwargs)


def sma_ms_resnet34(
    T: int = 6, num_classes: int = 1000, AZO: bool = False, RCR: int = 4, RTR: int = 2, **kwargs
) -> MSResNet:
    """SMA-MS-ResNet-34: 81.20 M parameters. Other keywords: see :class:`MSResNet`."""
    return MSResNet([3, 4, 6, 3], T=T, num_classes=num_classes, AZO=AZO, RCR=RCR, RTR=RTR, **kwargs)


def sma_ms_resnet104(
    T: int = 6, num_classes: int = 1000, AZO: bool = False, RCR: int = 4, RTR: int = 2, **kwargs
) -> MSResNet:
    """SMA-MS-ResNet-104: 136.74 M parameters. Other keywords: see :class:`MSResNet`.

    The positions of its stem and shortcuts (and so their names in a file) follow from their description: no released
    file was at hand.
    """
    form = {"deep_stem": True, "pool_shortcut": True, "dropout": 0.2, **kwargs}
    return MSResNet([3, 8, 32, 8], T=T, num_classes=num_classes, AZO=AZO, RCR=RCR, RTR=RTR, **form)


def ms_resnet18(**kwargs) -> MSResNet:
    """MS-ResNet-18 without SMA: 11.694 M parameters."""
    return sma_ms_resnet18(**{"sma_blocks": "none", **kwargs})


def ms_resnet34(**kwargs) -> MSResNet:
    """MS-ResNet-34 without SMA: 21.802 M parameters."""
    return sma_ms_resnet34(**{"sma_blocks": "none", **kwargs})


def ms_resnet104(**kwargs) -> MSResNet:
    """MS-ResNet-104 without SMA: 77.351 M parameters."""
    return sma_ms_resnet104(**{"sma_blocks": "none", **kwargs})
