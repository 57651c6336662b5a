"""Rendered words for the pieces that read data."""

import importlib.util
import random
from pathlib import Path

from bench.gpu.setting import Setting


def word_list(setting: Setting) -> str:
    """File of words to render: the given one, the built-in list, or made-up words where its package is missing."""
    if setting.words:
        return setting.words
    path = setting.work / "words.txt"
    if path.is_file():
        return str(path)
    try:
        from wordfreq import top_n_list

        listed = top_n_list("en", 30_000)
    except ImportError:
        generator = random.Random(0)
        parts = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "on", "st")]
        listed = sorted({"".join(generator.choices(parts, k=generator.randint(1, 4))) for _ in range(30_000)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(listed), encoding="utf-8")
    return str(path)


def words(setting: Setting, name: str, count: int, seed: int) -> Path:
    """An LMDB of rendered words; kept where the same request has been rendered already."""
    from rcmstr_fast.data.synth import SynthConfig, render_lmdb

    config = SynthConfig(out=str(setting.work / name), count=count, seed=seed, words=word_list(setting), samples=0)
    config.processes = setting.choose(0, 1)
    return render_lmdb(config)


def origin(setting: Setting) -> str:
    """What was rendered, for the table."""
    if setting.words:
        return Path(setting.words).name
    return "wordfreq en" if importlib.util.find_spec("wordfreq") else "made-up words"
