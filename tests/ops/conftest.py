"""On a GPU: full float32 products and repeatable convolutions, so that tolerances mean the same everywhere."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
