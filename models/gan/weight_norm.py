"""Weight normalisation with data-dependent initialisation: Salimans, Kingma, "Weight Normalization: A Simple
Reparameterization to Accelerate Training of Deep Neural Networks", 2016, arXiv 1602.07868.

    y = (g / |v|) (v * x) + b               eq. 2; one g, one b and one |v| for each output unit or channel
    t = (v * x) / |v|                       over one batch of data, at the start, equation 5:
    g <- s / std[t],   b <- -s mean[t] / std[t]     so that y has mean 0 and standard deviation s there

Shape legend: x (B, inputs) or (B, C, H, W), y (B, outputs) or (B, outputs, H', W'); moments are over everything but the
outputs. As in the released code of Improved GAN, g may stay what the data made of it: then it is a buffer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # under the root of |v|^2, as the released code's
DEAD = 1e-6  # a unit whose outputs vary less than this keeps its gain: there is nothing to normalise

Layer = nn.Linear | nn.Conv2d | nn.ConvTranspose2d


class WeightNorm(nn.Module):
    """A linear, convolutional or transposed convolutional layer with normalised weights, its gain and its bias."""

    gain: Tensor

    def __init__(self, layer: Layer, *, learn_gain: bool = False, init_std: float = 1.0) -> None:
        """The layer's weight becomes v, as it was drawn; the bias starts at 0 and the gain at 1. `init_std` is s."""
        super().__init__()
        self.layer = layer
        self.init_std = init_std
        self._output_axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        outputs = layer.weight.shape[self._output_axis]
        layer.bias = nn.Parameter(torch.zeros(outputs))
        if learn_gain:
            self.gain = nn.Parameter(torch.ones(outputs))
        else:
            self.register_buffer("gain", torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, self.weight()
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
        assert not isinstance(layer.padding, str)
        return F.conv_transpose2d(x, weight, layer.bias, layer.stride, layer.padding, layer.output_padding)

    def weight(self) -> Tensor:
        """(g / |v|) v."""
        v = self.layer.weight
        others = [axis for axis in range(v.dim()) if axis != self._output_axis]
        shape = [-1 if axis == self._output_axis else 1 for axis in range(v.dim())]
        return v * self.gain.view(shape) * torch.rsqrt(v.square().sum(others, keepdim=True) + EPS)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Equation 5, whatever gain and bias were before: the outputs of x then have mean 0 and the deviation s."""
        assert self.layer.bias is not None
        self.gain.fill_(1.0)
        self.layer.bias.zero_()
        t = self.forward(x)  # a hook of this layer calls this
        std, mean = torch.std_mean(t, [axis for axis in range(t.dim()) if axis != 1], correction=0)
        scale = torch.where(std > DEAD, self.init_std / std.clamp_min(DEAD), 1.0)
        self.gain.copy_(scale)
        self.layer.bias.copy_(-mean * scale)


@torch.no_grad()
def initialise(network: nn.Module, run: Callable[[], object]) -> None:
    """`run()` is one pass of `network`; each of its weight-normalised layers fits itself to what reaches it, in turn.

    `run` calls `network.forward`, not `network()`: a compiled network would keep the fitting."""
    layers = [module for module in network.modules() if isinstance(module, WeightNorm)]
    hooks = [layer.register_forward_pre_hook(lambda module, inputs: module.fit(inputs[0])) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
