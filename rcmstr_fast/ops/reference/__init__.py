"""The public operations in plain PyTorch: specification, fallback, oracle and baseline of the faster backends.

Each reference stands in the folder of its operation; this module only gathers the names.
"""

from rcmstr_fast.ops.augment_views.reference import augment_views
from rcmstr_fast.ops.batch_norm.reference import GroupedNorm, grouped_batch_norm
from rcmstr_fast.ops.draw_masks.reference import Masks, draw_masks
from rcmstr_fast.ops.enqueue.reference import enqueue_
from rcmstr_fast.ops.hierarchical_pool.reference import HierarchicalFeatures, hierarchical_pool
from rcmstr_fast.ops.in_batch.reference import info_nce, nt_xent
from rcmstr_fast.ops.masked.reference import (
    CastWeight,
    Sites,
    active_sites,
    masked_batch_norm,
    masked_conv2d,
    masked_conv_norm,
    masked_max_pool2d,
)
from rcmstr_fast.ops.masked_mse.reference import masked_mse
from rcmstr_fast.ops.momentum_update.reference import momentum_update_
from rcmstr_fast.ops.permutation.reference import draw_order, permute_strips, restore_frames
from rcmstr_fast.ops.project_levels.reference import project_levels
from rcmstr_fast.ops.queue_losses.reference import (
    LossTerm,
    RelationalLoss,
    relation_kl,
    relational_loss,
    relational_losses,
)
from rcmstr_fast.ops.replace_tokens.reference import replace_tokens

__all__ = [
    "CastWeight",
    "GroupedNorm",
    "HierarchicalFeatures",
    "LossTerm",
    "Masks",
    "RelationalLoss",
    "Sites",
    "active_sites",
    "augment_views",
    "draw_masks",
    "draw_order",
    "enqueue_",
    "grouped_batch_norm",
    "hierarchical_pool",
    "info_nce",
    "masked_batch_norm",
    "masked_conv2d",
    "masked_conv_norm",
    "masked_max_pool2d",
    "masked_mse",
    "momentum_update_",
    "nt_xent",
    "permute_strips",
    "project_levels",
    "relation_kl",
    "relational_loss",
    "relational_losses",
    "replace_tokens",
    "restore_frames",
]
