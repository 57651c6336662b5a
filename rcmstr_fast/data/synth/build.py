"""A whole request: prepare words and fonts, render in processes, write the LMDB."""

import hashlib
import json
import logging
import multiprocessing
import pickle
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from PIL import Image

from rcmstr_fast import env
from rcmstr_fast.config import ConfigError, RunError
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.progress import progress
from rcmstr_fast.data.staging import staged_folder
from rcmstr_fast.data.synth.backgrounds import find_photos
from rcmstr_fast.data.synth.config import SynthConfig, validate
from rcmstr_fast.data.synth.fonts import FontSet, chosen_families, font_files, read_fonts
from rcmstr_fast.data.synth.render import Renderer
from rcmstr_fast.data.synth.words import WordSource, read_words

_CHUNK = 256
_REQUEST = "synth.json"
_log = logging.getLogger(__name__)

_renderer: Renderer | None = None  # of a worker process


def prepare(config: SynthConfig) -> tuple[WordSource, FontSet, list[Path], dict]:
    """Find words, fonts and photographs.

    Returns:
        These three, and the request: everything that decides the pixels, as plain JSON values.
    Raises:
        ConfigError: a wrong value, a missing file or package, or nothing to render.
    """
    validate(config)
    listed, photos = read_words(config), find_photos(config.backgrounds)
    fonts = FontSet(chosen_families(read_fonts(font_files(config.fonts, config.system_fonts)), config.families))
    if not fonts.fonts:
        raise ConfigError(
            "data synth: no usable font found; install some with: pip install 'rcmstr-fast[synth]', or name a folder "
            "with fonts"
        )
    words = WordSource(listed, config, fonts)
    for reason, count in words.left_out.items():
        if count:
            _log.info("%d words left out: %s", count, reason)
    request = asdict(config)
    for name in ("out", "processes", "samples"):
        del request[name]
    request |= {
        "words_sha256": hashlib.sha256("\n".join(words.words).encode()).hexdigest(),
        "alphabet": "".join(words.alphabet),
        "font_files": [f"{Path(font.path).name}:{font.number}" for font in fonts.fonts],
        "photo_files": hashlib.sha256("\n".join(str(photo) for photo in photos).encode()).hexdigest(),
    }
    return words, fonts, photos, request


def _start_worker(file: str) -> None:
    global _renderer
    _renderer = pickle.loads(Path(file).read_bytes())


def _render(indices: range) -> list[tuple[bytes, str]]:
    if _renderer is None:
        raise RuntimeError("_render runs in a worker that _start_worker prepared")
    return [_renderer(index) for index in indices]


def _crops(renderer: Renderer, count: int, processes: int) -> Iterator[tuple[bytes, str]]:
    """Crops 0 to count - 1 in order; at most a few chunks a process are held."""
    if processes == 1:
        yield from map(renderer, range(count))
        return
    chunks = (range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK))
    # Not fork: the caller may have threads (torch), which a forked child would inherit half-way.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        # By a file: what goes through the pipe at the start of a process blocks for ever if it dies before it reads it.
        file = Path(folder) / "renderer.pickle"
        file.write_bytes(pickle.dumps(renderer))
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(str(file),))
        try:
            waiting: deque[Future] = deque()
            for chunk in chunks:
                waiting.append(pool.submit(_render, chunk))
                if len(waiting) > 3 * processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RunError(
                "data synth: a rendering process died. A script must call render_lmdb under "
                "`if __name__ == '__main__':`, since every process imports it; else memory may have run out"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def render_lmdb(config: SynthConfig) -> Path:
    """Render the crops of a request into an LMDB of the usual scene-text layout.

    The folder also gets `synth.json` (the request) and `samples.png` (a contact sheet). Contents depend on the
    request alone, not on the number of processes. An existing folder with the very same request is kept.

    Returns:
        The LMDB folder.
    Raises:
        ConfigError: a wrong value, nothing to render, or a folder that holds something else.
        RunError: a rendering process died.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(1)  # a worker that imports a script without a guard; the parent says so
    words, fonts, photos, request = prepare(config)
    out = Path(config.out)
    if (out / "data.mdb").exists() and _same(out / _REQUEST, request):
        _log.info("%s holds this very request already and is kept", out)
        return out
    renderer = Renderer(config, words, fonts, photos)
    processes = min(config.processes or env.threads(), -(-config.count // _CHUNK))
    with staged_folder(out) as folder:
        shown: list[tuple[bytes, str]] = []

        def crops() -> Iterator[tuple[bytes, str]]:
            for crop in progress(_crops(renderer, config.count, processes), config.count, "rendering", "crops"):
                if len(shown) < config.samples:
                    shown.append(crop)
                yield crop

        write_lmdb(folder, crops())
        if shown:
            contact_sheet(shown).save(folder / "samples.png")
        (folder / _REQUEST).write_text(json.dumps(request, indent=1, ensure_ascii=False), encoding="utf-8")
    return out


def _same(path: Path, request: dict) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")) == request
    except (OSError, ValueError):
        return False


def contact_sheet(crops: list[tuple[bytes, str]], width: int = 1280) -> Image.Image:
    """Crops in rows of equal height, to look at.

    Args:
        crops: encoded images and labels (labels are not drawn: they may need fonts that are not at hand).
        width: of the sheet in pixels.
    """
    pictures = [Image.open(BytesIO(data)).convert("RGB") for data, _ in crops]
    gap = 4
    line = max(picture.height for picture in pictures) + gap
    places, x, y = [], gap, gap
    for picture in pictures:
        if x + picture.width + gap > width and x > gap:
            x, y = gap, y + line
        places.append((x, y))
        x += picture.width + gap
    sheet = Image.new("RGB", (width, y + line), "white")
    for picture, place in zip(pictures, places):
        sheet.paste(picture, place)
    return sheet
