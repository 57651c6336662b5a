"""What `rcmstr data synth` renders: plain dataclasses, one field a choice."""

from dataclasses import dataclass, field, fields

from rcmstr_fast.config import ConfigError


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

    colour: float = 1.0
    spacing: float = 0.2
    stretch: float = 0.6
    rotation: float = 0.45
    perspective: float = 0.4
    curve: float = 0.15
    outline: float = 0.15
    shadow: float = 0.2
    shading: float = 0.15
    gradient: float = 0.25
    texture: float = 0.3
    clutter: float = 0.15
    photo: float = 0.6
    lighting: float = 0.35
    fade: float = 0.2
    blur: float = 0.35
    motion: float = 0.1
    low_resolution: float = 0.25
    noise: float = 0.5
    min_contrast: float = 60.0
    jpeg_min: int = 35
    jpeg_max: int = 95

    @classmethod
    def all_on(cls) -> "Effects":
        """Every effect on every crop: the setting of the speed measurement."""
        shares = {f.name: 1.0 for f in fields(cls) if f.name not in ("min_contrast", "jpeg_min", "jpeg_max")}
        return cls(**shares)  # type: ignore[arg-type]


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
    count: int = 100_000
    seed: int = 0
    words: str = ""
    language: str | None = None
    num_words: int = 50_000
    charset: str = "94"
    max_length: int = 25
    numbers: float = 0.1
    random_text: float = 0.05
    punctuation: float = 0.08
    upper: float = 0.35
    capitalised: float = 0.3
    fonts: str = ""
    system_fonts: bool = True
    families: list[str] = field(default_factory=list)
    backgrounds: str = ""
    height_min: int = 32
    height_max: int = 48
    processes: int = 0
    samples: int = 60
    effects: Effects = field(default_factory=Effects)


def validate(config: SynthConfig) -> None:
    """Check what needs no file.

    Raises:
        ConfigError: naming the field, what was expected and what came.
    """
    effects = config.effects
    shares = {f"effects.{f.name}": getattr(effects, f.name) for f in fields(effects) if f.type in (float, "float")}
    shares.pop("effects.min_contrast")
    for name in ("numbers", "random_text", "punctuation", "upper", "capitalised"):
        shares[name] = getattr(config, name)
    rules = [
        (config.count >= 1, "count must be 1 or more", config.count),
        (config.seed >= 0, "seed must be 0 or more", config.seed),
        (config.num_words >= 1, "num_words must be 1 or more", config.num_words),
        (config.max_length >= 1, "max_length must be 1 or more", config.max_length),
        (16 <= config.height_min <= config.height_max <= 256, "heights must be 16 <= height_min <= height_max <= 256",
         (config.height_min, config.height_max)),
        (config.processes >= 0, "processes must be 0 or more", config.processes),
        (config.samples >= 0, "samples must be 0 or more", config.samples),
        (0 <= effects.min_contrast <= 90, "effects.min_contrast must be in [0, 90]", effects.min_contrast),
        (1 <= effects.jpeg_min <= effects.jpeg_max <= 95, "effects must have 1 <= jpeg_min <= jpeg_max <= 95",
         (effects.jpeg_min, effects.jpeg_max)),
        *((0 <= share <= 1, f"{name} must be a share in [0, 1]", share) for name, share in shares.items()),
        (config.numbers + config.random_text <= 1, "numbers + random_text must be at most 1",
         config.numbers + config.random_text),
        (config.upper + config.capitalised <= 1, "upper + capitalised must be at most 1",
         config.upper + config.capitalised),
    ]  # fmt: skip
    for holds, expected, got in rules:
        if not holds:
            raise ConfigError(f"data synth: {expected}, got {got}")
