import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.synth import Bank, Effects, FontSet, SynthConfig, font_files, read_fonts, render_lmdb, render_word
from rcmstr_fast.data.synth import build as build_module
from rcmstr_fast.data.synth.backgrounds import contrasting, luminance
from rcmstr_fast.data.synth.fonts import Font, chosen_families
from rcmstr_fast.data.synth.warp import MAX_ASPECT, draw_warp, mesh, place
from rcmstr_fast.data.synth.words import WordSource, read_words

pytest.importorskip("fontTools", reason="the synth extra is not installed")
pytest.importorskip("matplotlib", reason="the synth extra is not installed")
NONE = Effects(**{name: 0.0 for name in vars(Effects.all_on()) if not name.startswith(("jpeg", "min"))})


@pytest.fixture(scope="module")
def fonts():
    return FontSet(read_fonts(font_files("", True)))


@pytest.fixture(scope="module")
def bank():
    return Bank(0)


@pytest.fixture
def words_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(
        "\n".join(["street", "caf\u00e9", "Exit", "market", "x" * 40, "\U0001f9ff", "\u043c\u043e\u0441\u0442"]) + "\n",
        encoding="utf-8",
    )
    return str(path)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Fields that keep the preparation of a request short: one font, no built-in words."""
    folder = tmp_path_factory.mktemp("fonts")
    source = next(path for path in font_files("", True) if path.stem == "DejaVuSans")
    (folder / source.name).write_bytes(source.read_bytes())
    (folder / "words").write_text("street\nMarket\nexit\n")
    return {"fonts": str(folder), "system_fonts": False, "words": str(folder / "words")}


def contents(folder) -> dict[bytes, bytes]:
    with lmdb.open(str(folder), readonly=True, lock=False) as database, database.begin() as transaction:
        return dict(transaction.cursor())


def test_only_fonts_with_the_characters_are_chosen(fonts):
    rng = Random(0)
    for text in ("Street", "\u043c\u043e\u0441\u0442", "\u03b1\u03b2\u03b3", "50%"):
        for _ in range(30):
            assert fonts.fonts[fonts.choose(text, rng)].characters.issuperset(text)
    assert not fonts.can_draw("\U0001f9ff\u4e2d")
    with pytest.raises(ValueError, match="no font has every character"):
        fonts.choose("\U0001f9ff\u4e2d", rng)


def test_symbol_fonts_and_last_resort_draw_no_words(fonts):
    able = {Path(font.path).stem for font in fonts.fonts if font.characters.issuperset("Word")}
    assert "DejaVuSans" in able
    assert not able & {"cmsy10", "cmex10", "cmmi10", "LastResortHE-Regular", "STIXSizOneSymReg", "DejaVuSansDisplay"}


def test_families_are_chosen_evenly():
    letters = frozenset("a")
    many = FontSet([Font(f"big{i}.ttf", 0, "Big", letters) for i in range(9)] + [Font("s.ttf", 0, "Small", letters)])
    rng = Random(0)
    share = np.mean([many.choose("a", rng) == 9 for _ in range(2000)])
    assert 0.45 < share < 0.55


def test_only_named_families_are_taken(few, tmp_path):
    found = [Font("a.ttf", 0, "Big", frozenset("a")), Font("b.ttf", 0, "Small", frozenset("a"))]
    assert chosen_families(found, []) == found
    assert chosen_families(found, ["Small"]) == found[1:]
    with pytest.raises(ConfigError, match=r"families must be among those found \(DejaVu Sans\), got 'Absent'"):
        render_lmdb(SynthConfig(out=str(tmp_path / "out"), families=["Absent"], **few))


@pytest.mark.parametrize("texture", [0.0, 1.0])
def test_without_colour_letters_are_dark_on_light_paper(fonts, bank, texture):
    effects = replace(NONE, texture=texture)
    for seed in range(8):
        picture = render_word("street", Random(seed), fonts, bank, effects=effects)
        pixels = np.asarray(picture).astype(int)
        assert np.ptp(pixels, axis=2).max() <= 1
        assert np.percentile(pixels, 2) < 100 and np.percentile(pixels, 80) > 180


def made_font(path, characters):
    """A font that draws a filled block for each of some characters."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef"] + [f"uni{ord(c):04X}" for c in characters]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(dict(zip(map(ord, characters), names[1:], strict=True)))
    block = pen.glyph()
    builder.setupGlyf(dict.fromkeys(names, block))
    builder.setupHorizontalMetrics({name: (1000, 100) for name in names})
    builder.setupHorizontalHeader(ascent=880, descent=-120)
    builder.setupNameTable({"familyName": "Blocks", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_any_script_that_a_font_has(tmp_path):
    made_font(tmp_path / "blocks.ttf", "\u8857\u9053")
    (tmp_path / "words").write_text("\u8857\u9053\nstreet\n\u5e02\u573a\n", encoding="utf-8")
    config = SynthConfig(
        out=str(tmp_path / "set"),
        count=6,
        fonts=str(tmp_path),
        system_fonts=False,
        words=str(tmp_path / "words"),
        charset="any",
        numbers=0.0,
        random_text=0.0,
        punctuation=0.0,
        effects=NONE,
        processes=1,
    )
    records = contents(render_lmdb(config))
    for i in range(1, 7):
        assert records[b"label-%09d" % i].decode() == "\u8857\u9053"
        pixels = np.asarray(Image.open(BytesIO(records[b"image-%09d" % i])).convert("L")).astype(int)
        assert pixels.shape[1] > 1.3 * pixels.shape[0]  # two blocks side by side
        assert 0.4 < (np.abs(pixels - pixels[0, 0]) > 40).mean() < 0.95


def test_unreadable_fonts_and_missing_folders(tmp_path, caplog):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    (tmp_path / "broken too.ttc").write_bytes(b"no fonts")
    assert read_fonts(font_files(str(tmp_path), False)) == []
    assert "broken.ttf" in caplog.text and "broken too.ttc" in caplog.text
    with pytest.raises(ConfigError, match="fonts must be a folder"):
        font_files(str(tmp_path / "absent"), False)
    with pytest.raises(ConfigError, match="no usable font"):
        render_lmdb(SynthConfig(out=str(tmp_path / "out"), fonts=str(tmp_path), system_fonts=False))


@pytest.mark.parametrize("charset", ["36", "94"])
def test_texts_obey_charset_length_and_fonts(fonts, charset):
    pytest.importorskip("wordfreq", reason="the synth extra is not installed")
    config = SynthConfig(charset=charset, max_length=9, num_words=3000, punctuation=0.5)
    source = WordSource(read_words(config), config, fonts)
    rng = Random(0)
    texts = [source.draw(rng) for _ in range(2000)]
    assert all(1 <= len(text) <= 9 and not Charset.load(charset).missing(text) for text in texts)
    assert len(set(texts)) > 800
    assert any(text.isdigit() for text in texts)
    assert any(text.isupper() and text.isalpha() and len(text) > 3 for text in texts) == (charset == "94")


def test_words_of_a_file_that_cannot_be_drawn_are_counted(fonts, words_file):
    config = SynthConfig(words=words_file, charset="any")
    source = WordSource(read_words(config), config, fonts)
    assert source.words == ["street", "caf\u00e9", "Exit", "market", "\u043c\u043e\u0441\u0442"]
    assert source.left_out["longer than max_length"] == 1 and source.left_out["no font has its characters"] == 1
    config = SynthConfig(words=words_file, charset="62")
    assert WordSource(read_words(config), config, fonts).words == ["street", "Exit", "market"]


def test_errors_about_words(fonts, tmp_path, words_file):
    with pytest.raises(ConfigError, match="words must be a text file"):
        read_words(SynthConfig(words="absent.txt"))
    chinese = tmp_path / "zh.txt"
    chinese.write_text("\u4e2d\u6587\n", encoding="utf-8")
    config = SynthConfig(words=str(chinese))
    with pytest.raises(ConfigError, match=r"none of the 1 words .* 1 outside the charset"):
        WordSource(read_words(config), config, fonts)
    pytest.importorskip("wordfreq", reason="the synth extra is not installed")
    with pytest.raises(ConfigError, match=r"language must be one of .* got 'xx'"):
        read_words(SynthConfig(language="xx"))
    both = read_words(SynthConfig(words=words_file, language="de", num_words=50))
    assert "street" in both and "und" in both


warps = st.tuples(st.integers(0, 10**6), st.floats(0.4, 20))


@given(warps)
@settings(deadline=None)
def test_warp_and_its_inverse(drawn):
    seed, aspect = drawn
    rng = Random(seed)
    warp = draw_warp(rng, Effects.all_on(), aspect)
    points = [((rng.random() - 0.5) * aspect, rng.random() - 0.5) for _ in range(40)]
    np.testing.assert_allclose(warp.inverse(warp.forward(points)), points, atol=1e-9)


@given(warps)
@settings(deadline=None)
def test_crops_hold_the_whole_word_and_meshes_follow_the_warp(drawn):
    seed, aspect = drawn
    rng = Random(seed)
    warp = draw_warp(rng, Effects(curve=1.0, rotation=1.0, perspective=0.0), aspect)
    at = place(warp, aspect, 40, (0.05,) * 4)
    assert at.height == 40 and 8 <= at.width <= MAX_ASPECT * 40
    inside = [((rng.random() - 0.5) * aspect, rng.random() - 0.5) for _ in range(200)]
    pixels = (np.array(warp.forward(inside)) - (at.left, at.top)) * at.scale
    assert pixels.min() > 0 and (pixels.max(axis=0) < (at.width, at.height)).all()
    for (x0, y0, x1, y1), quad in mesh(warp, at, (0.0, 0.0), 1.0):
        middle = np.array(quad).reshape(4, 2).mean(axis=0)
        true = warp.inverse([((x0 + x1) / 2 / at.scale + at.left, (y0 + y1) / 2 / at.scale + at.top)])[0]
        if abs(true[1]) < 0.5 and abs(true[0]) < aspect / 2:
            assert np.abs(middle - true).max() < 0.25  # word heights


@given(st.integers(0, 10**6), st.floats(0, 255), st.floats(0, 120))
def test_colours_keep_their_distance(seed, mean, distance):
    colour = contrasting(Random(seed), mean, distance)
    assert colour.min() >= -0.01 and colour.max() <= 255.01
    assert abs(luminance(colour) - mean) >= distance - 0.05


def test_a_word_is_a_function_of_its_generator(fonts, bank):
    a, b, c = (np.asarray(render_word("Street", Random(seed), fonts, bank)) for seed in (1, 1, 2))
    assert a.shape == b.shape and (a == b).all()
    assert a.shape != c.shape or (a != c).any()
    assert a.dtype == np.uint8 and a.shape[2] == 3


@pytest.mark.parametrize("effects", [NONE, Effects(), Effects.all_on()], ids=["none", "default", "all"])
def test_every_crop_shows_ink_of_the_right_height(fonts, bank, effects):
    for seed, text in enumerate(["a", ".", "Hello", "M" * 25, "\u043c\u043e\u0441\u0442", "5:30", "i"] * 4):
        picture = render_word(text, Random(seed), fonts, bank, effects=effects, heights=(30, 35))
        assert 30 <= picture.height <= 35 and 8 <= picture.width <= 16 * 35 + 8
        assert np.asarray(picture.convert("L")).std() > 2


def test_geometry_never_cuts_a_word(fonts, bank):
    upright = FontSet([font for font in fonts.fonts if font.family.startswith("DejaVu")] or fonts.fonts)
    effects = replace(NONE, stretch=1.0, rotation=1.0, perspective=1.0, curve=1.0, min_contrast=90)
    for seed in range(60):
        picture = render_word("HIM" * (1 + seed % 3), Random(seed), upright, bank, effects=effects)
        pixels = np.asarray(picture.convert("L"), dtype=np.float32)
        low, high = pixels.min(), pixels.max()
        dark = (pixels < (low + high) / 2).mean()
        ink = min(dark, 1 - dark)  # on a flat ground one of the two is the letters
        assert high - low > 80 and ink > 0.06, (seed, ink)
        assert (pixels[: picture.height // 2].std() > 5) and (pixels[picture.height // 2 :].std() > 5), seed


@pytest.mark.parametrize("text", ["", "  "])
def test_nothing_to_see_is_an_error(fonts, bank, text):
    with pytest.raises(ValueError, match="visible character"):
        render_word(text, Random(0), fonts, bank)


def test_lmdb_is_the_same_for_any_number_of_processes(tmp_path, few):
    config = SynthConfig(out=str(tmp_path / "one"), count=300, processes=1, seed=7, **few)
    one = contents(render_lmdb(config))
    two = contents(render_lmdb(replace(config, out=str(tmp_path / "two"), processes=2)))
    assert one == two and len(one) == 601
    assert one[b"num-samples"] == b"300"
    assert set(one) == {b"num-samples"} | {
        b"%s-%09d" % (kind, i) for kind in (b"image", b"label") for i in range(1, 301)
    }
    heights = {Image.open(BytesIO(one[b"image-%09d" % i])).height for i in range(1, 301)}
    assert min(heights) == 32 and max(heights) == 48
    longer = contents(render_lmdb(replace(config, out=str(tmp_path / "longer"), count=310)))
    assert all(longer[key] == value for key, value in one.items() if key != b"num-samples")
    other = contents(render_lmdb(replace(config, out=str(tmp_path / "other"), seed=8, count=20)))
    assert other[b"image-000000001"] != one[b"image-000000001"]


def test_the_same_request_is_kept_and_another_refused(tmp_path, few, words_file, caplog):
    config = SynthConfig(**few | {"out": str(tmp_path / "set"), "count": 12, "words": words_file})
    out = render_lmdb(config)
    assert Image.open(out / "samples.png").width == 1280
    assert json.loads((out / "synth.json").read_text(encoding="utf-8"))["seed"] == 0
    before = (out / "data.mdb").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert render_lmdb(replace(config, processes=3)) == out
    assert (out / "data.mdb").stat().st_mtime_ns == before and "is kept" in caplog.text
    for change in ({"count": 13}, {"seed": 1}, {"effects": Effects(noise=1.0)}):
        with pytest.raises(ConfigError, match="new or empty folder"):
            render_lmdb(replace(config, **change))
    Path(words_file).write_text("other\n")
    with pytest.raises(ConfigError, match="new or empty folder"):
        render_lmdb(config)


def test_a_failure_leaves_no_folder(tmp_path, few, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(build_module, "contact_sheet", fail)
    with pytest.raises(OSError, match="disk full"):
        render_lmdb(SynthConfig(out=str(tmp_path / "set"), count=5, **few))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_does_not_look_complete(tmp_path, words_file):
    command = [sys.executable, "-m", "rcmstr_fast.cli.main", "data", "synth", "--out", str(tmp_path / "set")]
    command += ["--count", "1000000", "--words", words_file, "--processes", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".set.partial-*/data.mdb")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "set").exists()


def test_photographs_are_used_and_broken_ones_skipped(tmp_path, few, caplog):
    photos, empty = tmp_path / "photos", tmp_path / "empty"
    photos.mkdir()
    empty.mkdir()
    Image.new("RGB", (400, 300), (10, 200, 30)).save(photos / "green.png")
    (photos / "broken.jpg").write_bytes(b"no photograph")
    effects = replace(NONE, colour=1.0, photo=1.0, jpeg_min=95)
    config = SynthConfig(out=str(tmp_path / "set"), count=40, backgrounds=str(photos), effects=effects, **few)
    records = contents(render_lmdb(replace(config, processes=1)))
    corners = np.array([Image.open(BytesIO(records[b"image-%09d" % i])).getpixel((0, 0)) for i in range(1, 41)])
    green = np.abs(corners.astype(int) - (10, 200, 30)).max(axis=1) < 12
    assert 5 < green.sum() < 40  # half of the draws fall on the broken one, which is replaced by a plain ground
    assert "broken.jpg" in caplog.text
    with pytest.raises(ConfigError, match="found none"):
        render_lmdb(replace(config, out=str(tmp_path / "b"), backgrounds=str(empty)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"height_min": 50}, "height_min must be at most height_max"),
        ({"numbers": 0.7, "random_text": 0.7}, "must be at most 1"),
        ({"effects": Effects(noise=1.5)}, r"effects.noise must be at least 0 and at most 1, got 1.5"),
        ({"effects": Effects(jpeg_min=99)}, "effects.jpeg_min must be at least 1 and at most 95"),
        ({"effects": Effects(min_contrast=200)}, "min_contrast"),
    ],
)
def test_wrong_values_are_one_line(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        render_lmdb(SynthConfig(out=str(tmp_path / "set"), **change))
    assert "\n" not in str(caught.value)
