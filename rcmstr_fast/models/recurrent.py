"""The bidirectional LSTM that projector and decoders stack."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

#: Gradients run through the LSTM times this. Under autocast cuDNN's LSTM is float16 whatever dtype autocast has, and
#: what a mean over ten thousand rows sends back (1e-6 an element) lies where float16 has few digits left. A power of
#: two: in float32 and float64 nothing changes, bit for bit.
GRADIENT_SCALE = 1024.0
#: oneDNN takes the LSTM from torch on a CPU, and has none in bfloat16 for those without AVX512.
_NO_BF16 = torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Scaled(torch.autograd.Function):
    """The tensor itself, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


class BidirectionalLSTM(nn.Module):
    """One bidirectional LSTM layer and a linear map of its two directions.

    Torch's own initial weights shrink the differences between frames about tenfold a layer, which leaves a
    projector's features nearly equal and a CTC decoder on its blank plateau for thousands of steps; here
    every gate starts with Xavier input weights, orthogonal recurrent weights and an open forget gate.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(in_channels, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        for name, parameter in self.rnn.named_parameters():
            gates = parameter.chunk(4)  # input, forget, cell, output
            for gate in gates:
                if name.startswith("weight_ih"):
                    nn.init.xavier_uniform_(gate)
                elif name.startswith("weight_hh"):
                    nn.init.orthogonal_(gate)
                else:
                    nn.init.zeros_(gate)
            if name.startswith("bias_ih"):
                nn.init.ones_(gates[1])
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def _packed(self) -> bool:
        return len({p.untyped_storage().data_ptr() for p in self.rnn.parameters()}) == 1

    def forward(self, frames: Tensor) -> Tensor:
        """frames `[B, T, C]` to `[B, T, C']`."""
        # Copies lose cuDNN's packed weights. Packing moves every weight, so it must not happen at each call.
        if not torch.compiler.is_compiling() and not self._packed():
            self.rnn.flatten_parameters()
        with torch.autocast("cpu", enabled=False) if _NO_BF16 else contextlib.nullcontext():
            states = self._states(frames)
        return self.linear(states)

    def _states(self, frames: Tensor) -> Tensor:
        """Both directions' states `[B, T, 2 hidden]` (see GRADIENT_SCALE)."""
        wide = frames.to(torch.promote_types(frames.dtype, torch.float32))  # bfloat16 would leave cuDNN
        if not torch.is_grad_enabled():
            return self.rnn(wide)[0]
        inputs, *weights = (_Scaled.apply(x, 1 / GRADIENT_SCALE) for x in (wide, *self.rnn.parameters()))
        start = inputs.new_zeros(2, len(inputs), self.rnn.hidden_size)
        states = torch.lstm(inputs, (start, start), weights, True, 1, 0.0, self.training, True, True)[0]
        return _Scaled.apply(states.to(frames.dtype), GRADIENT_SCALE)


def bilstm_stack(in_channels: int, hidden: int, layers: int = 2) -> nn.Sequential:
    """`layers` bidirectional LSTMs, `hidden` units a direction and `hidden` channels between and after them."""
    return nn.Sequential(*(BidirectionalLSTM(hidden if i else in_channels, hidden, hidden) for i in range(layers)))
