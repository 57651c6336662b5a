"""One copy of the weights for every pass: the same results, better or equal gradients, in the same order."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rcmstr_fast import ops
from rcmstr_fast.methods import build_method
from rcmstr_fast.models.conv_norm import WorkingConv2d, WorkingWeights
from rcmstr_fast.models.resnet import ConvBN, ResNet29, Stage
from rcmstr_fast.ops import CastWeight, triton_backend
from tests.methods.tiny import random_batch, tiny_config

REFUSED = triton_backend.reasons()
BACKENDS = ("reference", "cpp", pytest.param("triton", marks=pytest.mark.skipif(bool(REFUSED), reason=str(REFUSED))))


class Casts(TorchDispatchMode):
    """Counts the float32 weights of convolutions that are cast to bfloat16, and the calls that do it."""

    def __init__(self):
        super().__init__()
        self.weights, self.calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sources, results = [], []
        if func is torch.ops.aten._foreach_copy_.default:
            results, sources = args[:2]
        elif func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            sources, results = [args[0] if func is torch.ops.aten._to_copy.default else args[1]], [out]
        cast = [
            a
            for a, b in zip(sources, results)
            if a.dim() == 4
            and a.dtype == torch.float32
            and b.dtype == torch.bfloat16
            and a.shape[2:].numel() in (1, 4, 9)
            and a.shape[2] == a.shape[3]
            and a.shape[0] % 8 == 0
        ]
        self.weights, self.calls = self.weights + len(cast), self.calls + bool(cast)
        return out


def trained(shared, *, checkpointing=False, parts=1, **options):
    """Loss, gradients by name, the order in which they came, and the casts of one step of RCMSTR in bfloat16."""
    torch.manual_seed(0)
    config = tiny_config(name="rcmstr", batch=2, **options)
    method = build_method(config).to(memory_format=torch.channels_last).train()
    method.online.encoder.checkpointing = checkpointing
    order = []
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    weights, losses = WorkingWeights(method, torch.bfloat16 if shared else None), []
    with Casts() as casts:
        method.begin_step()
        weights.refresh()
        for part in range(parts):
            with weights.shared():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = method(random_batch(config, 2, seed=part)).loss
                loss.backward()
            losses.append(loss.detach())
    return losses, {n: p.grad for n, p in method.named_parameters() if p.grad is not None}, order, casts


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"parts": 2}, {"coupled": True}], ids=str)
def test_a_step_is_the_same_and_casts_each_weight_once(options):
    """Bit for bit on a CPU, where the sparse layers' gradients are rounded before they are added in either way."""
    plain, shared = trained(False, **options), trained(True, **options)
    assert plain[0] == shared[0] and plain[1].keys() == shared[1].keys()
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, shared[1][name]), name
    convolutions = sum(isinstance(m, WorkingConv2d) for m in ResNet29(0.25).modules())
    assert (shared[3].weights, shared[3].calls) == (2 * convolutions, 1)  # online and momentum network
    assert plain[3].weights > shared[3].weights


def test_no_gradient_waits_for_an_earlier_layer():
    """Weights get their gradients from the last layer to the first, as without sharing."""
    orders = [[n for n in trained(shared)[2] if "encoder" in n and "conv.weight" in n] for shared in (False, True)]
    assert orders[0] == orders[1] and len(orders[0]) > 30
    stages = [int(name.split("stages.")[1][0]) for name in orders[1]]
    assert stages == sorted(stages, reverse=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_dense_and_a_sparse_pass_against_float64(monkeypatch, backend):
    """Two layers, each passed densely and sparsely: the error of every weight's gradient is that of separate casts."""
    size, batch = (8, 13), 2
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    active = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(1)) < 0.5

    def gradients(shared, dtype=torch.float32, order=backend):
        monkeypatch.setenv("RCMSTR_FAST_BACKEND", order)
        torch.manual_seed(0)
        net = Stage([ConvBN(3, 8), ConvBN(8, 16)]).to(dtype=dtype, memory_format=torch.channels_last)
        weights = WorkingWeights(net, torch.bfloat16 if shared else None)
        weights.refresh()
        (sites,) = ops.masked_storage([ops.Sites(active, None)])
        with weights.shared():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                sparse, dense = ops.unpack_sites(net(images.to(dtype), sites), sites), net(images.to(dtype))
            (sparse.to(dtype).square().mean() + dense.to(dtype).pow(3).mean()).backward()
        return {n: p.grad for n, p in net.named_parameters() if "conv" in n}

    exact = gradients(False, torch.float64, "reference")
    plain, ours = gradients(False), gradients(True)
    for name, wanted in exact.items():
        before, now = (float((got[name] - wanted).norm()) for got in (plain, ours))
        assert now <= 1.01 * before and now <= 0.05 * float(wanted.norm()), name


def test_outside_and_in_other_dtypes_the_plain_weight_is_used():
    layer = WorkingConv2d(4, 8, 3, bias=False)
    assert list(layer.state_dict()) == ["weight"] and layer.cast_weight() is layer.weight
    weights = WorkingWeights(layer, torch.bfloat16)
    weights.refresh()
    with weights.shared():
        assert layer.cast_weight() is layer.weight and layer(torch.zeros(1, 4, 3, 3)).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            shared = layer.cast_weight()
            assert isinstance(shared, CastWeight) and shared is layer.cast_weight()
            assert shared.low.data_ptr() == weights._copies[0].data_ptr() and torch.equal(shared.full, layer.weight)
            with torch.no_grad():
                assert not layer.cast_weight().low.requires_grad
        with torch.autocast("cpu", torch.float16):
            assert layer.cast_weight() is layer.weight
    assert layer.cast_weight() is layer.weight
    with torch.no_grad():
        layer.weight.mul_(2)
    weights.refresh()
    assert torch.equal(weights._copies[0], layer.weight.bfloat16())


def test_compiled_dense_passes_are_compiled_once(monkeypatch):
    """Sharing is invisible to torch.compile: one graph for every micro-batch, the result of the plain layer."""
    monkeypatch.setenv("RCMSTR_FAST_BACKEND", "reference")  # what else is available is asked, and guarded, only once
    torch._dynamo.reset()
    graphs = []
    layer = ConvBN(4, 8).to(memory_format=torch.channels_last)
    x = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    weights = WorkingWeights(layer, torch.bfloat16)
    weights.refresh()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
    layer.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, dynamic=False)
    for _ in range(3):
        with weights.shared(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), expected)
    assert len(graphs) == 1
