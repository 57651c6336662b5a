"""Foreign checkpoints give the same frames here; what does not fit is named."""

import copy

import pytest
import torch
from torch import nn

from rcmstr_fast.cli.main import main
from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.exchange.importing import import_encoder
from rcmstr_fast.exchange.layouts import dtrb_grid
from rcmstr_fast.train.exported import load_encoder
from rcmstr_fast.train.loop import pretrain
from tests.exchange import foreign
from tests.exchange.tiny import CNN, VIT, pictures, write_encoder


class TRBA(nn.Module):
    """DTRB's Model: TPS, ResNet, BiLSTM, and a head."""

    def __init__(self, channels=3, out=128, size=(32, 36)):
        super().__init__()
        self.Transformation = foreign.TPS_SpatialTransformerNetwork(20, size, size, channels)
        self.FeatureExtraction = foreign.ResNet_FeatureExtractor(channels, out)
        self.SequenceModeling = nn.Sequential(foreign.BidirectionalLSTM(out, 8, 8), foreign.BidirectionalLSTM(8, 8, 8))
        self.Prediction = nn.Linear(8, 37)
        self.load_state_dict(dtrb_grid(*size), strict=False)
        nn.init.normal_(self.Transformation.LocalizationNetwork.localization_fc2.weight, std=0.02)

    def frames(self, x):
        return self.FeatureExtraction(self.Transformation(x)).squeeze(2).transpose(1, 2)


def trba(**more):
    torch.manual_seed(0)
    return foreign.shaken(TRBA(**more), 1)


def prefixed(module, prefix):
    return {prefix + name: x for name, x in module.state_dict().items()}


def same(got, expected, tolerance=1e-4):
    assert expected.std() > 1e-3
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def frames_of(path, images):
    encoder, rectifier, header = load_encoder(path)
    return encoder(rectifier(images)), header


