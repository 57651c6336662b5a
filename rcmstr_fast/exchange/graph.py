"""Encoder or recogniser as one graph of tensors, for ONNX and TorchScript."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.config import ConfigError
from rcmstr_fast.exchange.networks import Source
from rcmstr_fast.models.decoders import BLANK, EOS, PAD, SOS
from rcmstr_fast.train.checkpoint import write_whole

#: Operator set of the ONNX files.
OPSET = 18
#: Entry of ONNX metadata and of TorchScript's extra files with characters, input size, mean and deviation.
FACTS = "rcmstr_fast.json"


class FramesGraph(nn.Module):
    """Normalised images `[B, 3, H, W]` to frames `[B, T, C]`."""

    outputs = ("frames",)

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.rectifier, self.encoder = source.rectifier, source.encoder

    def forward(self, images: Tensor) -> Tensor:
        """The frames."""
        return self.encoder(self.rectifier(images))


class CTCGraph(nn.Module):
    """Normalised images to logits `[B, T, K]`, ids `[B, T]` (0: nothing is written here), and confidences `[B]`.

    The ids are those of greedy decoding: blanks and repeats are 0 already, the others are one more than the place of
    their character.
    """

    outputs = ("logits", "ids", "confidence")

    def __init__(self, source: Source, temperature: float) -> None:
        super().__init__()
        assert source.recogniser is not None
        self.recogniser, self.temperature = source.recogniser, temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, ids, confidences."""
        recogniser: Any = self.recogniser
        logits = recogniser.decoder(recogniser.scale(recogniser.frames(images)))
        best = logits.argmax(2)
        before = F.pad(best[:, :-1], (1, 0), value=BLANK)
        ids = torch.where(best == before, torch.zeros_like(best), best)
        chances = (logits / self.temperature).softmax(2).max(2).values
        return logits, ids, chances.log().sum(1).exp()


class WrittenGraph(nn.Module):
    """Normalised images to logits `[B, L, K]`, ids `[B, L]` (below 3: no character) and confidences `[B]`.

    The loop over the characters is unrolled: L is always the longest word the decoder writes.
    """

    outputs = ("logits", "ids", "confidence")

    def __init__(self, source: Source, temperature: float) -> None:
        super().__init__()
        assert source.recogniser is not None
        self.recogniser, self.temperature = source.recogniser, temperature
        closed = torch.zeros(source.recogniser.decoder.num_special + len(source.recogniser.charset))
        closed[[SOS, PAD]] = -1e9
        self.register_buffer("closed", closed)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, ids, confidences."""
        recogniser: Any = self.recogniser
        frames = recogniser.scale(recogniser.frames(images))
        state = recogniser.decoder.start(frames)
        ids = torch.full_like(frames[:, 0, 0], SOS, dtype=torch.int64)
        ended = torch.zeros_like(ids)
        confidence = torch.zeros_like(frames[:, 0, 0])
        scores, written = [], []
        for _ in range(recogniser.max_length):
            logits, state = recogniser.decoder.step(ids, state)
            logits = logits + self.closed
            chance = (logits / self.temperature).log_softmax(1).max(1).values
            ids = torch.where(ended > 0, torch.full_like(ids, PAD), logits.argmax(1))
            confidence = confidence + torch.where(ended > 0, torch.zeros_like(chance), chance)
            ended = torch.where(ids == EOS, torch.ones_like(ended), ended)
            scores.append(logits)
            written.append(ids)
        return torch.stack(scores, 1), torch.stack(written, 1), confidence.exp()


Graph = FramesGraph | CTCGraph | WrittenGraph


def build_graph(source: Source, temperature: float) -> Graph:
    """The graph of an encoder or recogniser, in float32; `temperature` is that of the confidences."""
    recogniser = source.recogniser
    if recogniser is None:
        return FramesGraph(source).eval()
    recogniser.precision = "fp32"
    if recogniser.decoder.num_special == 1:
        return CTCGraph(source, temperature).eval()
    return WrittenGraph(source, temperature).eval()


def facts_of(source: Source) -> dict[str, Any]:
    """What a program needs beside the graph."""
    facts: dict[str, Any] = {"height": source.size[0], "width": source.size[1], "mean": 0.5, "std": 0.5}
    if source.recogniser is not None:
        facts |= {
            "characters": list(source.recogniser.charset.characters),
            "first_id": source.recogniser.decoder.num_special,
        }
    return facts


def write_onnx(source: Source, graph: Graph, path: Path) -> None:
    """Write an ONNX file with a free batch size.

    Raises:
        ConfigError: the packages of the extra `onnx` are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "format=onnx needs the packages onnx and onnxscript: pip install 'rcmstr-fast[onnx]'"
        ) from error
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            (_example(source),),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            external_data=False,
            input_names=["images"],
            output_names=list(graph.outputs),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    assert program is not None
    made = program.model_proto
    entry = made.metadata_props.add()
    entry.key, entry.value = FACTS, json.dumps(facts_of(source), ensure_ascii=False)
    write_whole(path, lambda file: file.write(made.SerializeToString()))


def write_torchscript(source: Source, graph: Graph, path: Path) -> None:
    """Write a traced module that runs without this package."""
    buffer = io.BytesIO()
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(graph, _example(source), check_trace=False)
        torch.jit.save(traced, buffer, _extra_files={FACTS: json.dumps(facts_of(source), ensure_ascii=False)})
    write_whole(path, lambda file: file.write(buffer.getvalue()))


def _example(source: Source) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *source.size, generator=generator)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporters say of their own inner life."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
