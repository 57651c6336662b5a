"""No word is both trained on and tested on, or the run says which; tall pictures and non-finite weights of a probe."""

import io
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rcmstr_fast.charset import Charset
from rcmstr_fast.cli.main import main
from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.evaluation.assemble import build_recogniser, open_data, rotation
from rcmstr_fast.evaluation.network_files import load_recogniser
from rcmstr_fast.evaluation.protocols import get_protocol
from rcmstr_fast.evaluation.testing import parse_test_sets
from rcmstr_fast.exchange.reading import Reading
from rcmstr_fast.models import build_encoder, build_rectifier
from rcmstr_fast.train.export import export_encoder
from rcmstr_fast.train.exported import load_encoder
from tests.evaluation.rendered import MODEL, digits, picture, tiny_config


def opened(config):
    charset = Charset.load(config.charset)
    return open_data(config, get_protocol("fewer_labels36"), charset, parse_test_sets(config.test))


@pytest.fixture
def made(tmp_path):
    tiny_config(tmp_path)
    return tmp_path


def test_sets_that_are_apart_are_quiet(made, caplog):
    data = opened(tiny_config(made))
    assert (len(data.train), len(data.val), len(data.tests["digits"])) == (54, 6, 20)
    assert data.dropped == {"for validation": 6} and not caplog.records


@pytest.mark.parametrize("copy", ["again", "subfolder", "link", "database"])
def test_validation_words_are_not_trained_on_however_they_are_given_twice(made, copy, caplog):
    train = [str(made / "train")]
    if copy == "again":
        train *= 2
    elif copy == "subfolder":
        shutil.copytree(made / "train", made / "all" / "part")
        train = [str(made / "all"), str(made / "all" / "part")]
    elif copy == "link":
        (made / "link").symlink_to(made / "train")
        train.append(str(made / "link"))
    else:  # the same pictures in another order, in another database
        words = [(picture(label, f"train {i}"), label) for i, label in enumerate(digits(60, 1))]
        write_lmdb(made / "copy", words[::-1])
        train.append(str(made / "copy"))
    data = opened(tiny_config(made, train=train, val_fraction=0.25))
    held = set(data.val.source.read(data.val.records))
    assert not held & set(data.train.source.read(data.train.records))
    dropped = data.dropped["copy of a validation word"]
    assert len(data.train) + len(data.val) + dropped == 120 and len(data.val) == 30
    assert f"{dropped} words are left out" in caplog.text


def test_copies_of_training_words_in_a_test_set_are_counted_and_refused(made, caplog):
    labels = digits(60, 1)
    words = [(picture(label, f"train {i}"), label) for i, label in enumerate(labels)]
    others = [(picture(label, "new"), label) for label in digits(10, 5)]
    write_lmdb(made / "leaky", [*others, *words])
    config = tiny_config(made, test=[f"leaky={made / 'leaky'}"])
    with pytest.raises(
        ConfigError, match=r"54 of 70 pictures of test leaky are in train, such as .*leaky/data.mdb:image-"
    ):
        opened(config)
    with pytest.raises(ConfigError, match=r"6 of 70 pictures of test leaky are in val"):
        opened(config)
    data = opened(tiny_config(made, test=[f"leaky={made / 'leaky'}"], allow_overlap=True))
    assert len(data.tests["leaky"]) == 70 and "54 of 70 pictures of test leaky are in train" in caplog.text


def test_given_validation_words_must_be_others(made):
    copies = [(picture(label, f"train {i}"), label) for i, label in enumerate(digits(60, 1))][:5]
    write_lmdb(made / "val", [*copies, (picture("7", "val"), "7")])
    with pytest.raises(ConfigError, match="5 of 6 pictures of val are in train"):
        opened(tiny_config(made, val=[str(made / "val")]))
    with pytest.raises(ConfigError, match="must be different words"):
        opened(tiny_config(made, val=[str(made / "train")]))
    assert opened(tiny_config(made, val=[str(made / "train")], allow_overlap=True)).val


