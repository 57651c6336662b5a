"""What `rcmstr data synth` renders: plain dataclasses, one field a choice."""

from dataclasses import dataclass, field, fields
from typing import Any

from rcmstr_fast.config import ConfigError
from rcmstr_fast.fields import check_fields, number


def _share(default: float) -> Any:
    """The field of a share."""
    return number(default, low=0, high=1)


@dataclass
class Effects:
    """How often each effect is applied; a share of the crops in [0, 1] unless another unit is named.

    Attributes:
        colour: letters and backgrounds of any colour; the other crops are dark letters on light grey, as printed
            on paper, without gradient, clutter or photograph.
        spacing: letters set wider apart or closer.
        stretch: letters made narrower or wider.
        rotation: the word turned, up to 12 degrees for short words.
        perspective: the word seen from the side, above or below, and sheared.
        curve: the word bent along an arc.
        outline: letters with a border of another colour.
        shadow: letters with a shadow.
        shading: letters filled with two colours running into each other.
        gradient: background of two colours running into each other.
        texture: background with a procedural texture (grain, stripes, stains, bricks).
        clutter: background of blurred coloured shapes, like an unsharp photograph.
        photo: background cut from a photograph, where a folder of them is given.
        lighting: uneven light over the crop.
        fade: contrast of the whole crop reduced.
        blur: out of focus.
        motion: motion blur.
        low_resolution: the crop shrunk and enlarged again.
        noise: sensor noise.
        min_contrast: least difference of luminance (0 to 255) of letters and mean background, when drawn;
            textured backgrounds get more.
        jpeg_min: lowest JPEG quality (1 to 95).
        jpeg_max: highest JPEG quality (1 to 95).
    """

    colour: float = _share(1.0)
    spacing: float = _share(0.2)
    stretch: float = _share(0.6)
    rotation: float = _share(0.45)
    perspective: float = _share(0.4)
    curve: float = _share(0.15)
    outline: float = _share(0.15)
    shadow: float = _share(0.2)
    shading: float = _share(0.15)
    gradient: float = _share(0.25)
    texture: float = _share(0.3)
    clutter: float = _share(0.15)
    photo: float = _share(0.6)
    lighting: float = _share(0.35)
    fade: float = _share(0.2)
    blur: float = _share(0.35)
    motion: float = _share(0.1)
    low_resolution: float = _share(0.25)
    noise: float = _share(0.5)
    min_contrast: float = number(60.0, low=0, high=90)
    jpeg_min: int = number(35, low=1, high=95)
    jpeg_max: int = number(95, low=1, high=95)

    @classmethod
    def all_on(cls) -> "Effects":
        """Every effect on every crop: the setting of the speed measurement."""
        shares: dict[str, Any] = {
            f.name: 1.0 for f in fields(cls) if f.name not in ("min_contrast", "jpeg_min", "jpeg_max")
        }
        return cls(**shares)


@dataclass
class SynthConfig:
    """Everything `rcmstr data synth` needs.

    Attributes:
        out: the LMDB folder to make; it may exist only if it holds the very same request.
        count: number of crops.
        seed: the one seed, 0 or more; crop i is a function of the seed and i.
        words: file of words, one a line, UTF-8; empty: none.
        language: language of the built-in word list (needs the `synth` extra);
            null: en where no words file is given, none otherwise.
        num_words: most frequent words taken from the built-in list.
        charset: 36, 62, 94, any, or a charset file; only characters in it are rendered.
        max_length: longest word in characters.
        numbers: share of the crops that show a number, price or time.
        random_text: share of the crops that show random characters of the charset.
        punctuation: share of the words that get a punctuation mark.
        upper: share of the words in capitals.
        capitalised: share of the words with a capital first letter.
        fonts: folder with more fonts (ttf, otf, ttc), searched recursively; empty: none.
        system_fonts: use the fonts of installed Python packages and of the system as well.
        families: font families to take, as the fonts name themselves ("DejaVu Sans"); empty: all found.
        backgrounds: folder with photographs for backgrounds, searched recursively; empty: none.
        height_min: lowest height of a crop in pixels.
        height_max: greatest height of a crop in pixels.
        processes: rendering processes; 0: all CPUs of this process. No influence on the result.
        samples: crops shown in samples.png beside the data; 0: no such picture.
        effects: how often each effect is applied.
    """

    out: str = "data/synth"
    count: int = number(100_000, low=1)
    seed: int = number(0, low=0)
    words: str = ""
    language: str | None = None
    num_words: int = number(50_000, low=1)
    charset: str = "94"
    max_length: int = number(25, low=1)
    numbers: float = _share(0.1)
    random_text: float = _share(0.05)
    punctuation: float = _share(0.08)
    upper: float = _share(0.35)
    capitalised: float = _share(0.3)
    fonts: str = ""
    system_fonts: bool = True
    families: list[str] = field(default_factory=list)
    backgrounds: str = ""
    height_min: int = number(32, low=16, high=256)
    height_max: int = number(48, low=16, high=256)
    processes: int = number(0, low=0, high=1024)
    samples: int = number(60, low=0)
    effects: Effects = field(default_factory=Effects)


def validate(config: SynthConfig) -> None:
    """Check what needs no file.

    Raises:
        ConfigError: naming the field, what was expected and what came.
    """
    check_fields(config)
    effects = config.effects
    rules = [
        (
            config.height_min <= config.height_max,
            "height_min must be at most height_max",
            (config.height_min, config.height_max),
        ),
        (
            effects.jpeg_min <= effects.jpeg_max,
            "effects.jpeg_min must be at most effects.jpeg_max",
            (effects.jpeg_min, effects.jpeg_max),
        ),
        (
            config.numbers + config.random_text <= 1,
            "numbers + random_text must be at most 1",
            config.numbers + config.random_text,
        ),
        (
            config.upper + config.capitalised <= 1,
            "upper + capitalised must be at most 1",
            config.upper + config.capitalised,
        ),
    ]
    for holds, expected, got in rules:
        if not holds:
            raise ConfigError(f"{expected}, got {got}")
