"""Biases that take back the mean error of rounded weights and inputs."""

from dataclasses import replace

from torch import Tensor

from compressor.quantization.float_graph import CONVOLUTIONS
from compressor.quantization.layerwise import Layer


def correct_bias(layer: Layer) -> Layer:
    """Return the layer with the mean of its error over samples and positions, per output channel, taken off its bias.

    Nagel et al. 2019 (arXiv 1906.04721), section 4.2, with the mean found on samples. A layer without a bias of its own
    stays as it is.
    """
    if layer.bias is None:
        return layer
    return replace(layer, bias=layer.bias - mean_error(layer))


def mean_error(layer: Layer) -> Tensor:
    """Mean over samples and positions of what the int8 layer gives too much, (C,)."""
    channel_axis = 1 if layer.node.target in CONVOLUTIONS else layer.outputs.ndim - 1
    error = layer.compute() - layer.outputs
    return error.mean([axis for axis in range(error.ndim) if axis != channel_axis])
