"""Networks as their equations stand, with SpikingJelly's own neurons: what the fast forms are compared with."""

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from models.fast import equations_only
from models.neurons import Rectangle


class PublishedNeuron(nn.Module):
    """The neuron of ImageNet as a Python loop over the steps, all of it recorded by autograd.

    ``u_t = 0.25 u_{t-1} (1 - s_{t-1}) + x_t``, ``s_t = [u_t >= 0.5]``; written from the equation.
    """

    def __init__(self):
        super().__init__()
        self.spike = Rectangle()

    def forward(self, x):
        u = s = torch.zeros_like(x[0])
        spikes = []
        for step in x:
            u = 0.25 * u * (1 - s.detach()) + step
            s = self.spike(u - 0.5)
            spikes.append(s)
        return torch.stack(spikes)


def as_direct(net):
    """A copy of ``net`` with the same weights, SMA by its equations, and neurons by SpikingJelly or their equation."""
    net = equations_only(net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, neuron.LIFNode):
                setattr(module, name, direct_neuron(child))
    return net


def direct_neuron(node):
    """In training mode whatever the network is in: in evaluation SpikingJelly's neurons carry no gradient."""
    if isinstance(node.surrogate_function, Rectangle):
        return PublishedNeuron()
    same = {key: getattr(node, key) for key in ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset")}
    return neuron.LIFNode(**same, surrogate_function=surrogate.ATan(), step_mode="m")
