"""Windows of frames."""


def pooling_windows(frames: int, count: int) -> list[tuple[int, int]]:
    """`count` adaptive-average windows `[start, end)` of the frames, as of `nn.AdaptiveAvgPool1d`."""
    return [(s * frames // count, -(-(s + 1) * frames // count)) for s in range(count)]