def test_empty_records_are_no_common_pictures(made):
    write_lmdb(made / "holes", [(b"", "1"), (picture("2", "h"), "2")])
    write_lmdb(made / "more", [(b"", "1"), *[(picture(x, f"m{i}"), x) for i, x in enumerate(digits(20, 6))]])
    assert opened(tiny_config(made, train=[str(made / "more")], test=[f"h={made / 'holes'}"]))


def encoder(folder, **data):
    """A run folder with an untrained encoder whose pretraining had these fields of `data`."""
    config = PretrainConfig()
    for name, value in {**MODEL}.items():
        setattr(config.model, name, value)
    for name, value in data.items():
        setattr(config.data, name, value)
    config = resolve(config)
    parts = {"encoder": build_encoder(config.model), "rectifier": build_rectifier(config.model)}
    holder = SimpleNamespace(exported=lambda: parts)
    folder.mkdir()
    export_encoder(holder, folder / "encoder.safetensors", config, 1)
    return str(folder)


def test_test_pictures_among_those_of_the_pretraining_are_said_and_allowed(made, caplog):
    seen = encoder(made / "seen", roots=[str(made / "train"), str(made / "test")])
    opened(tiny_config(made, encoder=seen))
    assert "20 of 20 pictures of test digits are in the pretraining (without labels)" in caplog.text
    caplog.clear()
    opened(tiny_config(made, encoder=encoder(made / "unseen", roots=[str(made / "train")])))
    assert not caplog.records
    opened(tiny_config(made, encoder=encoder(made / "gone", roots=["/nowhere"])))
    assert "are not at hand" in caplog.text


def test_rotation_follows_the_encoder_unless_ordered(made):
    tall = encoder(made / "tall", rotate="tall")
    assert rotation(tiny_config(made, encoder=tall)) == "tall"
    assert rotation(tiny_config(made, encoder=tall, rotate="never")) == "never"
    assert rotation(tiny_config(made)) == "never" and rotation(tiny_config(made, rotate="tall")) == "tall"


def test_a_recogniser_remembers_its_rotation_and_read_obeys(made, capsys, monkeypatch):
    recogniser = build_recogniser(tiny_config(made), Charset.load("36"))
    recogniser.rotate = "tall"
    recogniser.save(made / "tall.safetensors", {})
    assert load_recogniser(made / "tall.safetensors")[0].rotate == "tall"
    lying = Image.open(io.BytesIO(picture("123"))).convert("RGB").resize((80, 20))
    ImageDraw.Draw(lying).rectangle((2, 2, 20, 8), fill="red")
    lying.transpose(Image.Transpose.ROTATE_270).save(made / "standing.png")
    lying.save(made / "lying.png")
    seen = []
    monkeypatch.setattr(
        "rcmstr_fast.exchange.reading.Reader.read_pixels",
        lambda self, images: seen.extend(images) or [Reading("x", 1.0, (1.0,))] * len(images),
    )
    files = [str(made / "standing.png"), str(made / "lying.png")]
    assert main(["read", *files, "--recogniser", str(made / "tall.safetensors"), "--device", "cpu"]) == 0
    assert (seen[0] == seen[1]).all()
    recogniser.rotate = "never"
    recogniser.save(made / "never.safetensors", {})
    assert main(["read", *files, "--recogniser", str(made / "never.safetensors"), "--device", "cpu"]) == 0
    assert (seen[2] != seen[3]).any() and (seen[3] == seen[1]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_foreign_weights_that_are_not_finite_are_refused_by_name(made, value):
    run = encoder(made / "foreign")
    file = made / "foreign" / "encoder.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    name = next(name for name, x in tensors.items() if x.dim() == 4)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata)
    with pytest.raises(
        ConfigError, match=rf"tensor {name} has 1 of {tensors[name].numel()} values that are NaN or infinite"
    ):
        load_encoder(run)
