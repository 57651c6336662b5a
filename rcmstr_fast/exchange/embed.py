"""`rcmstr embed`: features of pictures, batch by batch, with names and labels."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rcmstr_fast import env
from rcmstr_fast.config import ConfigError, DataConfig, ModelConfig
from rcmstr_fast.data.decode import Rotate, decode_batch
from rcmstr_fast.data.progress import progress
from rcmstr_fast.data.source import ImageSource
from rcmstr_fast.exchange.feature_files import Features, open_feature_file
from rcmstr_fast.exchange.inputs import Inputs, open_inputs
from rcmstr_fast.exchange.networks import Source
from rcmstr_fast.exchange.source import open_source
from rcmstr_fast.models.placing import placed
from rcmstr_fast.ops import augment_views, hierarchical_pool
from rcmstr_fast.train.distributed import choose_device

#: What can be written of a picture: the hierarchy of the method (paper section III-B), and the encoder's own tokens.
LEVELS = ("word", "subword", "frame", "token")


@dataclass(frozen=True)
class Embedded:
    """What `embed` did.

    Attributes:
        written: pictures in the file.
        broken: name -> why it is not.
    """

    written: int
    broken: dict[str, str]


class Embedder(nn.Module):
    """An encoder with its rectifier that gives features of every level.

    Args:
        source: of `open_source`.
        levels: of `LEVELS`.
        num_subwords: windows of the level `subword`.
        precision: fp32 or bf16 (autocast).
    """

    def __init__(self, source: Source, levels: Sequence[str], num_subwords: int = 4, precision: str = "fp32") -> None:
        super().__init__()
        self.encoder: Any = source.encoder
        self.rectifier: Any = source.rectifier
        self.model: ModelConfig = source.model
        self.rotate: Rotate = _rotation(source)
        self.levels, self.num_subwords, self.bf16 = tuple(levels), num_subwords, precision == "bf16"
        self.eval()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input in pixels."""
        return self.model.height, self.model.image_width

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of pictures.

        Args:
            images: `[B, H, W, 3]` uint8 at the input size.
        Returns:
            level -> float32: `word` `[B, C]`, `subword` `[B, S, C]`, `frame` `[B, T, C]`, `token` `[B, N, C']`.
        """
        index = torch.arange(len(images), device=images.device)
        views = augment_views(images, seed=0, epoch=0, index=index, num_views=1, size=self.size, preset="none")[0]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            tokens = self.encoder.tokens(self.rectifier(views))
            frames = self.encoder.masked_frames(tokens).float()
        pooled = hierarchical_pool(frames, self.num_subwords)
        found = {"word": pooled.word[:, 0], "subword": pooled.subword, "frame": frames, "token": tokens.float()}
        return {level: found[level] for level in self.levels}


def _rotation(source: Source) -> Rotate:
    """Whether tall pictures are turned, as they were in the encoder's pretraining or the recogniser's training."""
    if source.recogniser is not None:
        return source.recogniser.rotate
    return "tall" if source.facts.get("config", {}).get("data", {}).get("rotate") == "tall" else "never"


def embed(
    images: Sequence[str],
    encoder: str | Path,
    out: str | Path,
    *,
    levels: Sequence[str] = ("word",),
    num_subwords: int = 4,
    dtype: str = "float32",
    batch_size: int = 256,
    device: str = "auto",
    precision: str = "fp32",
) -> Embedded:
    """Write features, names and labels of pictures to a file; memory holds a batch at a time.

    Args:
        images: files, folders, LMDBs, patterns, or `-` for file names on standard input.
        encoder: run folder of a pretraining or a probe, or its encoder.safetensors or recogniser.safetensors.
        out: file that ends with .safetensors, .npz or .parquet; replaced whole or not at all.
        levels: what of a picture, names of `LEVELS`.
        num_subwords: windows of the level `subword`.
        dtype: float32 or float16.
        batch_size: pictures a forward pass.
        device: auto, cpu or cuda.
        precision: of the encoder, fp32 or bf16.
    Raises:
        ConfigError: unknown levels or endings, unusable files, pyarrow missing for .parquet, or no picture at all.
    """
    wrong = [level for level in levels if level not in LEVELS]
    if wrong or not levels or len(set(levels)) < len(levels):
        raise ConfigError(
            f"levels must be different names out of {', '.join(LEVELS)}, got {' '.join(levels) or 'none'}"
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    source, inputs = open_source(encoder), open_inputs(images)
    place = choose_device(device, 0)
    embedder = placed(Embedder(source, levels, num_subwords, precision), place)
    frames = embedder.model.image_width // 4
    if not 1 <= num_subwords <= frames:
        raise ConfigError(f"num_subwords must be 1 to {frames}, the frames of this encoder, got {num_subwords}")
    facts = {"encoder": str(source.file), "arch": source.model.encoder, "levels": list(levels)}
    broken: dict[str, str] = {}
    with open_feature_file(Path(out), dtype, facts) as file, ThreadPoolExecutor(env.threads()) as pool:
        total = None if inputs.total is None else -(-inputs.total // batch_size)
        made = _features(embedder, inputs, batch_size, pool, place, broken)
        for features in progress(made, total, "embedding", f"batches of {batch_size} pictures"):
            if features.names:
                file.add(features)
        if not file.count:
            example = next(iter(broken.items()), None)
            raise ConfigError(f"no picture could be read{f', such as {example[0]}: {example[1]}' if example else ''}")
        file.finish()
        return Embedded(file.count, broken)


def _features(
    embedder: Embedder, inputs: Inputs, batch_size: int, pool: Executor, device: torch.device, broken: dict[str, str]
) -> Iterator[Features]:
    """Features of every batch; broken pictures are noted and left out."""
    limits = DataConfig()
    for names, labels, items in _batches(inputs, batch_size):
        pixels, wrong = decode_batch(
            items,
            *embedder.size,
            max_pixels=limits.max_pixels,
            min_side=limits.min_side,
            pool=pool,
            rotate=embedder.rotate,
        )
        good = [i for i in range(len(names)) if i not in wrong]
        broken.update({names[i]: reason for i, reason in wrong.items()})
        found = embedder(torch.from_numpy(pixels[good]).to(device)) if good else {}
        yield Features(
            [names[i] for i in good], [labels[i] for i in good], {k: v.cpu().numpy() for k, v in found.items()}
        )


def _batches(inputs: Inputs, batch_size: int) -> Iterator[tuple[list[str], list[str | None], Sequence[bytes | None]]]:
    """Names, labels (None: there is none) and encoded pictures."""
    for part in inputs.parts:
        if isinstance(part, ImageSource):
            for first in range(0, len(part), batch_size):
                records = np.arange(first, min(first + batch_size, len(part)))
                yield [part.name(int(i)) for i in records], part.labels(records), part.read(records)
        else:
            for names, items in Inputs([part], None).batches(batch_size, sys.stdin):
                yield names, [None] * len(names), items
