"""Reading words with a recogniser: pictures of any kind in, texts with confidences out."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError, DataConfig
from rcmstr_fast.data.decode import BrokenImage, Rotate, decode_image, fitted
from rcmstr_fast.evaluation.network_files import load_recogniser
from rcmstr_fast.evaluation.over_encoder import Precision
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.models.decoders import BLANK, EOS, PAD, SOS
from rcmstr_fast.models.placing import placed
from rcmstr_fast.train.distributed import choose_device

#: What `Reader.read` takes as a picture: a path, an encoded file, pixels [H, W] or [H, W, 3] uint8, a Pillow image.
Picture = str | Path | bytes | np.ndarray | Image.Image
#: Facts of a recogniser's file that hold its calibration.
CALIBRATION = "calibration"


class Reading(NamedTuple):
    """One picture as it was read.

    Attributes:
        text: the word; empty where the picture is broken.
        confidence: in [0, 1].
        characters: a confidence for each character of `text`.
        error: why the picture could not be read; None where it could.
    """

    text: str
    confidence: float
    characters: tuple[float, ...]
    error: str | None = None


class Scores(NamedTuple):
    """Class scores along the words of a batch, from which text and confidences follow.

    Attributes:
        logits: `[B, L, K]` float32, of every frame (CTC) or written position.
        ids: `[B, L]` int64: the best class of every frame, or what was written, [EOS] and [PAD] included.
    """

    logits: Tensor
    ids: Tensor


class Reader:
    """A recogniser that is ready to read.

    Attributes:
        recogniser: in evaluation mode on its device.
        facts: what is stored with it.
        temperature: logits are divided by it before confidences are taken; 1 where nothing was calibrated.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        facts: dict[str, Any] | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        temperature: float | None = None,
    ) -> None:
        """Prepare.

        Args:
            recogniser: moved to the device.
            facts: as stored with it.
            device: auto, cpu or cuda.
            precision: fp32, bf16 or auto (what it was trained and tested in).
            temperature: of the confidences; None: what the facts record, else 1.
        """
        place = choose_device(device, 0)
        self.facts = dict(facts or {})
        self.recogniser = placed(recogniser, place).eval()
        if precision in ("fp32", "bf16"):
            self.recogniser.precision = cast(Precision, precision)
        self._device = place
        known = self.facts.get(CALIBRATION, {}).get("temperature", 1.0)
        self.temperature = float(known if temperature is None else temperature)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", precision: str = "auto") -> "Reader":
        """The recogniser of a run folder or file; errors as in `load_recogniser`."""
        recogniser, facts = load_recogniser(path)
        return cls(recogniser, facts, device=device, precision=precision)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input in pixels."""
        return self.recogniser.size

    def restrict(self, charset: Charset) -> None:
        """Let only characters of `charset` be written from now on.

        Raises:
            ConfigError: the recogniser knows none of them.
        """
        own = self.recogniser.charset
        refused = [i for i, character in enumerate(own.characters) if character not in charset.characters]
        if len(refused) == len(own):
            raise ConfigError("charset: the recogniser knows none of its characters")
        first = self.recogniser.decoder.num_special
        layer = _classifier(self.recogniser.decoder, first + len(own))
        bias = torch.zeros(layer.out_features, device=layer.weight.device) if layer.bias is None else layer.bias.data
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        layer.bias[[first + i for i in refused]] = -torch.inf

    def read(self, pictures: Iterable[Picture], batch_size: int = 256) -> list[Reading]:
        """Read pictures, each of one word.

        Args:
            pictures: see `Picture`.
            batch_size: words a forward pass.
        Returns:
            A reading a picture; where one is missing or broken its `error` says why.
        Raises:
            TypeError: something that is no picture.
        """
        pictures = list(pictures)
        readings: list[Reading] = []
        for first in range(0, len(pictures), batch_size):
            readings += self._read_some(pictures[first : first + batch_size])
        return readings

    def _read_some(self, pictures: Sequence[Picture]) -> list[Reading]:
        made: list[np.ndarray | str] = [pixels_of(picture, self.size, self.recogniser.rotate) for picture in pictures]
        good = [pixels for pixels in made if not isinstance(pixels, str)]
        read = iter(self.read_pixels(np.stack(good)) if good else [])
        return [Reading("", 0.0, (), x) if isinstance(x, str) else next(read) for x in made]

    def read_pixels(self, images: np.ndarray) -> list[Reading]:
        """Pictures [B, H, W, 3] uint8 at the input size to B readings."""
        return words_of(self.scores(images), self.recogniser, self.temperature)

    @torch.no_grad()
    def scores(self, images: np.ndarray) -> Scores:
        """Pictures [B, H, W, 3] uint8 at the input size to their scores."""
        pixels = torch.from_numpy(images).to(self._device)
        index = torch.arange(len(images), device=self._device)
        return scores_of(self.recogniser, self.recogniser.views(pixels, index=index))


def scores_of(recogniser: Recogniser, views: Tensor) -> Scores:
    """Normalised images `[B, 3, H, W]` to the scores of what the recogniser reads in them."""
    decoder: Any = recogniser.decoder
    with recogniser.autocast():
        frames = recogniser.scale(recogniser.frames(views))
        if decoder.num_special == 1:
            logits = decoder(frames).float()
            return Scores(logits, logits.argmax(2))
        ids = decoder.greedy(frames)[0]
        before = torch.cat([torch.full_like(ids[:, :1], SOS), ids[:, :-1]], dim=1)
        logits = decoder(frames, before).float()
    logits[:, :, [SOS, PAD]] = -torch.inf
    return Scores(logits, ids)


def confidences(scores: Scores, ctc: bool, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities of what was written.

    Args:
        scores: of B words.
        ctc: class a frame; otherwise one a written character.
        temperature: logits are divided by it.
    Returns:
        `[B]`, of whole words (the best path's probability, as the decoders define it), and `[B, L]`, of each place.
    """
    chosen = (scores.logits / temperature).softmax(2).gather(2, scores.ids[:, :, None])[:, :, 0]
    if not ctc:
        chosen = chosen.masked_fill(scores.ids == PAD, 1.0)
    return chosen.prod(1), chosen


