"""Public operations, a folder each: `__init__` has the contract, the checks and the choice of a backend.

`reference.py` in the folder is the plain meaning (all of them: `ops.reference`); its other files are the backends.
"""

from rcmstr_fast.ops import reference as reference
from rcmstr_fast.ops.augment_views import augment_views, each_operation
from rcmstr_fast.ops.batch_norm import GroupedNorm, grouped_batch_norm
from rcmstr_fast.ops.draw_masks import Masks, draw_masks
from rcmstr_fast.ops.enqueue import enqueue_
from rcmstr_fast.ops.hierarchical_pool import HierarchicalFeatures, hierarchical_pool
from rcmstr_fast.ops.in_batch import info_nce, nt_xent
from rcmstr_fast.ops.masked import (
    CastWeight,
    Sites,
    active_sites,
    masked_batch_norm,
    masked_conv2d,
    masked_conv_norm,
    masked_max_pool2d,
    masked_storage,
    unpack_sites,
)
from rcmstr_fast.ops.masked_mse import masked_mse
from rcmstr_fast.ops.momentum_update import momentum_update_
from rcmstr_fast.ops.permutation import draw_order, permute_strips, restore_frames
from rcmstr_fast.ops.project_levels import project_levels
from rcmstr_fast.ops.queue_losses import (
    LossTerm,
    RelationalLoss,
    relation_kl,
    relational_loss,
    relational_losses,
)
from rcmstr_fast.ops.replace_tokens import replace_tokens

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
