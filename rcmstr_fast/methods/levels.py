"""The configuration of the relational contrastive methods: SeqMoCo, RCLSTR and the contrastive part of RCMSTR."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rcmstr_fast.config import LEVELS, Level, MethodConfig, PretrainConfig, Training, is_vit, num_frames, require
from rcmstr_fast.fields import number
from rcmstr_fast.methods.parts.momentum import MomentumSettings
from rcmstr_fast.methods.parts.queue import QueueSettings
from rcmstr_fast.methods.permutation import PermutationSettings

#: What a preset says of the fields that are null.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"inter_weight": 1.0, "inter_after_enqueue": False, "shared_permutation": False,
              "kl_reduction": "sum", "round_frame_queue": False},
    "rclstr_code": {"inter_weight": 0.3, "inter_after_enqueue": True, "shared_permutation": True,
                    "kl_reduction": "mean", "round_frame_queue": True},
    "fast": {"inter_weight": 0.3, "inter_after_enqueue": False, "shared_permutation": False,
             "kl_reduction": "sum", "round_frame_queue": False},
}  # fmt: skip


@dataclass
class RelationalSettings(MethodConfig, QueueSettings, MomentumSettings, PermutationSettings):
    """Fields of the relational contrastive loss and every switch of its ablations.

    Attributes:
        levels: feature levels with a contrastive loss; null: subword (seqmoco), all three otherwise.
        kl: use the KL half of the relational loss (SeqMoCo with or without KL).
        permute: the enriched relations (ERE): a second, permuted query; null: by method.
        inter: inter-level terms; null: none (seqmoco), both otherwise.
        inter_loss: loss of the inter-level terms.
        inter_weight: weight of the inter-level terms; null: by preset.
        inter_pairing: how frames pair with subwords: stride windows or the pooling windows.
        inter_after_enqueue: inter-level terms see this step's keys in the queue; null: by preset.
        alpha: weight of loss_kl in loss_re.
        tau_info: temperature of loss_info.
        tau_kl: temperature of loss_kl.
        kl_reduction: sum over the queue (the paper's equation) or mean (divided by K too); null: by preset.
        round_frame_queue: round the frame queue down to a multiple of T*B; null: by preset.
        enqueue_per_image: frame keys enqueued an image; 0: all.
        bn_shuffle: group the key side at random, so that query and key share no batch-norm statistics; it does so only
            among several groups of `bn_group_size`. null: where there are groups.
    """

    #: Values of the method for fields that are null.
    own: ClassVar[dict[str, Any]] = {}

    levels: list[Level] | None = None
    kl: bool = True
    permute: bool | None = None
    inter: Literal["none", "s2w", "f2s", "both"] | None = None
    inter_loss: Literal["kl", "info", "re"] = "kl"
    inter_weight: float | None = number(None, low=0)
    inter_pairing: Literal["stride", "pool"] = "stride"
    inter_after_enqueue: bool | None = None
    alpha: float = number(0.3, low=0)
    tau_info: float = number(0.07, above=0)
    tau_kl: float = number(0.04, above=0)
    kl_reduction: Literal["sum", "mean"] | None = None
    round_frame_queue: bool | None = None
    enqueue_per_image: int = number(0, low=0)
    bn_shuffle: bool | None = None

    def fill(self, run: PretrainConfig) -> None:
        """What the method says, then what the preset says."""
        for name, value in {**self.own, **PRESETS[run.preset]}.items():
            if getattr(self, name) is None:
                setattr(self, name, list(value) if isinstance(value, list) else value)
        if self.bn_shuffle is None:
            self.bn_shuffle = self.bn_group_size > 0

    def training(self, run: PretrainConfig) -> Training:
        """Preset rclstr_code trains the CNN as the released code does."""
        if run.preset == "rclstr_code" and not is_vit(run.model):
            return Training(32, 5, "sgd", 0.0015, 0, 1e-4, "constant", 0)
        return super().training(run)

    def check(self, run: PretrainConfig) -> None:
        """Levels, and what must divide the frames and the image."""
        frames, width = num_frames(run.model), run.model.image_width
        require(self.levels, "method.levels must name at least one level", self.levels)
        strips = f"method.num_patches must divide the {frames} frames of a {width}-pixel image"
        require(not self.permute or frames % self.num_patches == 0, strips, self.num_patches)
        cut = f"method.num_patches must divide the image width {width}"
        require(not self.permute or width % self.num_patches == 0, cut, self.num_patches)
        require(self.num_subwords <= frames, f"method.num_subwords must be in 1..{frames}", self.num_subwords)


def used_levels(method: RelationalSettings) -> list[str]:
    """Levels with a loss of their own or as a side of an inter-level term, in the order of `LEVELS`."""
    used = set(method.levels or ())
    used |= {"frame", "subword"} if method.inter in ("f2s", "both") else set()
    used |= {"subword", "word"} if method.inter in ("s2w", "both") else set()
    return [level for level in LEVELS if level in used]
