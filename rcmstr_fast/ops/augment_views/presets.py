"""Presets of `augment_views`: which operations a view is made of, how often, in which order, with which ranges.

A preset is a table; all of them run through the same kernels. The named ones stand in `PRESETS`. `load_preset` also
reads a user's own from a mapping or a YAML file.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rcmstr_fast.fields import ConfigError, check_fields, number

#: The operations; a code in a row of parameters is the place in this list.
OPERATIONS = (
    "contrast",
    "blur",
    "crop_rows",
    "crop_columns",
    "sharpen",
    "piecewise_affine",
    "perspective",
    "flip",
    "rotate",
    "colour_jitter",
    "grey",
    "solarise",
    "resized_crop",
)
#: Operations with the probability that they are applied, as pairs.
Chances: TypeAlias = tuple[tuple[str, float], ...]


def _always(*names: str) -> Chances:
    return tuple((name, 1.0) for name in names)


_PRETRAIN = _always(*OPERATIONS[:7])


@dataclass(frozen=True)
class AugmentPreset:
    """What the views of one kind are made of. Every range is a pair (low, high), drawn from uniformly.

    The defaults are the preset `pretrain`.

    Attributes:
        operations: operation -> probability that it is applied where it is chosen; given as a mapping or as a list of
            names (probability 1), kept as pairs.
        subset: smallest and largest number of `operations` that a view chooses, every number as likely; null: all.
        order: order of the chosen ones: random, or fixed (as they are listed).
        then: operations that follow in their listed order, with their probabilities; they may repeat one of `operations`.
        contrast: factor of the distance from grey level 127; at most 1, so that grey levels stay in [0, 255].
        blur_sigma: standard deviation of the Gaussian, pixels.
        blur_radius: largest radius of the Gaussian's kernel in pixels; a smaller one cuts it off.
        crop_rows: share of the height that is cut off, above and below each.
        crop_columns: share of the width that is cut off, left and right each.
        sharpen_alpha: share of the sharpened picture.
        sharpen_lightness: what is added to the 8 in the middle of the sharpening kernel.
        piecewise_affine: standard deviation of the grid's shifts, shares of height and width.
        perspective: standard deviation of the corners' shifts, shares of height and width.
        rotate: angle in degrees, clockwise.
        solarise: grey level from which on levels are inverted.
        jitter_brightness: factor of the grey levels.
        jitter_contrast: factor of the distance from the picture's mean brightness.
        jitter_saturation: factor of the distance from the pixel's brightness.
        jitter_hue: shift of the hue, shares of the colour circle.
        resized_area: share of the picture's area that is kept.
        resized_aspect: width by height of what is kept, over that of the picture; drawn logarithmically.
    Raises:
        ConfigError: a value out of range, an operation that does not exist, a range turned round.
    """

    operations: Chances = _PRETRAIN
    subset: tuple[int, int] | None = (1, 5)
    order: Literal["random", "fixed"] = "random"
    then: Chances = ()
    contrast: tuple[float, float] = number((0.5, 1.0), low=0, high=1)
    blur_sigma: tuple[float, float] = number((0.5, 1.5), low=0.1, high=2)
    blur_radius: int = number(6, low=1, high=6)
    crop_rows: tuple[float, float] = number((0.0, 0.4), low=0, high=0.49)
    crop_columns: tuple[float, float] = number((0.0, 0.02), low=0, high=0.49)
    sharpen_alpha: tuple[float, float] = number((0.0, 0.5), low=0, high=1)
    sharpen_lightness: tuple[float, float] = number((0.0, 0.5), low=0, high=2)
    piecewise_affine: tuple[float, float] = number((0.02, 0.03), low=0, high=0.1)
    perspective: tuple[float, float] = number((0.01, 0.02), low=0, high=0.1)
    rotate: tuple[float, float] = number((-10.0, 10.0), low=-180, high=180)
    solarise: tuple[float, float] = number((127.5, 127.5), low=0, high=256)
    jitter_brightness: tuple[float, float] = number((0.6, 1.4), low=0, high=4)
    jitter_contrast: tuple[float, float] = number((0.6, 1.4), low=0, high=4)
    jitter_saturation: tuple[float, float] = number((0.6, 1.4), low=0, high=4)
    jitter_hue: tuple[float, float] = number((-0.1, 0.1), low=-0.5, high=0.5)
    resized_area: tuple[float, float] = number((0.08, 1.0), low=0.01, high=1)
    resized_aspect: tuple[float, float] = number((3 / 4, 4 / 3), low=0.1, high=10)

    def __post_init__(self) -> None:
        for name in ("operations", "then"):
            object.__setattr__(self, name, _chances(name, getattr(self, name)))
        for field in dataclasses.fields(self):
            if field.name == "subset" or (isinstance(field.default, tuple) and "bounds" in field.metadata):
                object.__setattr__(self, field.name, _pair(field.name, getattr(self, field.name), self.subset is None))
        check_fields(self, "augmentation preset: ")
        _whole("blur_radius", self.blur_radius)
        if self.order not in ("random", "fixed"):
            raise ConfigError(f"augmentation preset: order must be random or fixed, got {self.order!r}")
        if self.subset is not None:
            for size in self.subset:
                _whole("subset", size)
            if not 0 <= self.subset[0] <= self.subset[1] <= len(self.operations):
                raise ConfigError(
                    f"augmentation preset: subset must be two numbers of 0 to {len(self.operations)} operations, "
                    f"got {list(self.subset)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The operations that can occur, each once, in the order of `OPERATIONS`."""
        used = {name for name, chance in (*self.operations, *self.then) if chance > 0}
        return tuple(name for name in OPERATIONS if name in used)


