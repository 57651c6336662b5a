"""The whole evaluation on rendered digits with a tiny encoder."""

import csv
import dataclasses
import io
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError, ModelConfig, PretrainConfig, RunError, resolve
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.evaluation.assemble import _validation_targets, build_recogniser
from rcmstr_fast.evaluation.config import ProbeConfig
from rcmstr_fast.evaluation.decoder_data import open_words
from rcmstr_fast.evaluation.fit import Fit
from rcmstr_fast.evaluation.network_files import load_recogniser
from rcmstr_fast.evaluation.probe import probe
from rcmstr_fast.evaluation.protocols import get_protocol
from rcmstr_fast.evaluation.report import load_result
from rcmstr_fast.models import build_encoder
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.export import export_encoder
from tests.evaluation.rendered import MODEL, digits, picture, tiny_config, write_words


def metrics(run):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "lr", "val_accuracy", "val_ned")
    return [{name: line[name] for name in kept if name in line} for line in lines]


def export(path, seed=5):
    """An encoder.safetensors of an untrained tiny encoder."""
    torch.manual_seed(seed)
    config = resolve(PretrainConfig(model=ModelConfig(**MODEL)))
    parts = {"encoder": build_encoder(config.model), "rectifier": torch.nn.Identity()}
    method = SimpleNamespace(exported=lambda: parts)
    export_encoder(method, path, config, 0)
    return parts["encoder"]


@pytest.mark.parametrize(
    "decoder, steps, normalise", [("ctc", 6, True), ("attention", 4, False), ("transformer", 2, False)]
)
def test_run_folder_and_recogniser(tmp_path, decoder, steps, normalise):
    config = tiny_config(
        tmp_path, decoder=decoder, steps=steps, eval_every=2, protocols=["dtrb36", "exact"], normalise=normalise
    )
    result = probe(config)
    run = tmp_path / "run"
    assert [(s.set, s.protocol, s.score.count, s.total) for s in result.sets] == [
        ("digits", "dtrb36", 20, 20),
        ("digits", "exact", 20, 20),
    ]
    assert load_result(run) == result
    assert (run / "results.csv").read_text().count("\n") == 1 + 2 * 3
    assert "dtrb36" in (run / "table.md").read_text()
    assert Image.open(run / "predictions.png").size[0] > 100
    for name in ("config.yaml", "environment.json", "log.txt", "words.json", "tensorboard", "checkpoints/best.pt"):
        assert (run / name).exists(), name

    rows = list(csv.DictReader((run / "predictions" / "digits.tsv").open(newline=""), delimiter="\t"))
    words = open_words([str(tmp_path / "test")], "test")
    assert [row["label"] for row in rows] == words.labels
    assert [row["correct"] == "1" for row in rows] == [row["label"] == row["prediction"] for row in rows]
    recogniser, facts = load_recogniser(run)
    assert facts == result.info and recogniser.charset == Charset.load("36")
    texts, confidences = recogniser.read_images(np.stack([resized(label) for label in words.labels]))
    assert texts == [row["prediction"] for row in rows]
    assert confidences == pytest.approx([float(row["confidence"]) for row in rows], abs=2e-4)


def resized(label):
    word = Image.open(io.BytesIO(picture(label))).convert("RGB")
    return np.asarray(word.resize((36, 32), Image.Resampling.BICUBIC))


def test_learns_to_read(tmp_path):
    write_words(tmp_path / "train", digits(200, 1, longest=1))
    write_words(tmp_path / "test", digits(20, 2, longest=1))
    config = tiny_config(tmp_path, mode="scratch", decoder="attention", steps=60, eval_every=20, lr=1e-3, batch_size=20)
    result = probe(config)
    assert result.sets[0].score.accuracy >= 0.9
    assert result.info["val_accuracy"] >= 0.9


