"""Public operations: arguments are checked, a backend is chosen, the plain meaning is in `ops.reference`."""

from rcmstr_fast.ops.augment_views import augment_views, each_operation
from rcmstr_fast.ops.batch_norm import GroupedNorm, grouped_batch_norm
from rcmstr_fast.ops.hierarchical_pool import HierarchicalFeatures, hierarchical_pool
from rcmstr_fast.ops.in_batch import info_nce, nt_xent
from rcmstr_fast.ops.masked_conv import CastWeight, masked_conv2d, masked_max_pool2d
from rcmstr_fast.ops.masked_conv_norm import masked_conv_norm
from rcmstr_fast.ops.masked_mse import masked_mse
from rcmstr_fast.ops.masked_norm import masked_batch_norm
from rcmstr_fast.ops.masks import Masks, draw_masks
from rcmstr_fast.ops.momentum import momentum_update_
from rcmstr_fast.ops.permutation import draw_order, permute_strips, restore_frames
from rcmstr_fast.ops.project_levels import project_levels
from rcmstr_fast.ops.queue import enqueue_
from rcmstr_fast.ops.relation_kl import relation_kl
from rcmstr_fast.ops.relational_loss import RelationalLoss, relational_loss
from rcmstr_fast.ops.relational_losses import LossTerm, relational_losses
from rcmstr_fast.ops.replace_tokens import replace_tokens
from rcmstr_fast.ops.sites import Sites, active_sites
from rcmstr_fast.ops.storage import masked_storage, unpack_sites

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
    "each_operation",
    "enqueue_",
    "grouped_batch_norm",
    "hierarchical_pool",
    "info_nce",
    "masked_batch_norm",
    "masked_conv2d",
    "masked_conv_norm",
    "masked_max_pool2d",
    "masked_mse",
    "masked_storage",
    "momentum_update_",
    "nt_xent",
    "permute_strips",
    "project_levels",
    "relation_kl",
    "relational_loss",
    "relational_losses",
    "replace_tokens",
    "restore_frames",
    "unpack_sites",
]
