"""The backend "reference" of the masked layers: the plain operations one after the other over dense maps."""

from torch import Tensor

from rcmstr_fast.ops.masked import reference
from rcmstr_fast.ops.masked.layers import Layer, over_maps


def masked_layer(layer: Layer) -> Tensor:
    """A masked layer over dense maps; gives a map that is zero at inactive sites."""
    x, sites, window, weight, norm = over_maps(layer)
    if window is not None:
        kernel, stride, padding = window
        if weight is None:
            x = reference.masked_max_pool2d(x, sites, kernel_size=kernel, stride=stride, padding=padding)
        else:
            x = reference.masked_conv2d(x, weight, sites, stride=stride, padding=padding)
    if norm is not None:
        x = reference.masked_batch_norm(
            x,
            norm.weight,
            norm.bias,
            sites,
            eps=norm.eps,
            residual=norm.residual,
            relu=norm.relu,
            group_size=norm.group_size,
        )
    return x