def test_resume_is_exact(tmp_path, monkeypatch):
    straight = tiny_config(
        tmp_path, run=str(tmp_path / "straight"), decoder="transformer", augment="light", steps=4, eval_every=2
    )
    probe(straight)
    cut = dataclasses.replace(straight, run=str(tmp_path / "cut"))
    whole = Fit._update

    def stop(self, *arguments):
        if self.step == 3:
            raise RunError("stopped")
        whole(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(RunError):
        patch.setattr(Fit, "_update", stop)
        probe(cut)
    assert checkpoint.load(tmp_path / "cut/checkpoints/last.pt")["step"] == 2
    result = probe(cut)
    assert result.sets == load_result(tmp_path / "straight").sets
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "straight")
    a, b = (checkpoint.load(tmp_path / run / "checkpoints/last.pt")["recogniser"] for run in ("straight", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_signal_saves_and_stops(tmp_path, monkeypatch):
    whole = Fit._update

    def ask(self, *arguments):
        whole(self, *arguments)
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Fit, "_update", ask)
    with pytest.raises(RunError, match="signal 15 at step 1, saved") as raised:
        probe(tiny_config(tmp_path))
    assert raised.value.status == 128 + 15
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pt")["step"] == 1


def test_kept_frames_change_nothing(tmp_path):
    for name, gib in (("kept", 1.0), ("computed", 0.0)):
        probe(tiny_config(tmp_path, run=str(tmp_path / name), cache_gib=gib))
    kept, computed = metrics(tmp_path / "kept"), metrics(tmp_path / "computed")
    assert len(kept) == len(computed)
    for a, b in zip(kept, computed):
        assert a == pytest.approx(b, rel=1e-4)
    assert "kept in memory" in (tmp_path / "kept/log.txt").read_text()
    assert "more than cache_gib=0.0" in (tmp_path / "computed/log.txt").read_text()


def test_the_decoder_sees_normalised_frames(tmp_path):
    recogniser = build_recogniser(tiny_config(tmp_path, normalise=True), Charset.load("36")).train()
    frames = 5 + 3 * torch.randn(4, 6, recogniser.encoder.out_channels)
    seen = []
    recogniser.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    recogniser.loss(frames, ["12", "3", "4", "56"])
    assert seen[0].shape == frames.shape
    assert seen[0].mean((0, 1)).abs().max() < 1e-5 and (seen[0].std((0, 1), correction=0) - 1).abs().max() < 1e-3
    for _ in range(99):
        recogniser.loss(frames, ["12", "3", "4", "56"])
    recogniser.eval()
    recogniser.read(frames)
    assert (seen[-1].std((0, 1)) - 1).abs().max() < 0.1 and seen[-1].mean((0, 1)).abs().max() < 0.01


def test_finished_run_is_only_read(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, steps=2)
    first = probe(config)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    monkeypatch.setattr(Fit, "__init__", None)
    again = probe(dataclasses.replace(config, title="named", workers=2))
    assert again.model == "named" and again.sets == first.sets
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "mode, bn, weights_move, statistics_move",
    [("frozen", "running", False, False), ("frozen", "batch", False, True), ("finetune", "running", True, True)],
)
def test_what_is_trained(tmp_path, mode, bn, weights_move, statistics_move):
    encoder = export(tmp_path / "encoder.safetensors")
    probe(tiny_config(tmp_path, encoder=str(tmp_path / "encoder.safetensors"), mode=mode, bn=bn, steps=2))
    trained = load_recogniser(tmp_path / "run")[0].encoder.state_dict()
    before = encoder.state_dict()
    same = {name: torch.equal(x, trained[name]) for name, x in before.items() if x.is_floating_point()}
    weights = [same[name] for name, _ in encoder.named_parameters()]
    statistics = [same[name] for name in same if "running" in name]
    assert all(weights) != weights_move
    assert all(statistics) != statistics_move


def test_random_like_and_decoder_weights_do_not_depend_on_the_encoder(tmp_path):
    export(tmp_path / "encoder.safetensors")
    path = str(tmp_path / "encoder.safetensors")
    charset = Charset.load("36")
    given = build_recogniser(tiny_config(tmp_path, encoder=path), charset)
    like = build_recogniser(tiny_config(tmp_path, like=path, model=ModelConfig(encoder="vit_tiny")), charset)
    assert like.model == given.model
    for name, x in like.state_dict().items():
        if name.startswith("decoder."):
            assert torch.equal(x, given.state_dict()[name]), name
    assert any(not torch.equal(a, b) for a, b in zip(like.encoder.parameters(), given.encoder.parameters()))


def test_untrained_encoder_gets_statistics(tmp_path):
    probe(tiny_config(tmp_path, steps=1))
    state = load_recogniser(tmp_path / "run")[0].encoder.state_dict()
    fresh = build_recogniser(tiny_config(tmp_path), Charset.load("36")).encoder
    variances = [name for name in state if name.endswith("running_var")]
    assert variances and not any(torch.equal(state[name], torch.ones_like(state[name])) for name in variances)
    assert all(torch.equal(x, state[name]) for name, x in fresh.named_parameters())


@pytest.mark.parametrize("model, decoder", [(MODEL, "ctc"), ({"encoder": "vit_tiny", "depth": 1}, "transformer")])
def test_auto_decoder(model, decoder):
    config = ProbeConfig(encoder="random", model=ModelConfig(**model))
    assert build_recogniser(config, Charset.load("36")).decoder_name == decoder


