"""Triton kernels and plain launchers; imports torch and triton only."""
