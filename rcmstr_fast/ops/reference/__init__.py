"""The public operations in plain PyTorch: specification, fallback, oracle and baseline of the faster backends."""

from rcmstr_fast.ops.augment_views.reference import augment_views
from rcmstr_fast.ops.reference.batch_norm import GroupedNorm, grouped_batch_norm
from rcmstr_fast.ops.reference.cast_weight import CastWeight
from rcmstr_fast.ops.reference.hierarchical_pool import HierarchicalFeatures, hierarchical_pool
from rcmstr_fast.ops.reference.masked_conv import masked_conv2d, masked_conv_norm, masked_max_pool2d
from rcmstr_fast.ops.reference.masked_mse import masked_mse
from rcmstr_fast.ops.reference.masked_norm import masked_batch_norm
from rcmstr_fast.ops.reference.masks import Masks, draw_masks
from rcmstr_fast.ops.reference.momentum import momentum_update_
from rcmstr_fast.ops.reference.permutation import draw_order, permute_strips, restore_frames
from rcmstr_fast.ops.reference.project_levels import project_levels
from rcmstr_fast.ops.reference.queue import enqueue_
from rcmstr_fast.ops.reference.relation_kl import relation_kl
from rcmstr_fast.ops.reference.relational_loss import RelationalLoss, relational_loss
from rcmstr_fast.ops.reference.relational_losses import LossTerm, relational_losses
from rcmstr_fast.ops.reference.replace_tokens import replace_tokens
from rcmstr_fast.ops.reference.sites import Sites, active_sites

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
    "masked_batch_norm",
    "masked_conv2d",
    "masked_conv_norm",
    "masked_max_pool2d",
    "masked_mse",
    "momentum_update_",
    "permute_strips",
    "project_levels",
    "relation_kl",
    "relational_loss",
    "relational_losses",
    "replace_tokens",
    "restore_frames",
]
