"""Every format: what its card's snippet computes is what this program computes."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from rcmstr_fast.config import ConfigError
from rcmstr_fast.exchange.export import FORMATS, export
from rcmstr_fast.exchange.importing import import_encoder
from rcmstr_fast.exchange.reading import Reader
from rcmstr_fast.train.exported import load_encoder
from tests.evaluation.rendered import picture
from tests.exchange.foreign import installed, timm_itself
from tests.exchange.tiny import CNN, TPS, VIT, write_encoder, write_recogniser


def run_snippet(card, monkeypatch):
    """Execute the card's Python beside a word.png; its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.S)
    (card.parent / "word.png").write_bytes(picture("12"))
    monkeypatch.chdir(card.parent)
    made: dict = {}
    exec(compile(code, card.name, "exec"), made)
    return made


def word(size):
    """word.png as the encoders take it."""
    height, width = size
    image = Image.open(io.BytesIO(picture("12"))).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5


@pytest.mark.parametrize(
    ("kind", "suffix", "model", "tolerance"),
    [
        ("timm", ".safetensors", VIT, 0.0),
        ("timm", ".pth", VIT | {"class_token": True, "final_norm": False}, 0.0),
        ("parseq", ".pth", VIT, 0.0),
        ("openocr", ".pth", VIT, 0.0),
        ("openocr", ".safetensors", VIT, 0.0),
        ("dtrb", ".pth", CNN, 0.0),
        # The grid is a product of two matrices there, of one here: another rounding, which sampling passes on.
        ("dtrb", ".safetensors", CNN | TPS, 1e-4),
        ("torchscript", ".pt", CNN | TPS, 1e-5),
        ("torchscript", ".pt", VIT, 1e-5),
        # The pictures lie in memory otherwise, and convolutions round by that; on some processors that of patches too.
        ("safetensors", ".safetensors", CNN | TPS, 1e-5),
        ("safetensors", ".safetensors", VIT, 1e-6),
    ],
)
def test_encoders(tmp_path, monkeypatch, kind, suffix, model, tolerance):
    encoder, rectifier, config = write_encoder(tmp_path / "encoder.safetensors", **model)
    file, card = export(tmp_path / "encoder.safetensors", kind, tmp_path / f"made{suffix}")
    assert file.is_file() and card == tmp_path / "made.md"
    with installed():
        frames = run_snippet(card, monkeypatch)["frames"]
    with torch.no_grad():
        expected = encoder(rectifier(word((config.height, config.image_width))))
    assert frames.shape == expected.shape and expected.std() > 0.01
    assert (frames - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("model", [VIT, VIT | {"class_token": True, "final_norm": False}])
def test_timm_itself_takes_the_file_and_gives_it_back(tmp_path, monkeypatch, model):
    timm_itself()
    encoder, _, _ = write_encoder(tmp_path / "encoder.safetensors", **model)
    _, card = export(tmp_path / "encoder.safetensors", "timm", tmp_path / "made.safetensors")
    found = run_snippet(card, monkeypatch)
    assert type(found["encoder"]).__module__ == "timm.models.vision_transformer"
    with torch.no_grad():
        assert torch.equal(found["frames"], encoder(word((32, 32))))
    torch.save(found["encoder"].state_dict(), tmp_path / "theirs.pth")
    import_encoder(tmp_path / "theirs.pth", "timm", tmp_path / "back.safetensors")
    back, _, _ = load_encoder(tmp_path / "back.safetensors")
    with torch.no_grad():
        assert torch.equal(back(word((32, 32))), encoder(word((32, 32))))


@pytest.mark.parametrize(
    ("kind", "suffix", "decoder", "model"),
    [
        ("dtrb", ".pth", "ctc", CNN),
        ("torchscript", ".pt", "ctc", CNN),
        ("torchscript", ".pt", "attention", CNN),
        ("torchscript", ".pt", "transformer", VIT),
        ("safetensors", ".safetensors", "attention", CNN),
    ],
)
def test_recognisers(tmp_path, monkeypatch, kind, suffix, decoder, model):
    path = tmp_path / "recogniser.safetensors"
    write_recogniser(path, decoder, **model)
    (reading,) = Reader.load(path, device="cpu").read([picture("12")])
    _, card = export(tmp_path, kind, tmp_path / f"made{suffix}", licence="CC0-1.0")
    with installed():
        made = run_snippet(card, monkeypatch)
    assert made["text"] == reading.text and reading.text
    if "confidence" in made:
        assert float(made["confidence"][0]) == pytest.approx(reading.confidence, rel=1e-4)
    assert "CC0-1.0" in card.read_text()


@pytest.mark.slow
def test_onnx_in_onnxruntime(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    recogniser = write_recogniser(tmp_path / "recogniser.safetensors", **CNN, tps="trainable")
    path, card = export(tmp_path, "onnx", tmp_path / "made.onnx")
    reader = Reader(recogniser, device="cpu")
    (reading,) = reader.read([picture("12")])
    assert run_snippet(card, monkeypatch)["text"] == reading.text
    session = onnxruntime.InferenceSession(str(path))
    for count in (1, 5):
        images = np.random.default_rng(count).integers(0, 255, (count, *reader.size, 3), dtype=np.uint8)
        normalised = (images.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5
        logits, ids, confidence = session.run(None, {"images": normalised})
        expected = reader.scores(images).logits.numpy()
        assert np.abs(logits - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
        readings = reader.read_pixels(images)
        texts = ["".join(recogniser.charset.characters[i - 1] for i in row if i) for row in ids]
        assert texts == [reading.text for reading in readings] and any(texts)
        assert confidence == pytest.approx([reading.confidence for reading in readings], rel=1e-3)
    assert "Operator set 18" in card.read_text()
    import onnx

    assert onnx.load(path).opset_import[0].version == 18


def test_a_card_says_what_is_known(tmp_path):
    write_encoder(tmp_path / "encoder.safetensors", **CNN, **TPS)
    card = export(tmp_path, "safetensors", tmp_path / "copy.safetensors")[1].read_text()
    for text in (
        "resnet29, width 0.25; TPS rectifier, align_corners=True",
        "32 x 36",
        "0.5 and 0.5",
        "7 steps",
        "preset",
        "commit",
        "of the weights: not stated",
        "Charset**: none",
    ):
        assert text in card, text


def test_the_encoder_of_a_recogniser(tmp_path):
    recogniser = write_recogniser(tmp_path / "recogniser.safetensors", **CNN)
    export(tmp_path, "safetensors", tmp_path / "encoder_alone.safetensors", part="encoder")
    from rcmstr_fast.train.exported import load_encoder

    encoder = load_encoder(tmp_path / "encoder_alone.safetensors")[0]
    assert all(torch.equal(x, recogniser.encoder.state_dict()[name]) for name, x in encoder.state_dict().items())


def test_what_cannot_be_is_one_line(tmp_path):
    vit, cnn, ctc = (tmp_path / f"{name}.safetensors" for name in ("vit", "cnn", "ctc"))
    write_encoder(vit, **VIT)
    write_encoder(cnn, **CNN, tps="trainable")
    write_recogniser(ctc, "attention", **CNN)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out.pth"
    for run, kind, message, more in (
        (vit, "dtrb", "format=dtrb holds the ResNet", {}),
        (cnn, "timm", "format=timm holds vision transformers", {}),
        (cnn, "dtrb", "align_corners=True", {}),
        (ctc, "parseq", "--part encoder takes its encoder", {}),
        (ctc, "dtrb", "this is a attention decoder", {}),
        (vit, "safetensors", "part=recogniser needs a recogniser", {"part": "recogniser"}),
        (vit, "timm", "calibrate needs a recogniser", {"named": ["val"]}),
        (tmp_path / "empty", "timm", "holds neither", {}),
        (tmp_path / "nowhere", "timm", "does not exist", {}),
        (vit, "pickle", "format must be one of", {}),
    ):
        target = tmp_path / "out.safetensors" if kind == "safetensors" else out
        with pytest.raises(ConfigError, match=message) as raised:
            export(run, kind, target, **more)
        assert "\n" not in str(raised.value) and not target.exists()
    for kind in ("onnx", "torchscript", "safetensors", "timm"):
        with pytest.raises(ConfigError, match="out must end in"):
            export(vit, kind, tmp_path / "out.xyz")
    with pytest.raises(ConfigError, match="format=onnx holds encoders and CTC recognisers"):
        export(ctc, "onnx", tmp_path / "out.onnx")


def test_formats_of_the_command_line_are_those_of_the_package():
    import ast
    from pathlib import Path

    from rcmstr_fast.cli import export as command

    words = {
        node.value
        for node in ast.walk(ast.parse(Path(command.__file__).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(FORMATS) <= words
