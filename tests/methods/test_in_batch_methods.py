"""SimCLR and SeqCLR against loops, in float64; what their views and sizes are."""

import dataclasses

import numpy as np
import pytest
import torch

from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.methods import find, settings
from rcmstr_fast.methods.protocol import Local
from rcmstr_fast.models.recurrent import BidirectionalLSTM
from tests.methods.harness import BATCH, batches, case_config, make_trainer
from tests.oracles.heads import mlp, unit, weights, windows
from tests.oracles.in_batch import nce


def made(name, encoder, folder, sequence="none", **fields):
    """A float64 method, a batch, and the frames of its two views, [B, T, C] each."""
    config = case_config(name, encoder, precision="fp64")
    config.model.sequence, config.model.sequence_units = sequence, 8
    config.method = dataclasses.replace(config.method, **fields)
    trainer = make_trainer(resolve(config), folder)
    batch = batches(trainer, 0)[0]
    with torch.no_grad():
        frames = [trainer.method.encoder(batch.views[view]).numpy() for view in ("one", "two")]
    return trainer.method, batch, frames


@pytest.mark.parametrize("instances", ["flatten", "all"])
@pytest.mark.parametrize(("encoder", "sequence"), [("resnet29", "none"), ("vit_tiny", "bilstm")])
def test_simclr_is_nt_xent_of_one_vector_an_image(encoder, sequence, instances, tmp_path):
    method, batch, frames = made("simclr", encoder, tmp_path, sequence, instances=instances)
    w = weights(method.head)
    rows = []
    for view in frames:
        vectors = np.stack([x.reshape(-1) if instances == "flatten" else x.mean(0) for x in view])[:, None]
        rows.append(unit(mlp(vectors, w, "1.", "LNRL", 2))[:, 0])
    assert float(method(batch).loss.detach()) == pytest.approx(np.mean(nce(*rows, 0.1)), rel=1e-6)
    assert any(isinstance(x, BidirectionalLSTM) for x in method.encoder.modules()) == (sequence == "bilstm")


@pytest.mark.parametrize(("reduction", "encoder"), [("sum", "vit_tiny"), ("mean", "resnet29")])
@pytest.mark.parametrize("instances", ["all", "window", "frame"])
@pytest.mark.parametrize("projection", ["none", "mlp", "bilstm"])
def test_seqclr_is_its_equation(projection, instances, reduction, encoder, tmp_path):
    fields = {"projection": projection, "instances": instances, "reduction": reduction, "temperature": 0.2}
    method, batch, frames = made("seqclr", encoder, tmp_path, **fields)
    w = weights(method.head)
    rows = []
    for view in frames:
        head = {"none": lambda x: x, "mlp": lambda x: mlp(x, w, "0.", "LRL"), "bilstm": lambda x: lstms(method, x)}
        frame_rows = head[projection](view)
        count = {"all": 1, "window": 3, "frame": view.shape[1]}[instances]
        rows.append(unit(np.concatenate([windows(x, count) for x in frame_rows])))
    terms = nce(*rows, 0.2)
    expected = sum(terms) if reduction == "sum" else np.mean(terms)
    assert float(method(batch).loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert len(terms) == 2 * BATCH * count


def lstms(method, frames):
    """Two bidirectional layers, their linear layers after them, through torch's cells one step at a time."""
    x = torch.from_numpy(frames)
    for layer in (part for part in method.head.modules() if isinstance(part, BidirectionalLSTM)):
        sides = []
        for suffix, order in (("", 1), ("_reverse", -1)):
            cell = torch.nn.LSTMCell(x.shape[2], layer.rnn.hidden_size).double()
            cell.load_state_dict(
                {
                    name: getattr(layer.rnn, f"{name}_l0{suffix}")
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                }
            )
            state, seen = None, []
            for step in range(x.shape[1])[::order]:
                state = cell(x[:, step], state)
                seen.append(state[0])
            sides.append(torch.stack(seen[::order], dim=1))
        x = layer.linear(torch.cat(sides, dim=2))
    return x.detach().numpy()


class Four(Local):
    world_size = 4


def test_the_sum_counts_processes_and_micro_batches(tmp_path):
    method, batch, _ = made("seqclr", "vit_tiny", tmp_path)
    assert method.scale(batch, 10) == 10
    method.collectives = Four()
    batch.step_index = torch.arange(2 * BATCH)
    assert method.scale(batch, 10) == 80


@pytest.mark.parametrize(
    ("fields", "kind", "batch"),
    [
        ({}, "bilstm", 1024),
        ({"instances": "all"}, "bilstm", 1024),
        ({"instances": "frame"}, "mlp", 256),
        ({"projection": "none"}, "none", 1024),
    ],
)
def test_seqclr_trains_as_its_paper_says(fields, kind, batch):
    config = resolve(PretrainConfig(method=settings("seqclr", **fields)))
    optim = config.optim
    assert config.method.projection == kind and config.train.global_batch_size == batch
    assert (optim.name, optim.rho, optim.lr, optim.schedule, optim.clip, optim.weight_decay, optim.warmup_steps) == (
        "adadelta",
        0.95,
        10.0,
        "step",
        5.0,
        1e-4,
        0,
    )


def test_views_are_those_of_the_papers():
    views = find("seqclr").method.views
    config = PretrainConfig(method=settings("seqclr"))
    assert [spec.preset for spec in views(config)] == ["pretrain", "pretrain"]
    config.method.crop_columns = 0.3
    one, two = views(config)
    assert one.preset == two.preset and one.preset.crop_columns == (0.0, 0.3) and one.preset.crop_rows == (0.0, 0.4)
    assert [spec.preset for spec in find("simclr").method.views(PretrainConfig(method=settings("simclr")))] == 2 * [
        "simclr"
    ]
