import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.methods import Batch, Local, build_method
from rcmstr_fast.methods.losses import monitors
from tests.methods.tiny import random_batch, tiny_config

METHODS = [
    ("seqmoco", {"kl": False}),
    ("seqmoco", {}),
    ("rclstr", {"levels": ["subword"], "inter": "none"}),
    ("rclstr", {"inter": "none"}),
    ("rclstr", {}),
    ("rcmstr", {}),
    ("rcmstr", {"coupled": True, "norm_pix": True}),
    ("rcmstr", {"mim_view": "own", "pixel_loss": "l1"}),
    ("rclstr", {"momentum_ramp": "cosine"}),
    ("rclstr", {"division": "drop_boundary"}),
    ("rclstr", {"division": "vertical_projection"}),
    ("rclstr", {"inter_loss": "info"}),
    ("rclstr", {"inter_loss": "re", "inter": "f2s", "inter_pairing": "pool"}),
    ("rclstr", {"preset": "rclstr_code"}),
    ("rcmstr", {"mask_unit": "column", "mask_rule": "any", "num_blocks": 2}),
    ("rcmstr", {"mask_unit": "lattice", "enqueue_per_image": 3, "bn_group_size": 2}),
]


def run_step(method, batch):
    method.begin_step()
    output = method(batch, monitor=True, pictures=True)
    output.loss.backward()
    method.end_step()
    return output


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
@pytest.mark.parametrize(("name", "switches"), METHODS, ids=lambda v: str(v))
def test_every_switch_takes_a_step(encoder, name, switches):
    config = tiny_config(encoder, name=name, **switches)
    method = build_method(config).train()
    output = run_step(method, random_batch(config))
    assert all(torch.isfinite(value) for value in output.terms.values()), output.terms
    for parameter_name, parameter in method.online.named_parameters():
        level_only = parameter_name.startswith("predictors.") and config.method.inter != "none"
        token = parameter_name.endswith("mask_token") and name != "rcmstr"
        assert parameter.grad is not None or token or level_only, parameter_name
    assert all(p.grad is None for p in method.momentum.parameters())
    expected = {"loss", "loss_rcl", "loss_hier"} | {f"loss_ere_{level}" for level in config.method.levels}
    assert expected <= set(output.terms)
    assert ("loss_mim" in output.terms) == (name == "rcmstr")
    assert ("loss_f2s" in output.terms) == (config.method.inter in ("f2s", "both"))


def test_terms_add_up_to_the_papers_sums():
    config = tiny_config(name="rcmstr", inter_weight=0.5)
    terms = run_step(build_method(config).train(), random_batch(config)).terms
    hier = sum(terms[f"loss_ere_{level}"] for level in ("frame", "subword", "word"))
    torch.testing.assert_close(terms["loss_hier"], hier)
    torch.testing.assert_close(terms["loss_rcl"], hier + 0.5 * (terms["loss_f2s"] + terms["loss_s2w"]))
    torch.testing.assert_close(terms["loss"], terms["loss_mim"] + 0.1 * terms["loss_rcl"])
    for level in ("frame", "subword", "word"):
        again = terms[f"loss_info_{level}"] + 0.3 * terms[f"loss_kl_{level}"]
        torch.testing.assert_close(terms[f"loss_ere_{level}"], again)


def test_inter_level_terms_are_relation_kl_over_the_pairs_by_hand():
    config = tiny_config(name="rclstr")
    method = build_method(config).train()
    batch = random_batch(config)
    method.begin_step()
    seen = {}
    method.loss.register_forward_pre_hook(lambda _, args: seen.update(query=args[0], key=args[2]))
    terms = method(batch).terms
    query, key = seen["query"]["frame"].reshape(4, 26, -1), seen["key"]["subword"].reshape(4, 4, -1)
    rows = [(query[b, t], key[b, s]) for b in range(4) for s in range(4) for t in range(6 * s, 6 * s + 8)]
    q, p = (torch.stack(side).double() for side in zip(*rows))
    expected = ops.relation_kl(q, p, method.queues["subword"].rows.double(), tau=0.04, backend="reference")
    torch.testing.assert_close(terms["loss_f2s"].double(), expected, rtol=1e-4, atol=1e-6)


