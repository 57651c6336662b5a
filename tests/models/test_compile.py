"""torch.compile of the networks gives the features and gradients of the plain ones."""

import shutil

import pytest
import torch

from rcmstr_fast.methods import build_method
from tests.methods.tiny import random_batch, tiny_config


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_networks_follow_the_plain_ones():
    config = tiny_config("vit_tiny", name="rclstr", levels=["subword"], inter="none")
    plain, compiled = build_method(config).train(), build_method(config).train()
    compiled.compile_networks()
    outputs = []
    for method in (plain, compiled):
        method.begin_step()
        output = method(random_batch(config))
        output.loss.backward()
        outputs.append(output.loss.detach())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    for name, buffer in compiled.named_buffers():
        torch.testing.assert_close(
            buffer, plain.get_buffer(name), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    weight = "encoder.blocks.0.mlp.fc1.weight"
    gradients = [method.online.get_parameter(weight).grad for method in (plain, compiled)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)
