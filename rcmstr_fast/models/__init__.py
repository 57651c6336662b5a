"""Networks: encoders, rectifier, projectors, predictors, heads of masked image modelling and decoders."""

from torch import nn

from rcmstr_fast.config import ModelConfig, resolve_model
from rcmstr_fast.models.encoder import Encoder, Features
from rcmstr_fast.models.mim_head import FrameMIMHead, TokenMIMHead
from rcmstr_fast.models.predictor import LinearPredictor
from rcmstr_fast.models.projector import BiLSTMProjector, MLPHead
from rcmstr_fast.models.resnet import ResNet29
from rcmstr_fast.models.tps import SLOPING, TPSRectifier, fiducials, load_rectifier
from rcmstr_fast.models.vit import SIZES, VisionTransformer

__all__ = [
    "Encoder",
    "Features",
    "ResNet29",
    "TPSRectifier",
    "VisionTransformer",
    "build_encoder",
    "build_mim_head",
    "build_predictor",
    "build_projector",
    "build_rectifier",
]


def build_encoder(model: ModelConfig) -> Encoder:
    """The encoder that `model.encoder` names, with random weights.

    Raises:
        ValueError: a class token or no final norm is asked of the CNN.
    """
    model = resolve_model(model)
    units = model.sequence_units if model.sequence == "bilstm" else 0
    if model.encoder == "resnet29":
        if model.class_token or not model.final_norm:
            raise ValueError("model.class_token and model.final_norm belong to the ViT, model.encoder is resnet29")
        return ResNet29(model.width, sequence_units=units)
    dim, heads = SIZES[model.encoder]
    return VisionTransformer(
        dim,
        heads,
        depth=model.depth,
        height=model.height,
        width=model.image_width,
        class_token=bool(model.class_token),
        final_norm=bool(model.final_norm),
        sequence_units=units,
    )


def build_rectifier(model: ModelConfig) -> nn.Module:
    """The rectifier in front of the encoder: `nn.Identity` for `tps=none`.

    `trainable` starts as the identity; `frozen` is read from `tps_checkpoint`, or, for `random`, stays an untrained
    one with the sloping layout of the released RCLSTR code.

    Raises:
        ValueError: the checkpoint is missing or not a rectifier's.
    """
    model = resolve_model(model)
    if model.tps == "none":
        return nn.Identity()
    layout = fiducials(*SLOPING) if model.tps == "frozen" else None
    rectifier = TPSRectifier(
        model.height,
        model.image_width,
        layout=layout,
        frozen=model.tps == "frozen",
        align_corners=bool(model.tps_align_corners),
    )
    if model.tps == "trainable":
        return rectifier
    if model.tps_checkpoint != "random":
        load_rectifier(rectifier, model.tps_checkpoint)
    return rectifier


def build_projector(model: ModelConfig, in_channels: int) -> BiLSTMProjector | MLPHead:
    """The projector of frames with `in_channels` channels; its `out_dim` is what predictors take."""
    model = resolve_model(model)
    if model.encoder == "resnet29":
        return BiLSTMProjector(in_channels, model.projector_hidden)
    return MLPHead(in_channels, model.projector_hidden, model.feature_dim)


def build_predictor(model: ModelConfig) -> LinearPredictor | MLPHead:
    """One level's predictor: rows of the projector to rows of `feature_dim` channels."""
    model = resolve_model(model)
    if model.encoder == "resnet29":
        return LinearPredictor(model.projector_hidden, model.feature_dim)
    return MLPHead(model.feature_dim, model.projector_hidden, model.feature_dim)


def build_mim_head(model: ModelConfig, encoder: Encoder) -> FrameMIMHead | TokenMIMHead:
    """The head that turns `encoder.forward_masked(...)` into pixels: call it as `head(features, active)`."""
    model = resolve_model(model)
    size = model.height, model.image_width
    head = FrameMIMHead if model.encoder == "resnet29" else TokenMIMHead
    return head(encoder.token_channels, size)
