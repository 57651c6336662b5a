"""Projectors: frames of the encoder to the space in which features are pooled and compared."""

from itertools import pairwise

from torch import Tensor, nn

from rcmstr_fast.models.batch_norm import GroupedBatchNorm
from rcmstr_fast.models.recurrent import bilstm_stack


class BiLSTMProjector(nn.Module):
    """Two stacked bidirectional LSTM layers (the CNN's projector; 2,892,288 parameters at 512 -> 256).

    Attributes:
        out_dim: channels of the output, equal to `hidden`.
    """

    def __init__(self, in_channels: int, hidden: int = 256) -> None:
        super().__init__()
        self.out_dim = hidden
        self.layers = bilstm_stack(in_channels, hidden)

    def forward(self, frames: Tensor) -> Tensor:
        """frames `[B, T, C]` to `[B, T, out_dim]`."""
        return self.layers(frames)


class MLPHead(nn.Module):
    """Linear and batch norm three times, ReLU between, the last batch norm without affine (the ViT's heads).

    Batch statistics are taken over all rows of `group_size` images, see `GroupedBatchNorm`.

    Attributes:
        out_dim: channels of the output.
    """

    def __init__(self, in_channels: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise((in_channels, hidden, hidden, out_dim)):
            layers += [nn.Linear(n_in, n_out, bias=False), GroupedBatchNorm(n_out, dims=1), nn.ReLU()]
        layers[-2:] = [GroupedBatchNorm(out_dim, dims=1, affine=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, rows: Tensor) -> Tensor:
        """rows `[B, .., C]` to `[B, .., out_dim]`."""
        return self.layers(rows)
