"""rcmstr_fast: relational contrastive learning and masked image modelling for scene-text recognition.

import rcmstr_fast

model = rcmstr_fast.load("runs/probe")
model.read(["a.jpg", array, pil_image])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcmstr_fast.api import load, load_encoder, pretrain

__all__ = ["__version__", "load", "load_encoder", "pretrain"]

__version__ = "0.1.0"

if not TYPE_CHECKING:  # a checker would take every other name for one of these

    def __getattr__(name: str) -> Any:
        """The functions of `rcmstr_fast.api`; torch is imported when one of them is first asked for."""
        if name in __all__:
            from rcmstr_fast import api

            return getattr(api, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
