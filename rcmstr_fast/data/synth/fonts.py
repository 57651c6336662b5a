"""Which fonts there are, which characters each can draw, and loaded fonts at a size."""

import logging
import string
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from PIL import ImageFont

from rcmstr_fast.config import ConfigError

_SUFFIXES = {".ttf", ".otf", ".ttc"}
_SYSTEM_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
#: Hair, thin, sixth, quarter and full space: letters are set apart by one of them.
_SPACES = "\u200a\u2009\u2006\u2005 "
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Font:
    """One face of a font file: where it is, its family, and the characters it draws."""

    path: str
    number: int
    family: str
    characters: frozenset[str]


def font_files(folder: str, system_fonts: bool) -> list[Path]:
    """Font files of the user's folder, of installed packages and of the system, each name once, in a fixed order."""
    found: list[Path] = []
    if folder:
        if not Path(folder).is_dir():
            raise ConfigError(f"data synth: fonts must be a folder, got {folder!r}")
        found += _below(Path(folder))
    if system_fonts:
        found += _packaged()
        for place in _SYSTEM_FOLDERS:
            found += _below(Path(place).expanduser())
    unique: dict[str, Path] = {}
    for path in found:
        unique.setdefault(path.stem.lower(), path)
    return [unique[stem] for stem in sorted(unique)]


def _below(folder: Path) -> list[Path]:
    return _ordered(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


def _ordered(paths: Iterable[Path]) -> list[Path]:
    """TrueType before its OpenType twin, which is slower to draw."""
    return sorted(paths, key=lambda path: (path.suffix.lower() != ".ttf", path))


def _packaged() -> list[Path]:
    """Fonts of packages that announce them, and those that come with matplotlib; no package is imported."""
    found = []
    for group in ("fonts_ttf", "fonts_otf"):
        for entry in entry_points(group=group):
            files = entry.dist.files if entry.dist else None
            found += [Path(str(file.locate())) for file in files or () if file.suffix.lower() in _SUFFIXES]
    spec = find_spec("matplotlib")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        found += _below(Path(place) / "mpl-data" / "fonts" / "ttf")
    return _ordered(found)


def read_fonts(files: list[Path]) -> list[Font]:
    """Read the character tables of font files; files that are no text fonts are left out (logged).

    Raises:
        ConfigError: fontTools is missing.
    """
    try:
        from fontTools.ttLib import TTCollection, TTFont, TTLibError
    except ImportError as error:
        raise ConfigError(
            "data synth: fontTools is missing, install it with: pip install 'rcmstr-fast[synth]'"
        ) from error
    fonts = []
    for path in files:
        try:
            if path.suffix.lower() == ".ttc":
                with TTCollection(path, lazy=True) as collection:
                    faces = list(enumerate(collection.fonts))
                    fonts += [_read_face(path, number, face) for number, face in faces]
            else:
                with TTFont(path, lazy=True) as face:
                    fonts.append(_read_face(path, 0, face))
        except (TTLibError, OSError, KeyError, AttributeError, ValueError) as error:
            _log.warning("font %s is unreadable and left out: %s", path, error)
    return [font for font in fonts if font.characters]


def _read_face(path: Path, number: int, face: Any) -> Font:
    from fontTools.agl import toUnicode

    names: dict[int, str] = face.getBestCmap() or {}
    if len(set(names.values())) < len(names) / 2:
        names = {}  # one glyph for whole blocks of characters: a "last resort" font
    wrong = set()
    for character in string.printable.strip():
        # TeX fonts have other glyphs at the places of ASCII characters; the glyph's name tells.
        meaning = toUnicode(names.get(ord(character), ""))
        if meaning and meaning != character:
            wrong.add(ord(character))
    if len(wrong) > 3:
        names = {}
    characters = frozenset(chr(code) for code in names if code not in wrong)
    family = face["name"].getBestFamilyName() or path.stem
    return Font(str(path), number, family, characters)


def chosen_families(fonts: list[Font], families: list[str]) -> list[Font]:
    """The fonts of the named families; all fonts where none is named.

    Raises:
        ConfigError: a family that no font belongs to.
    """
    found = sorted({font.family for font in fonts})
    for family in families:
        if family not in found:
            known = ", ".join(found) or "no font at all"
            raise ConfigError(f"data synth: families must be among those found ({known}), got {family!r}")
    return [font for font in fonts if not families or font.family in families]


class FontSet:
    """The fonts of a run: which can draw a text, and loaded fonts by size.

    Args:
        fonts: in a fixed order, on which the result depends.
    """

    def __init__(self, fonts: list[Font]) -> None:
        self.fonts = fonts
        self.characters: frozenset[str] = frozenset().union(*(font.characters for font in fonts))
        self._drawable: dict[str, int] = {}
        self._families: dict[int, list[list[int]]] = {}
        self._spaces: dict[tuple[int, int, bool], list[str]] = {}

    def _mask(self, text: str) -> int:
        """Bit i is set where font i has every character of the text."""
        mask = (1 << len(self.fonts)) - 1
        for character in text:
            bits = self._drawable.get(character)
            if bits is None:
                bits = sum(1 << i for i, font in enumerate(self.fonts) if character in font.characters)
                self._drawable[character] = bits
            mask &= bits
        return mask

    def can_draw(self, text: str) -> bool:
        """True where at least one font has every character."""
        return self._mask(text) != 0

    def choose(self, text: str, rng: Random) -> int:
        """A random font that has every character: first a family, then one of its faces.

        Raises:
            ValueError: no font can draw the text.
        """
        mask = self._mask(text)
        families = self._families.get(mask)
        if families is None:
            groups: dict[str, list[int]] = {}
            for i, font in enumerate(self.fonts):
                if mask >> i & 1:
                    groups.setdefault(font.family, []).append(i)
            families = self._families[mask] = [groups[name] for name in sorted(groups)]
        if not families:
            raise ValueError(f"render_word: no font has every character of {text!r}")
        family = families[int(rng.random() * len(families))]
        return family[int(rng.random() * len(family))]

    def load(self, index: int, size: int, shaped: bool) -> ImageFont.FreeTypeFont:
        """The font at a size in pixels; `shaped` texts (not ASCII) get the complex layout where it is built in."""
        font = self.fonts[index]
        return _load(font.path, font.number, size, shaped)

    def narrow_spaces(self, index: int, size: int, shaped: bool) -> list[str]:
        """Spaces that the font has and that are narrower than 0.35 sizes, as `load` sets them."""
        key = index, size, shaped
        if key not in self._spaces:
            font, known = self.load(*key), self.fonts[index].characters
            self._spaces[key] = [s for s in _SPACES if s in known and font.getlength(s) < 0.35 * size]
        return self._spaces[key]


@lru_cache(maxsize=1024)
def _load(path: str, number: int, size: int, shaped: bool) -> ImageFont.FreeTypeFont:
    # With no engine named Pillow takes raqm where it is there; the basic one is faster and enough for ASCII.
    engine = None if shaped else ImageFont.Layout.BASIC
    return ImageFont.truetype(path, size, index=number, layout_engine=engine)