def words_of(scores: Scores, recogniser: Recogniser, temperature: float) -> list[Reading]:
    """Texts and confidences; a character that spans several frames (CTC) has its best frame's."""
    decoder, charset = recogniser.decoder, recogniser.charset
    ctc = decoder.num_special == 1
    whole, places = confidences(scores, ctc, temperature)
    readings = []
    for row, chances, confidence in zip(scores.ids.tolist(), places.tolist(), whole.tolist()):
        written = _collapsed(row, chances) if ctc else [(i, p) for i, p in zip(row, chances) if i not in (EOS, PAD)]
        text = charset.decode([i for i, _ in written], decoder.num_special)
        readings.append(Reading(text, confidence, tuple(p for _, p in written)))
    return readings


def _collapsed(row: list[int], chances: list[float]) -> list[tuple[int, float]]:
    """CTC's best path to characters: repeats merged, blanks dropped."""
    written: list[tuple[int, float]] = []
    before = BLANK
    for i, chance in zip(row, chances):
        if i != BLANK and i == before:
            written[-1] = i, max(written[-1][1], chance)
        elif i != BLANK:
            written.append((i, chance))
        before = i
    return written


def pixels_of(picture: Picture, size: tuple[int, int], rotate: Rotate = "never") -> np.ndarray | str:
    """A picture at the input size, [H, W, 3] uint8, or why it cannot be read.

    Raises:
        TypeError: something that is no picture.
    """
    limits = DataConfig()
    try:
        if isinstance(picture, Image.Image):
            return fitted(picture, *size, rotate)
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
                return f"an array must be [H, W] or [H, W, 3] uint8, got {list(picture.shape)} {picture.dtype}"
            return fitted(Image.fromarray(picture), *size, rotate)
        if isinstance(picture, (str, Path)):
            picture = Path(picture).read_bytes()
        if isinstance(picture, bytes):
            return decode_image(picture, *size, max_pixels=limits.max_pixels, min_side=limits.min_side, rotate=rotate)
    except OSError as error:
        return error.strerror or str(error)
    except BrokenImage as error:
        return str(error)
    raise TypeError(f"a picture must be a path, bytes, a uint8 array or a Pillow image, got {type(picture).__name__}")


def _classifier(decoder: nn.Module, classes: int) -> nn.Linear:
    """The layer that gives the logits."""
    found = [x for x in decoder.modules() if isinstance(x, nn.Linear) and x.out_features == classes]
    if len(found) != 1:
        raise ConfigError("charset: this decoder's classes cannot be restricted")
    return found[0]
