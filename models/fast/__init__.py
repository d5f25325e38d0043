"""The same numbers as the equations of ``models/sma.py``, sooner: ``SMA.forward`` asks :func:`fast_forward`.

========================  ==============================================================================================
``forward.py``            the way through a pass of SMA, and its recomputation
``convolution.py``         the convolutions of all branches by one shared transform, on a CPU; with ``transforms.py``,
                          its matrices, and ``workers.py``, its threads and memory
``dispatch.py``           the one place that decides which form of a pass runs where
``passes.py``             the two passes after the convolutions, as functions of autograd
``equations.py``          the same as equations, where functions of autograd cannot serve
``loops.py``              their values in PyTorch, step by step
``kernels.py``            their values on a GPU, in Triton
========================  ==============================================================================================
"""

from __future__ import annotations

import copy

from torch import nn

from .dispatch import has_kernels
from .forward import fast_forward, in_sequence

__all__ = ["equations_only", "fast_forward", "has_kernels", "in_sequence"]


def equations_only(net: nn.Module) -> nn.Module:
    """A copy of ``net`` for tests and measurements: SMA runs its equations, and neurons are SpikingJelly's own.

    The neurons must be in their first state (``functional.reset_net``).
    """
    net = copy.deepcopy(net)
    for module in net.modules():
        if hasattr(module, "fast"):  # SMA, and the neurons of models/neurons.py
            module.fast = False  # type: ignore[assignment]
    return net
