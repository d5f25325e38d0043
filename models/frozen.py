"""SMA with constant weights: convolutions of several sizes and a sum, for programs that compute no attention."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from models.sma import SMA

__all__ = ["FrozenSMA", "freeze"]


class FrozenSMA(nn.Module):
    """The branches of an SMA and a sum of them with weights that no input changes, ``[T, B, C, H, W]`` to the same.

    Args:
        sma: gives its branches, with their weights.
        weights: of every scale at every step in every channel, ``[S, T, C]``.
    """

    def __init__(self, sma: SMA, weights: Tensor):
        super().__init__()
        self.S_Convs = sma.S_Convs
        self.weights: Tensor
        self.register_buffer("weights", weights[:, :, None, :, None, None])  # [S, T, 1, C, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        y = self.weights[0] * self.S_Convs[0](x)
        for weight, branch in zip(self.weights[1:], self.S_Convs[1:], strict=True):
            y = y + weight * branch(x)
        return y


def freeze(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace every SMA in ``net`` by its frozen form.

    Args:
        weights: name of each SMA in ``net`` to its weights ``[S, T, C]``.
    """
    for name, constant in weights.items():
        sma = net.get_submodule(name)
        assert isinstance(sma, SMA)
        net.set_submodule(name, FrozenSMA(sma, constant))
