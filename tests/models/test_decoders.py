"""Every decoder against its formulas written out in float64, and what all of them promise."""

import pytest
import torch
import torch.nn.functional as F
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
    LinearCTCDecoder,
    SelectiveAttentionDecoder,
    TransformerDecoder,
    build_decoder,
    frames_needed,
)
from rcmstr_fast.models.decoders.autoregressive import teacher

CLASSES, CHANNELS = 9, 12
WRITERS = ["attention", "attention_rclstr", "transformer"]
SMALL = {
    "ctc": lambda: CTCDecoder(CHANNELS, CLASSES, hidden=32),
    "ctc_linear": lambda: LinearCTCDecoder(CHANNELS, CLASSES),
    "attention": lambda: AttentionDecoder(CHANNELS, CLASSES, hidden=32),
    "attention_rclstr": lambda: SelectiveAttentionDecoder(CHANNELS, CLASSES, hidden=32),
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


@pytest.mark.parametrize("name", [name for name in SMALL if name != "ctc_linear"])
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
    if name in WRITERS:
        assert not (ids == SOS).any() and (ids == EOS).sum(1).le(1).all() and ids.shape[1] <= MAX_LENGTH


def count(decoder: nn.Module) -> int:
    return sum(p.numel() for p in decoder.parameters())


def test_published_sizes():
    decoder = TransformerDecoder(384, 39)
    assert len(decoder.layers) == 6 and decoder.norm.normalized_shape == (512,)
    assert decoder.layers[0].self_attention.heads == 8 and decoder.layers[0].mlp.fc1.out_features == 256
    assert AttentionDecoder(512, 39).cell.hidden_size == 256
    assert CTCDecoder(512, 37).classifier.weight.shape == (37, 256)
    assert count(LinearCTCDecoder(256, 96)) == 257 * 96
    assert round(count(SelectiveAttentionDecoder(512, 97)) / 1e6, 2) == 5.84
    assert [DECODERS[name].num_special for name in ("ctc", "ctc_linear", *WRITERS)] == [1, 1, 3, 3, 3]
    assert [DECODERS[name].default_memory for name in SMALL] == ["frames"] * 4 + ["tokens"]


def test_attention_is_that_of_seqclr():
    """Eq. 4 to 8 of the paper, one number after the other; only torch's LSTM cell is taken as it is."""
    torch.manual_seed(0)
    decoder = SMALL["attention"]().double().eval()
    frames = torch.randn(2, 5, CHANNELS, dtype=torch.float64)
    inputs = torch.tensor([[SOS, 3, 7], [SOS, 5, 5]])
    w, v, b = decoder.query.weight, decoder.key.weight, decoder.key.bias
    assert decoder.query.bias is None
    for row in range(2):
        state = torch.zeros(1, 32, dtype=torch.float64), torch.zeros(1, 32, dtype=torch.float64)
        for position, previous in enumerate(inputs[row].tolist()):
            e = [decoder.score.weight[0] @ torch.tanh(w @ state[0][0] + v @ f + b) for f in frames[row]]
            alpha = torch.stack([x.exp() for x in e]) / sum(x.exp() for x in e)
            glimpse = sum(a * f for a, f in zip(alpha, frames[row], strict=True))
            one_hot = torch.zeros(CLASSES, dtype=torch.float64)
            one_hot[previous] = 1
            state = decoder.cell(torch.cat([glimpse, one_hot])[None], state)
            logits = decoder.classifier.weight @ state[0][0] + decoder.classifier.bias
            torch.testing.assert_close(decoder(frames, inputs)[row, position], logits, rtol=0, atol=1e-12)


def test_attention_of_the_released_code_gates_context_and_frames():
    torch.manual_seed(0)
    decoder = SMALL["attention_rclstr"]().double().eval()
    frames = torch.randn(2, 5, CHANNELS, dtype=torch.float64)
    first, second = decoder.context
    assert first.linear.out_features == 32 and second.linear.out_features == CHANNELS
    rows = frames
    for layer in (first, second):
        plain = nn.LSTM(rows.shape[2], 32, bidirectional=True, batch_first=True).double()
        plain.load_state_dict(layer.rnn.state_dict())
        rows = F.linear(plain(rows)[0], layer.linear.weight, layer.linear.bias)
    both = torch.cat([rows, frames], dim=2)
    memory = both * F.linear(both, decoder.gate.weight, decoder.gate.bias)
    torch.testing.assert_close(decoder.remember(frames), memory, rtol=0, atol=1e-12)
    assert decoder.query.bias is not None and decoder.key.in_features == 2 * CHANNELS
    plain_decoder = AttentionDecoder(2 * CHANNELS, CLASSES, 32, query_bias=True).double()
    shared = {name: x for name, x in decoder.state_dict().items() if not name.startswith(("context", "gate"))}
    plain_decoder.load_state_dict(shared)
    inputs = torch.tensor([[SOS, 3, 7], [SOS, 5, 5]])
    torch.testing.assert_close(decoder(frames, inputs), plain_decoder(memory, inputs), rtol=0, atol=1e-12)


def heads_of(x: torch.Tensor, weight: torch.Tensor, heads: int) -> torch.Tensor:
    return (x @ weight.T).view(len(x), heads, -1).transpose(0, 1)


def attend(layer: nn.Module, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt d) V of each head, without a bias anywhere."""
    dim = x.shape[1]
    q = heads_of(x, layer.q.weight, layer.heads)
    k, v = (heads_of(memory, weight, layer.heads) for weight in layer.kv.weight.split(dim))
    scores = (q @ k.transpose(1, 2) / (dim / layer.heads) ** 0.5).masked_fill(mask, -torch.inf)
    return (scores.softmax(2) @ v).transpose(0, 1).flatten(1) @ layer.proj.weight.T


def norm(layer: nn.LayerNorm, x: torch.Tensor, eps: float) -> torch.Tensor:
    mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * layer.weight + layer.bias


def test_transformer_is_that_of_dig():
    """Memory through linear and LayerNorm without positions; unscaled embeddings with sinusoids; no bias in attention."""
    torch.manual_seed(0)
    decoder = SMALL["transformer"]().double().eval()
    for layer in decoder.modules():
        if isinstance(layer, nn.LayerNorm):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    assert not any("attention" in name and "bias" in name for name, _ in decoder.named_parameters())
    tokens, inputs = torch.randn(7, CHANNELS, dtype=torch.float64), torch.tensor([SOS, 3, 7, 5])
    memory = norm(decoder.entry_norm, tokens @ decoder.entry.weight.T + decoder.entry.bias, 1e-6)
    rates = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    angles = torch.arange(4, dtype=torch.float64)[:, None] * rates
    positions = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
    x = decoder.embedding.weight[inputs] + positions
    future = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for layer in decoder.layers:
        y = norm(layer.norm1, x, 1e-5)
        x = x + attend(layer.self_attention, y, y, future)
        x = x + attend(layer.cross_attention, norm(layer.norm2, x, 1e-5), memory, torch.zeros(4, 7, dtype=torch.bool))
        y = norm(layer.norm3, x, 1e-5) @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        x = x + y @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias
    expected = norm(decoder.norm, x, 1e-6) @ decoder.classifier.weight.T + decoder.classifier.bias
    torch.testing.assert_close(decoder(tokens[None], inputs[None])[0], expected, rtol=0, atol=2e-6)  # float32 sinusoids


def test_the_order_of_the_tokens_is_the_encoders_to_tell():
    """Without positions on the memory, shuffled tokens read the same."""
    torch.manual_seed(0)
    decoder = SMALL["transformer"]().double().eval()
    tokens, inputs = torch.randn(2, 9, CHANNELS, dtype=torch.float64), torch.full((2, 3), 4)
    shuffled = tokens[:, torch.randperm(9)]
    torch.testing.assert_close(decoder(tokens, inputs), decoder(shuffled, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WRITERS)
def test_trace_says_where_the_decoder_looked(name):
    """The weights of a trace, times what they weigh, give the glimpse; rows sum to 1 within a word and to 0 behind."""
    torch.manual_seed(0)
    decoder = SMALL[name]().double().eval()
    frames = 3 * torch.randn(6, 14, CHANNELS, dtype=torch.float64)
    ids, confidence = decoder.greedy(frames)
    found = decoder.trace(frames)
    assert torch.equal(found.ids, ids) and torch.equal(found.confidence, confidence)
    torch.testing.assert_close(found.probabilities.prod(1), confidence)
    inside = (ids != PAD).double()
    assert found.attention.shape == (6, ids.shape[1], 14)
    torch.testing.assert_close(found.attention.sum(2).double(), inside, rtol=0, atol=1e-5)
    state, previous = decoder.start(frames, attention=True), torch.full((6,), SOS)
    for position, column in enumerate(ids.unbind(1)):
        _, state = decoder.step(previous, state)
        expected = state.attention * inside[:, position, None]
        torch.testing.assert_close(found.attention[:, position].double(), expected, rtol=0, atol=1e-6)
        previous = column


def test_the_transformers_weights_are_those_of_its_last_layer():
    torch.manual_seed(0)
    decoder = SMALL["transformer"]().double().eval()
    tokens, seen = torch.randn(1, 7, CHANNELS, dtype=torch.float64), []
    last = decoder.layers[-1].cross_attention
    last.register_forward_pre_hook(lambda module, given: seen.append(given[0][0]))
    _, state = decoder.step(torch.tensor([SOS]), decoder.start(tokens, attention=True))
    memory = decoder.entry_norm(decoder.entry(tokens))[0]
    q = heads_of(seen[0][-1:], last.q.weight, last.heads)
    k = heads_of(memory, last.kv.weight[:32], last.heads)
    expected = (q @ k.transpose(1, 2) / 4).softmax(2).mean(0)
    torch.testing.assert_close(state.attention, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("longest", [1, 4])
def test_without_an_end_exactly_the_longest_text_is_written(name, longest):
    decoder = build_decoder(name, CHANNELS, CLASSES - 3, hidden=8, max_length=longest).eval()
    with torch.no_grad():
        decoder.classifier.bias[EOS] = -torch.inf
    ids, _ = decoder.greedy(torch.randn(3, 5, CHANNELS))
    assert ids.shape == (3, longest) and (ids >= decoder.num_special).all()
    targets = torch.full((3, longest), 4)
    with torch.no_grad():
        decoder.classifier.bias[EOS] = 0.0
    assert decoder.loss(torch.randn(3, 5, CHANNELS), targets, torch.full((3,), longest)).isfinite()


def test_frames_a_word_needs():
    """By brute force: the shortest path whose reading is the word."""
    from itertools import product

    def reading(path):
        return [c for c, before in zip(path, (0, *path), strict=False) if c and c != before]

    for word in [(), (1,), (1, 1), (1, 2, 1), (2, 2, 2), (1, 1, 2, 2)]:
        shortest = next(n for n in range(9) for path in product((0, 1, 2), repeat=n) if reading(path) == list(word))
        assert frames_needed(word) == shortest
    assert frames_needed("aabb") == 6 and frames_needed("book") == 5


def test_ctc_greedy_merges_repeats_and_drops_blanks():
    paths = [[0, 3, 3, 0, 3, 1, 1], [2, 2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 2, 1, 0, 0]]

    class Fixed(CTCDecoder):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return frames

    logits = nn.functional.one_hot(torch.tensor(paths), 4).float() * 20
    decoder = Fixed(4, 4, hidden=2)
    ids, confidence = decoder.greedy(logits)
    assert ids.tolist() == [[3, 3, 1, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0], [0] * 7, [1, 1, 2, 1, 0, 0, 0]]
    torch.testing.assert_close(confidence, torch.softmax(torch.tensor([20.0, 0, 0, 0]), 0)[0].pow(7).expand(4))
    assert BLANK == 0
    found = decoder.trace(logits)
    assert torch.equal(found.ids, ids) and torch.equal(found.confidence, confidence)
    runs = [[(1, 2), (4,), (5, 6)], [tuple(range(7))], [], [(0,), (2,), (3,), (4,)]]
    for row, expected in enumerate(runs):
        for place in range(7):
            at = expected[place] if place < len(expected) else ()
            weights = torch.tensor([1 / len(at) if t in at else 0.0 for t in range(7)])
            torch.testing.assert_close(found.attention[row, place], weights)
    assert (found.probabilities[ids == BLANK] == 1).all() and (found.probabilities[ids != BLANK] > 0.99).all()


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


@pytest.mark.parametrize("name", WRITERS)
def test_stepwise_decoding_is_the_parallel_computation(name):
    """Cached steps give the logits that recomputing all positions gives, and greedy writes their maxima."""
    torch.manual_seed(0)
    decoder = SMALL[name]().double().eval()
    frames = torch.randn(4, 14, CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        decoder.classifier.bias[EOS] = -torch.inf  # nothing ends: all 25 positions are compared
        ids, confidence = decoder.greedy(frames)
        assert ids.shape == (4, MAX_LENGTH)
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


@pytest.mark.parametrize("name", WRITERS)
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
