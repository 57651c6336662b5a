import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.interpolate import RBFInterpolator
from torch import nn

from rcmstr_fast.config import ModelConfig
from rcmstr_fast.models import build_rectifier
from rcmstr_fast.models.tps import FIDUCIALS, SLOPING, TPSRectifier, fiducials, grid_matrix


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters():
    assert parameters(TPSRectifier(32, 100)) == 1_693_544


def test_starts_as_the_identity_and_learns():
    rectifier = TPSRectifier(32, 100)
    images = torch.randn(3, 3, 32, 100)
    torch.testing.assert_close(rectifier(images), images, rtol=0, atol=1e-4)
    torch.testing.assert_close(rectifier.eval()(images), images, rtol=0, atol=1e-4)
    rectifier.train()(images).square().mean().backward()
    assert rectifier.fc2.weight.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rectifier.parameters())


def test_the_grid_is_a_thin_plate_spline():
    points = fiducials() + 0.2 * torch.randn(FIDUCIALS, 2, dtype=torch.float64)
    y, x = np.meshgrid((np.arange(8) * 2 + 1) / 8 - 1, (np.arange(20) * 2 + 1) / 20 - 1, indexing="ij")
    spline = RBFInterpolator(fiducials().numpy(), points.numpy(), kernel="thin_plate_spline")
    expected = spline(np.stack([x.ravel(), y.ravel()], axis=1))
    np.testing.assert_allclose(grid_matrix(8, 20).double() @ points, expected, atol=1e-4)


def test_points_move_the_picture():
    """All points half the image to the right: the right half of the input comes to the middle."""
    rectifier = TPSRectifier(32, 100, layout=fiducials() + torch.tensor([0.5, 0.0])).eval()
    images = torch.randn(1, 3, 32, 100)
    out = rectifier(images)
    torch.testing.assert_close(out[..., :75], images[..., 25:], rtol=0, atol=1e-3)
    torch.testing.assert_close(out[..., 75:], images[..., -1:].expand(-1, -1, -1, 25), rtol=0, atol=1e-3)


def test_computes_in_float32_inside_autocast():
    rectifier = TPSRectifier(32, 100).eval()
    images = torch.randn(2, 3, 32, 100)
    with torch.autocast("cpu", torch.bfloat16):
        got = rectifier(images)
    assert got.dtype == torch.float32 and torch.equal(got, rectifier(images))


def test_none_is_the_identity_module():
    assert isinstance(build_rectifier(ModelConfig()), nn.Identity)


def test_frozen_reads_its_file_and_stays_frozen(tmp_path):
    source = TPSRectifier(32, 100, layout=fiducials() * 0.8)
    source(torch.randn(4, 3, 32, 100))
    path = str(tmp_path / "tps.safetensors")
    save_file(source.state_dict(), path)
    frozen = build_rectifier(ModelConfig(tps="frozen", tps_checkpoint=path)).train()
    images = torch.randn(2, 3, 32, 100)
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    assert torch.equal(frozen(images), source.eval()(images)) and not frozen(images).requires_grad
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


def test_frozen_random_is_the_untrained_sloping_layout():
    rectifier = build_rectifier(ModelConfig(tps="frozen", tps_checkpoint="random"))
    torch.testing.assert_close(rectifier.fc2.bias.view(20, 2), fiducials(*SLOPING).float())
    images = torch.randn(1, 3, 32, 100)
    assert (rectifier(images) - images).abs().max() > 0.1


def test_foreign_files_are_refused_in_one_line(tmp_path):
    def refused(path: str) -> str:
        with pytest.raises(ValueError, match="tps_checkpoint") as caught:
            build_rectifier(ModelConfig(tps="frozen", tps_checkpoint=str(path)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "found no file" in refused(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("no weights")
    assert "cannot read" in refused(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    assert "differing names" in refused(tmp_path / "other")
    state = TPSRectifier(32, 100).state_dict()
    state["fc2.weight"] = torch.zeros(20, 256)
    save_file(state, tmp_path / "shape")
    assert "fc2.weight must be [40, 256], got [20, 256]" in refused(tmp_path / "shape")


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 100\], got \[2, 3, 32, 128\]"):
        TPSRectifier(32, 100)(torch.randn(2, 3, 32, 128))