@pytest.mark.parametrize(
    ("project", "prefix", "holder"),
    [
        ("dtrb", "module.", ""),
        ("rclstr", "module.encoder_q.", "state_dict"),
        ("moco", "module.encoder_q.", "state_dict"),
    ],
)
def test_trba_with_its_rectifier(tmp_path, project, prefix, holder):
    network = trba()
    state = prefixed(network, prefix)
    if holder:  # a pretraining checkpoint has a key encoder, queues and an optimiser too
        state |= prefixed(trba(), "module.encoder_k.") | {"module.word_queue": torch.zeros(4, 8)}
        state = {"epoch": 3, "arch": "resnet", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(state, tmp_path / "theirs.pth")
    made = import_encoder(tmp_path / "theirs.pth", project, tmp_path / "ours.safetensors")
    got, header = frames_of(tmp_path / "ours.safetensors", pictures(32, 36))
    with torch.no_grad():
        same(got, network.frames(pictures(32, 36)))
    assert (
        header["tps_align_corners"] and header["rectifier"] == "frozen" and header["origin"] == f"{project} theirs.pth"
    )
    assert f"{prefix}Prediction.weight" in made.left_out and not made.missing
    assert made.mapped[f"{prefix}FeatureExtraction.ConvNet.conv0_1.weight"] == "encoder.stages.0.layers.0.conv.weight"
    assert len(made.left_out) + len(made.mapped) == len(state["state_dict"] if holder else state)
    with_lstm = import_encoder(tmp_path / "theirs.pth", project, tmp_path / "h.safetensors", sequence=True)
    assert with_lstm.model.sequence == "bilstm" and with_lstm.model.sequence_units == 8
    with torch.no_grad():
        same(
            frames_of(tmp_path / "h.safetensors", pictures(32, 36))[0],
            network.SequenceModeling(network.frames(pictures(32, 36))),
        )


def test_grey_networks_see_the_grey_of_colours(tmp_path):
    network = trba(channels=1)
    torch.save(prefixed(network, "module."), tmp_path / "theirs.pth")
    made = import_encoder(tmp_path / "theirs.pth", "dtrb", tmp_path / "ours.safetensors", tps="trainable")
    images = pictures(32, 36)
    grey = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    with torch.no_grad():
        same(frames_of(tmp_path / "ours.safetensors", images)[0], network.frames(grey))
    assert made.notes and made.model.tps == "trainable"


def test_the_rectifier_alone(tmp_path):
    network = trba()
    torch.save(prefixed(network, "module."), tmp_path / "theirs.pth")
    import_encoder(tmp_path / "theirs.pth", "dtrb", tmp_path / "tps.safetensors", part="rectifier")
    from rcmstr_fast.config import ModelConfig
    from rcmstr_fast.models import build_rectifier

    model = ModelConfig(
        image_width=36, tps="frozen", tps_checkpoint=str(tmp_path / "tps.safetensors"), tps_align_corners=True
    )
    with torch.no_grad():
        same(build_rectifier(model)(pictures(32, 36)), network.Transformation(pictures(32, 36)), 1e-3)


def test_dig(tmp_path):
    torch.manual_seed(0)
    network = foreign.DiGEncoder(192, 3, 2, 32).eval()
    other = prefixed(foreign.DiGEncoder(192, 3, 2, 32), "momentum_encoder.")
    torch.save({"model": prefixed(network, "encoder.") | other, "epoch": 9}, tmp_path / "theirs.pth")
    made = import_encoder(tmp_path / "theirs.pth", "dig", tmp_path / "ours.safetensors", image_width=32)
    got, header = frames_of(tmp_path / "ours.safetensors", pictures(32, 32))
    with torch.no_grad():
        same(got, network(pictures(32, 32)).unflatten(1, (8, 8)).mean(1))
    assert header["arch"] == "vit_tiny" and header["depth"] == 2 and header["final_norm"] is False
    assert made.missing == ["encoder.pos_embed"] and "joined in 2 layers" in made.notes[0]


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("project", [lambda: foreign, foreign.timm_itself], ids=["names", "itself"])
def test_timm(tmp_path, project, token):
    torch.manual_seed(0)
    made = project().VisionTransformer
    network = made((32, 32), 4, embed_dim=192, depth=1, num_heads=3, class_token=token, global_pool="", num_classes=0)
    network.eval()
    torch.save(network.state_dict() | {"head.weight": torch.zeros(10, 192)}, tmp_path / "theirs.bin")
    made = import_encoder(tmp_path / "theirs.bin", "timm", tmp_path / "ours.safetensors")
    got, header = frames_of(tmp_path / "ours.safetensors", pictures(32, 32))
    with torch.no_grad():
        tokens = network.forward_features(pictures(32, 32))[:, int(token) :]
        same(got, tokens.unflatten(1, (8, 8)).mean(1))
    assert header["class_token"] is token and made.left_out == ["head.weight"]
    assert made.missing == ["encoder.mask_token"] and made.model.image_width == 32


def test_moco_v3(tmp_path):
    torch.manual_seed(0)
    network = foreign.VisionTransformer((32, 32), 4, 192, 1, 3, False, global_pool="", num_classes=0).eval()
    torch.save({"state_dict": prefixed(network, "module.base_encoder.")}, tmp_path / "theirs.tar")
    import_encoder(tmp_path / "theirs.tar", "moco", tmp_path / "ours.safetensors")
    with torch.no_grad():
        tokens = network.forward_features(pictures(32, 32))
        same(frames_of(tmp_path / "ours.safetensors", pictures(32, 32))[0], tokens.unflatten(1, (8, 8)).mean(1))


class Harmful:
    def __reduce__(self):
        return print, ("code was run",)


def test_wrong_files_are_one_line(tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)}, tmp_path / "resnet50.pth")
    torch.save({"state_dict": Harmful()}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no archive")
    write_encoder(tmp_path / "own.safetensors", **CNN)
    broken = prefixed(trba(), "module.")
    missing = {name: x for name, x in broken.items() if "layer3.0.conv1" not in name}
    torch.save(missing, tmp_path / "missing.pth")
    spoiled = copy.deepcopy(broken)
    spoiled["module.FeatureExtraction.ConvNet.bn1.bias"][3] = torch.nan
    torch.save(spoiled, tmp_path / "nan.pth")
    out = tmp_path / "out.safetensors"
    for name, message in (
        ("resnet50.pth", "are those of no architecture of this program under --from dtrb; nearest: "),
        ("own.safetensors", "no architecture"),
        ("code.pth", "could run code"),
        ("list.pth", "found none"),
        ("text.pth", "neither"),
        ("absent.pth", "does not exist"),
        ("missing.pth", "layer3.0.conv1.weight is missing"),
        ("nan.pth", "tensor encoder.stages.1.layers.1.bn.bias has 1 of 32 values that are NaN"),
    ):
        assert main(["import", str(tmp_path / name), "--from", "dtrb", "--out", str(out)]) == 2
        error = capsys.readouterr()
        assert message in error.err and error.err.count("\n") == 1 and "code was run" not in error.out
        assert not out.exists()
        if name == "resnet50.pth":
            assert error.err.count("tensors fit)") == 5
    with pytest.raises(ConfigError, match=r"out must end in \.safetensors"):
        import_encoder(tmp_path / "nan.pth", "dtrb", tmp_path / "out.pth")


def test_pretraining_starts_from_an_import(tmp_path):
    from tests.train.real import real_config, write_words

    torch.save(prefixed(trba(), "module."), tmp_path / "theirs.pth")
    made = tmp_path / "ours.safetensors"
    assert main(["import", str(tmp_path / "theirs.pth"), "--from", "dtrb", "--out", str(made)]) == 0
    data = write_words(tmp_path / "words", 8)
    model = {"model__tps": "frozen", "model__tps_checkpoint": "random", "model__tps_align_corners": True}
    config: PretrainConfig = real_config(
        tmp_path / "run", data, **model, train__steps=1, train__init=str(made), optim__lr=1e-12, optim__weight_decay=0.0
    )
    pretrain(config)
    (encoder, rectifier, _), (trained, kept, _) = load_encoder(made), load_encoder(tmp_path / "run")
    for a, b in ((encoder, trained), (rectifier, kept)):
        named = dict(b.named_parameters())
        assert all(torch.allclose(x, named[name], atol=1e-6) for name, x in a.named_parameters())
    other = real_config(tmp_path / "other", data, train__init=str(made), model__image_width=44)
    with pytest.raises(
        ConfigError, match=r"set --model.image_width 36 --model.tps_align_corners True --model.tps frozen"
    ):
        pretrain(other)
    assert not (tmp_path / "other").exists()


def test_momentum_networks_start_there_too(tmp_path):
    from rcmstr_fast.config import resolve
    from rcmstr_fast.methods import build_method, settings
    from rcmstr_fast.train.start import check_start, start_from

    encoder, _, model = write_encoder(tmp_path / "encoder.safetensors", **VIT)
    config = resolve(PretrainConfig(model=model, method=settings("rcmstr", queue_size=16)))
    config.train.init = str(tmp_path / "encoder.safetensors")
    config.model.projector_hidden = 8
    check_start(config)
    method = start_from(build_method(config), config)
    found = [x for x in method.modules() if type(x) is type(encoder)]
    assert len(found) == 2
    for module in found:
        assert all(torch.equal(x, encoder.state_dict()[name]) for name, x in module.state_dict().items())


def test_an_import_is_probed(tmp_path):
    from rcmstr_fast.evaluation.probe import probe
    from tests.evaluation.rendered import tiny_config

    torch.save(prefixed(trba(), "module."), tmp_path / "theirs.pth")
    import_encoder(tmp_path / "theirs.pth", "dtrb", tmp_path / "ours.safetensors")
    result = probe(tiny_config(tmp_path, encoder=str(tmp_path / "ours.safetensors"), steps=1))
    assert result.info["encoder_digest"]