def _chances(field: str, given: Any) -> Chances:
    """Operations with probabilities as pairs, from a mapping, names, or pairs."""
    if not isinstance(given, (Mapping, list, tuple)):
        raise ConfigError(f"augmentation preset: {field} must map operations to probabilities, got {given!r}")
    listed = given.items() if isinstance(given, Mapping) else [(x, 1.0) if isinstance(x, str) else x for x in given]
    pairs = []
    for item in listed:
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            raise ConfigError(f"augmentation preset: {field} must map operations to probabilities, got {item!r}")
        name, chance = item
        if name not in OPERATIONS:
            raise ConfigError(f"augmentation preset: {field} must name {', '.join(OPERATIONS)}, got {name!r}")
        if not _is_number(chance) or not 0 <= chance <= 1:
            raise ConfigError(f"augmentation preset: {field}.{name} must be at least 0 and at most 1, got {chance!r}")
        pairs.append((name, float(chance)))
    if len({name for name, _ in pairs}) < len(pairs):
        raise ConfigError(f"augmentation preset: {field} must name each operation once, got {[n for n, _ in pairs]}")
    return tuple(pairs)


def _pair(field: str, given: Any, may_be_none: bool) -> Any:
    if given is None and field == "subset" and may_be_none:
        return None
    if not isinstance(given, (list, tuple)) or len(given) != 2 or not all(_is_number(x) for x in given):
        raise ConfigError(f"augmentation preset: {field} must be two numbers, low and high, got {given!r}")
    if not given[0] <= given[1]:
        raise ConfigError(f"augmentation preset: {field} must be low before high, got {list(given)}")
    return tuple(given)


