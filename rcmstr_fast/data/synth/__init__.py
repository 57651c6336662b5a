"""Rendered word images: crops as they are cut out of photographs, with labels, without any download."""

from rcmstr_fast.data.synth.backgrounds import Bank
from rcmstr_fast.data.synth.build import contact_sheet, render_lmdb
from rcmstr_fast.data.synth.config import Effects, SynthConfig
from rcmstr_fast.data.synth.fonts import FontSet, font_files, read_fonts
from rcmstr_fast.data.synth.render import render_word

__all__ = [
    "Bank",
    "Effects",
    "FontSet",
    "SynthConfig",
    "contact_sheet",
    "font_files",
    "read_fonts",
    "render_lmdb",
    "render_word",
]
