import pytest
import torch
from torch import nn

from rcmstr_fast.models.decoders import (
    BLANK,
    DECODERS,
    EOS,
    MAX_LENGTH,
    PAD,
    SOS,
    AttentionDecoder,
    CTCDecoder,
    TransformerDecoder,
)
from rcmstr_fast.models.decoders.autoregressive import teacher

CLASSES, CHANNELS = 9, 12
SMALL = {
    "ctc": lambda: CTCDecoder(CHANNELS, CLASSES, hidden=32),
    "attention": lambda: AttentionDecoder(CHANNELS, CLASSES, hidden=32),
    "transformer": lambda: TransformerDecoder(CHANNELS, CLASSES, layers=2, dim=32, heads=2, inner=32, dropout=0.0),
}


def toy(decoder: nn.Module, fill: int = -100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eight words of 1 to 5 characters and frames that have nothing to do with them."""
    generator = torch.Generator().manual_seed(3)
    frames = torch.randn(8, 14, CHANNELS, generator=generator)
    lengths = torch.arange(8) % 5 + 1
    targets = torch.randint(decoder.num_special, CLASSES, (8, 6), generator=generator)
    return frames, targets.masked_fill(torch.arange(6) >= lengths[:, None], fill), lengths


def words(ids: torch.Tensor, special: int) -> list[list[int]]:
    return [[i for i in row if i >= special] for row in ids.tolist()]


@pytest.mark.parametrize("name", SMALL)
def test_learns_eight_words_by_heart(name):
    torch.manual_seed(0)
    decoder = SMALL[name]()
    frames, targets, lengths = toy(decoder)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        loss = decoder.loss(frames, targets, lengths)
        loss.backward()
        optimiser.step()
    ids, confidence = decoder.eval().greedy(frames)
    assert loss < 0.3 and ids.dtype == torch.int64
    expected = [row[:n] for row, n in zip(targets.tolist(), lengths.tolist(), strict=True)]
    assert words(ids, decoder.num_special) == expected
    assert confidence.shape == (8,) and (confidence > 0.3).all() and (confidence <= 1).all()


@pytest.mark.parametrize("name", SMALL)
def test_what_stands_behind_a_word_is_ignored(name):
    torch.manual_seed(0)
    decoder = SMALL[name]().eval()
    losses = [decoder.loss(*toy(decoder, fill)) for fill in (-100, PAD, 5)]
    assert losses[0] == losses[1] == losses[2] and losses[0].dtype == torch.float32 and losses[0].dim() == 0


@pytest.mark.parametrize("name", SMALL)
def test_specials_are_never_read_as_characters(name):
    """Untrained decoders too: characters first, then only special classes."""
    torch.manual_seed(1)
    decoder = SMALL[name]().eval()
    ids, _ = decoder.greedy(torch.randn(16, 14, CHANNELS) * 3)
    special = ids < decoder.num_special
    assert (special.long().diff(dim=1) >= 0).all()
    if name != "ctc":
        assert not (ids == SOS).any() and (ids == EOS).sum(1).le(1).all() and ids.shape[1] <= MAX_LENGTH + 1


def test_published_sizes():
    decoder = TransformerDecoder(384, 39)
    assert len(decoder.layers) == 6 and decoder.norm.normalized_shape == (512,)
    assert decoder.layers[0].self_attention.heads == 8 and decoder.layers[0].mlp.fc1.out_features == 256
    assert AttentionDecoder(512, 39).cell.hidden_size == 256
    assert CTCDecoder(512, 37).classifier.weight.shape == (37, 256)
    assert [DECODERS[name].num_special for name in ("ctc", "attention", "transformer")] == [1, 3, 3]


def test_ctc_greedy_merges_repeats_and_drops_blanks():
    paths = [[0, 3, 3, 0, 3, 1, 1], [2, 2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 2, 1, 0, 0]]

    class Fixed(CTCDecoder):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return frames

    logits = nn.functional.one_hot(torch.tensor(paths), 4).float() * 20
    ids, confidence = Fixed(4, 4, hidden=2).greedy(logits)
    assert ids.tolist() == [[3, 3, 1, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0], [0] * 7, [1, 1, 2, 1, 0, 0, 0]]
    torch.testing.assert_close(confidence, torch.softmax(torch.tensor([20.0, 0, 0, 0]), 0)[0].pow(7).expand(4))
    assert BLANK == 0


def test_ctc_words_that_do_not_fit_cost_nothing():
    decoder = SMALL["ctc"]()
    frames = torch.randn(2, 4, CHANNELS)
    targets, lengths = torch.tensor([[1, 1, 1, 1], [1, 2, 0, 0]]), torch.tensor([4, 2])
    loss = decoder.loss(frames, targets, lengths)
    loss.backward()
    alone = decoder.loss(frames[1:], targets[1:], lengths[1:])
    torch.testing.assert_close(loss, alone / 2)
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_teacher_forcing_shifts_by_one():
    inputs, outputs = teacher(torch.tensor([[7, 5, -100], [4, 6, 8], [-100, 3, 3]]), torch.tensor([2, 3, 0]))
    assert inputs.tolist() == [[SOS, 7, 5, PAD], [SOS, 4, 6, 8], [SOS, PAD, PAD, PAD]]
    assert outputs.tolist() == [[7, 5, EOS, PAD], [4, 6, 8, EOS], [EOS, PAD, PAD, PAD]]


@pytest.mark.parametrize("name", ["attention", "transformer"])
def test_stepwise_decoding_is_the_parallel_computation(name):
    """Cached steps give the logits that recomputing all positions gives, and greedy writes their maxima."""
    torch.manual_seed(0)
    decoder = SMALL[name]().double().eval()
    frames = torch.randn(4, 14, CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        decoder.classifier.bias[EOS] = -torch.inf  # nothing ends: all 26 positions are compared
        ids, confidence = decoder.greedy(frames)
        assert ids.shape == (4, MAX_LENGTH + 1)
        inputs = torch.cat([torch.full((4, 1), SOS), ids[:, :-1]], dim=1)
        together = decoder(frames, inputs)
        state, steps = decoder.start(frames), []
        for column in inputs.unbind(1):
            logits, state = decoder.step(column, state)
            steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, dim=1), together, rtol=0, atol=1e-12)
    together[..., [SOS, PAD]] = -torch.inf
    probability, best = together.softmax(2).max(2)
    assert torch.equal(best, ids)
    torch.testing.assert_close(confidence.double(), probability.prod(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["attention", "transformer"])
def test_decoding_stops_when_all_words_have_ended(name):
    decoder = SMALL[name]().eval()
    with torch.no_grad():
        decoder.classifier.bias[EOS] = 50.0
    ids, confidence = decoder.greedy(torch.randn(3, 14, CHANNELS))
    assert ids.tolist() == [[EOS]] * 3 and (confidence > 0.99).all()


def test_frame_keys_are_computed_once(monkeypatch):
    decoder = SMALL["transformer"]().eval()
    calls = []
    for layer in decoder.layers:
        original = layer.cross_attention.keys_values
        monkeypatch.setattr(layer.cross_attention, "keys_values", lambda x, f=original: calls.append(x.shape) or f(x))
    decoder.greedy(torch.randn(2, 14, CHANNELS))
    assert calls == [(2, 14, 32)] * len(decoder.layers)


def test_words_beyond_the_positions_are_refused():
    decoder = SMALL["transformer"]()
    with pytest.raises(ValueError, match="at most 25 characters, got 26"):
        decoder.loss(torch.randn(1, 14, CHANNELS), torch.full((1, 26), 4), torch.tensor([26]))


@pytest.mark.parametrize("name", SMALL)
def test_runs_under_autocast(name):
    decoder = SMALL[name]()
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder.loss(*toy(decoder))
        ids, _ = decoder.eval().greedy(toy(decoder)[0])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and len(ids) == 8


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_round_trip(name):
    first, second = SMALL[name](), SMALL[name]()
    second.load_state_dict(first.state_dict())
    frames, targets, lengths = toy(first)
    assert first.loss(frames, targets, lengths) == second.loss(frames, targets, lengths)