def _whole(field: str, given: Any) -> None:
    if not isinstance(given, int) or isinstance(given, bool):
        raise ConfigError(f"augmentation preset: {field} must be a whole number, got {given!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_COLOURS: Chances = (("colour_jitter", 0.8), ("grey", 0.2))
_CROP: Chances = (("resized_crop", 1.0),)
_IBOT = AugmentPreset(
    operations=(*_CROP, *_COLOURS, ("blur", 1.0)),
    subset=None,
    order="fixed",
    resized_area=(0.14, 1.0),
    blur_sigma=(0.1, 2.0),
    jitter_saturation=(0.8, 1.2),
)
#: Name -> preset, or presets one a view. Sources stand in docs/ops/augment_views.md.
PRESETS: dict[str, AugmentPreset | tuple[AugmentPreset, ...]] = {
    "pretrain": AugmentPreset(),
    "light": AugmentPreset(operations=_always(*OPERATIONS[:4]), subset=(1, 4)),
    "simclr": AugmentPreset(
        operations=(*_CROP, ("flip", 0.5), *_COLOURS, ("blur", 0.5)),
        subset=None,
        order="fixed",
        blur_sigma=(0.1, 2.0),
        blur_radius=1,
        jitter_brightness=(0.2, 1.8),
        jitter_contrast=(0.2, 1.8),
        jitter_saturation=(0.2, 1.8),
        jitter_hue=(-0.2, 0.2),
    ),
    "dig": AugmentPreset(
        operations=_always(*OPERATIONS[:7], "rotate", "solarise", "grey"),
        subset=(2, 5),
        then=_COLOURS,
        crop_rows=(0.0, 0.3),
        crop_columns=(0.0, 0.1),
        piecewise_affine=(0.03, 0.04),
        perspective=(0.05, 0.1),
        jitter_saturation=(0.8, 1.2),
    ),
    "ibot": (
        _IBOT,
        dataclasses.replace(_IBOT, operations=(*_CROP, *_COLOURS, ("blur", 0.1), ("solarise", 0.2))),
    ),
    "none": AugmentPreset(operations=(), subset=None),
}

#: What a view's preset may be given as.
PresetLike: TypeAlias = str | AugmentPreset | Sequence[str | AugmentPreset]


def views_of(preset: Any, num_views: int) -> tuple[AugmentPreset, ...]:
    """The preset of each view.

    Args:
        preset: name, preset, or a sequence of them with one a view.
        num_views: number of views.
    Returns:
        One preset a view.
    Raises:
        ValueError: a name that does not exist, or a sequence of another length.
        TypeError: something else than a name or preset.
    """
    known = PRESETS.get(preset, preset) if isinstance(preset, str) else preset
    if isinstance(known, AugmentPreset):
        return (known,) * num_views
    if isinstance(known, str):
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if not isinstance(known, (list, tuple)):
        raise TypeError(f"preset must be a name, an AugmentPreset or one of them a view, got {type(preset).__name__}")
    if len(known) != num_views:
        raise ValueError(f"preset must have one entry a view, {num_views}, got {len(known)} ({preset!r:.60})")
    return tuple(views_of(one, 1)[0] for one in known)


def load_preset(source: Any) -> AugmentPreset | tuple[AugmentPreset, ...]:
    """A preset by name, from a mapping, or from a YAML file; a list has one entry a view.

    A mapping has the fields of `AugmentPreset`; those that are missing come from the preset named `base` (`pretrain`).

    Args:
        source: key of `PRESETS`, path of a .yaml or .yml file, mapping, preset, or a list of names, mappings, presets.
    Returns:
        The preset, or the presets of the views.
    Raises:
        ConfigError: a name, file, field or value that does not exist or cannot be; one line.
    """
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml"))):
        return load_preset(_read(Path(source)))
    if isinstance(source, AugmentPreset):
        return source
    if isinstance(source, str) and source in PRESETS:
        return PRESETS[source]
    if isinstance(source, (list, tuple)) and source:
        return tuple(_single(load_preset(entry), entry) for entry in source)
    if not isinstance(source, Mapping):
        raise ConfigError(
            f"augmentation preset: must be one of {', '.join(PRESETS)}, a .yaml file, a mapping or a list of them, "
            f"got {source!r}"
        )
    given = dict(source)
    base = given.pop("base", "pretrain")
    if not isinstance(base, str) or base not in PRESETS:
        raise ConfigError(f"augmentation preset: base must be one of {', '.join(PRESETS)}, got {base!r}")
    fields = [field.name for field in dataclasses.fields(AugmentPreset)]
    for name in given:
        if name not in fields:
            raise ConfigError(f"augmentation preset: fields are base, {', '.join(fields)}, got {name!r}")
    return dataclasses.replace(_single(PRESETS[base], base), **given)


def _single(preset: AugmentPreset | tuple[AugmentPreset, ...], name: Any) -> AugmentPreset:
    if not isinstance(preset, AugmentPreset):
        raise ConfigError(f"augmentation preset: {name!r} has an entry a view, where one preset was expected")
    return preset


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"augmentation preset: {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"augmentation preset: {path} is not YAML: {' '.join(str(error).split())}") from error
