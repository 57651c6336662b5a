"""Kernels of the masked layers; see `rcmstr_fast.ops.masked`."""
