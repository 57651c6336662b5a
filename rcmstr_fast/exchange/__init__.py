"""Weights in and out: other projects' layouts, ONNX and TorchScript, model cards, and reading words with a model."""
