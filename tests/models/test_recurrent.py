"""The LSTM's gradients: exactly torch's in full precision, and not lost in float16."""

import pytest
import torch
from torch import nn

from rcmstr_fast.models import recurrent
from rcmstr_fast.models.recurrent import GRADIENT_SCALE, BidirectionalLSTM


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    made = BidirectionalLSTM(12, 8, 6).to(dtype)
    return made, torch.randn(3, 9, 12, dtype=dtype, requires_grad=True)


def gradients(made, frames, size):
    out = made(frames)
    return out.detach(), torch.autograd.grad((out.sin() * size).sum(), [frames, *made.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_and_gradients_are_those_of_torch_bit_for_bit(dtype, monkeypatch):
    made, frames = layer(dtype)
    scaled = gradients(made, frames, 1e-6)
    monkeypatch.setattr(BidirectionalLSTM, "_states", lambda self, x: self.rnn(x)[0])
    plain = gradients(made, frames, 1e-6)
    assert torch.equal(scaled[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(scaled[1], plain[1], strict=True))
    with torch.no_grad():  # without gradients some processors have another routine
        torch.testing.assert_close(made(frames), plain[0], rtol=1e-6, atol=1e-6)


def test_small_gradients_survive_a_half_precision_lstm(monkeypatch):
    """What autocast does with cuDNN's LSTM on a GPU, on the CPU: the LSTM alone in float16."""

    def in_half(inputs, start, weights, *rest):
        return original(inputs.half(), [s.half() for s in start], [w.half() for w in weights], *rest)

    original = torch.lstm
    made, frames = layer()
    _, exact = gradients(made, frames, 1e-7)
    monkeypatch.setattr(torch, "lstm", in_half)
    errors = {}
    for scale in (1.0, GRADIENT_SCALE):
        monkeypatch.setattr(recurrent, "GRADIENT_SCALE", scale)
        _, found = gradients(made, frames, 1e-7)
        assert {g.dtype for g in found} == {torch.float32}
        errors[scale] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    assert errors[GRADIENT_SCALE] < 0.01 < 0.1 < errors[1.0]


def test_a_copy_trains_like_the_original():
    import copy

    made, frames = layer()
    first = gradients(made, frames, 1.0)[1]
    second = gradients(copy.deepcopy(made), frames, 1.0)[1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert isinstance(made.rnn, nn.LSTM) and all(p.grad is None for p in made.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: cuDNN's LSTM under autocast, and in a graph"
)
def test_small_gradients_survive_autocast_and_a_graph_on_a_gpu():
    made, frames = layer()
    _, exact = gradients(made, frames, 1e-7)
    made, frames = made.cuda(), frames.detach().cuda().requires_grad_()

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            out = made(frames.bfloat16())  # frames as the encoder gives them
        return torch.autograd.grad((out.float().sin() * 1e-7).sum(), [frames, *made.parameters()])

    found = run()
    assert all(float((a.cpu() - b).norm() / b.norm()) < 0.05 for a, b in zip(found, exact, strict=True))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    graph.replay()
    assert all(float((a - b).norm() / b.norm()) < 0.01 for a, b in zip(replayed, found, strict=True))


def test_without_a_bfloat16_lstm_it_computes_in_float32(monkeypatch):
    """What a CPU without AVX512 does under autocast; on the others the LSTM itself is bfloat16."""
    made, frames = layer()
    states = []
    monkeypatch.setattr(recurrent, "_NO_BF16", True)
    made.linear.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        out = made(frames)
        out.float().sum().backward()
        with torch.no_grad():
            made(frames)
    expected = made.rnn(frames)[0].detach()
    assert out.dtype == torch.bfloat16 and torch.isfinite(frames.grad).all()
    for got in states:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
