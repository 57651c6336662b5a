"""Compile every shipped Triton kernel ahead of time, without a GPU; see `bench.aot.__main__`."""