def test_subset_list(tmp_path):
    probe(tiny_config(tmp_path, subset=0.2, steps=1))
    listed = json.loads((tmp_path / "run/words.json").read_text())
    train, val = listed["train"], listed["val"]
    assert train["sizes"] == val["sizes"] == [60] and train["roots"] == [str(tmp_path / "train")]
    assert len(val["records"]) == 6 and len(train["records"]) == 11
    assert not set(val["records"]) & set(train["records"])


def test_broken_pictures_count_as_misread(tmp_path):
    labels = digits(12, 3)
    good = [(picture(label), label) for label in labels]
    write_lmdb(tmp_path / "train", [(b"", "1"), *good])
    other = [(picture(label, "test"), label) for label in labels]
    write_lmdb(tmp_path / "test", [(b"broken", "7"), *other])
    result = probe(tiny_config(tmp_path, steps=2, batch_size=8))
    assert result.sets[0].score.count == 13 and result.sets[0].score.accuracy < 1
    rows = list(csv.reader((tmp_path / "run/predictions/digits.tsv").open(), delimiter="\t"))
    assert rows[1][1:] == ["7", "", "0.0000", "0"]
    assert "1 broken pictures count as misread" in (tmp_path / "run/log.txt").read_text()


def wrong(tmp_path, message, **changes):
    config = tiny_config(tmp_path, **{"steps": 1} | changes)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message) as raised:
        probe(config)
    assert "\n" not in str(raised.value) and set(tmp_path.rglob("*")) == before


def test_user_errors(tmp_path):
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    empty = write_words(tmp_path / "empty", [None])
    marks = write_words(tmp_path / "marks", ["!!", "é"])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    wrong(tmp_path, "encoder must name", encoder="")
    wrong(tmp_path, "nowhere", encoder=str(tmp_path / "nowhere"))
    wrong(tmp_path, "cut off", encoder=str(tmp_path / "cut.safetensors"))
    wrong(tmp_path, "mode=scratch", mode="scratch", encoder=train)
    wrong(tmp_path, "bn=batch", mode="finetune", bn="batch")
    wrong(tmp_path, "subset must be more than 0", subset=0.0)
    wrong(tmp_path, "protocol must be one of", protocols=["dtrb"])
    wrong(tmp_path, "charset must be", charset="95")
    wrong(tmp_path, "test must name at least one", test=[])
    wrong(tmp_path, "different names", test=[f"a={train}", f"a={test}"])
    wrong(tmp_path, "name=folder", test=["a/b=c"])
    wrong(tmp_path, "which does not exist", test=["a=/nowhere/at/all"])
    wrong(tmp_path, "train and test digits must be different words", test=[f"digits={train}"])
    wrong(tmp_path, "train and test digits must be different words", train=[str(tmp_path)])
    wrong(tmp_path, "val and test digits must be different words", val=[test])
    wrong(tmp_path, "test e must hold labelled words", test=[f"e={empty}"])
    wrong(tmp_path, "train: .*0 of 2 records kept", train=[marks], val=[test], test=[f"t={train}"])


def test_other_configuration_or_encoder_is_refused(tmp_path):
    path = tmp_path / "encoder.safetensors"
    export(path)
    probe(tiny_config(tmp_path, encoder=str(path), steps=1))
    wrong(tmp_path, "another configuration .*lr: None -> 0.1", encoder=str(path), lr=0.1)
    export(path, seed=6)
    wrong(tmp_path, "another state of", encoder=str(path))
    (tmp_path / "run/results.json").unlink()
    wrong(tmp_path, "started with another encoder", encoder=str(path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    wrong(tmp_path, "not empty", run=str(tmp_path / "other"))


def test_foreign_recogniser_files(tmp_path):
    export(tmp_path / "encoder.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "encoder.safetensors").read_bytes()[:5000])
    for name, message in (
        ("none", "must be a recogniser.safetensors"),
        ("encoder", "expected a file of format"),
        ("cut", "whole"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recogniser(tmp_path / f"{name}.safetensors")


def test_protocol_of_the_validation_words(tmp_path):
    words = open_words([write_words(tmp_path / "v", ["Ab", "a.b"])], "val")
    kept, dropped = _validation_targets(words, get_protocol("dtrb36"))
    assert kept.labels == ["ab"] and kept.records.tolist() == [0]
    assert dropped == {"a character outside 0-9a-z": 1}