def test_keys_are_enqueued_after_the_step_in_batch_order():
    config = tiny_config(name="rclstr")
    method = build_method(config).train()
    before = {level: queue.rows.clone() for level, queue in method.queues.items()}
    method.begin_step()
    method(random_batch(config))
    assert all(torch.equal(method.queues[level].rows, rows) for level, rows in before.items())
    method.end_step()
    assert [int(method.queues[level].pointer) for level in ("frame", "subword", "word")] == [104 % 64, 16, 4]
    torch.testing.assert_close(method.queues["word"].rows[4:], before["word"][4:])
    assert not torch.allclose(method.queues["word"].rows[:4], before["word"][:4])


def test_momentum_follows_parameters_only():
    config = tiny_config(name="seqmoco", momentum=0.9)
    method = build_method(config)
    with torch.no_grad():
        for parameter in method.online.parameters():
            parameter.add_(1.0)
    old = [p.clone() for p in method.momentum.parameters()]
    method.begin_step()
    for was, now in zip(old, method.momentum.parameters()):
        torch.testing.assert_close(now, was + 0.1, rtol=1e-5, atol=1e-5)


def test_key_grouping_changes_statistics_but_not_the_order_of_keys():
    config = tiny_config(name="seqmoco", bn_group_size=2, batch=8)
    method = build_method(config).train()
    batch = random_batch(config, batch=8)
    same = method.momentum(batch.views["key"], 4, torch.arange(8))["subword"]
    plain = method.momentum(batch.views["key"], 4, None)["subword"]
    torch.testing.assert_close(same, plain)
    grouping = method._grouping(batch)
    assert sorted(grouping.tolist()) == list(range(8)) and grouping.tolist() != list(range(8))
    mixed = method.momentum(batch.views["key"], 4, grouping)["subword"]
    assert (mixed * plain).sum(dim=1).min() > 0.3 and not torch.allclose(mixed, plain)


def test_rclstr_code_divides_the_kl_by_the_queue():
    config = tiny_config(name="rclstr", preset="rclstr_code")
    terms = run_step(build_method(config).train(), random_batch(config)).terms
    torch.testing.assert_close(terms["loss_ere_word"], terms["loss_info_word"] + 0.3 / 64 * terms["loss_kl_word"])


def test_masked_step_ignores_hidden_pixels():
    config = tiny_config(name="rcmstr")
    method = build_method(config).train()
    batch = random_batch(config)
    masks = method.mim.masks(batch)
    features = method.online.encoder.forward_masked(batch.views["query"], masks, "anchored")[0]
    poisoned = batch.views["query"].masked_fill(masks.pixels, float("nan"))
    torch.testing.assert_close(method.online.encoder.forward_masked(poisoned, masks, "anchored")[0], features)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    first = build_method(tiny_config(name="seqmoco", seed=1)).state_dict()
    torch.manual_seed(6)
    second = build_method(tiny_config(name="seqmoco", seed=1)).state_dict()
    third = build_method(tiny_config(name="seqmoco", seed=2)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


class TwoRanks(Local):
    """Collectives of rank 0 beside a rank with the same hidden count plus 10."""

    world_size = 2

    def mean(self, tensor):
        return tensor + 5


def test_the_divisor_of_loss_mim_counts_all_processes():
    config = tiny_config(name="rcmstr")
    batch = random_batch(config)
    alone = build_method(config).train()
    beside = build_method(config, TwoRanks()).train()
    hidden = float(alone.mim.masks(batch).pixels.sum())
    ratio = beside(batch).terms["loss_mim"] / alone(batch).terms["loss_mim"]
    torch.testing.assert_close(ratio, torch.tensor(hidden / (hidden + 5)))


def test_monitors_show_collapse():
    even = torch.nn.functional.normalize(torch.randn(500, 32), dim=1)
    one = even[:1].expand(500, 32)
    queue = torch.nn.functional.normalize(torch.randn(64, 32), dim=1)
    healthy, collapsed = monitors("word", even, even, queue), monitors("word", one, one, queue)
    assert healthy["spread_word"] > 0.9 and healthy["accuracy_word"] == 1
    assert float(healthy["alignment_word"]) == pytest.approx(1) and collapsed["alignment_word"] > 0.99
    assert float(monitors("word", even, -even, queue)["alignment_word"]) == pytest.approx(-1)
    assert collapsed["spread_word"] < 1e-6


def test_batch_carries_epoch_and_index_into_the_random_choices():
    config = tiny_config(name="rcmstr")
    method = build_method(config)
    batch = random_batch(config)
    other = Batch(batch.views, batch.index, 1)
    assert not torch.equal(method.mim.masks(batch).grid, method.mim.masks(other).grid)
    assert torch.equal(method.mim.masks(batch).grid, method.mim.masks(batch).grid)
