"""Independent re-creations of other projects' networks: their names, their order of operations, written from memory."""

import sys
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class _Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, count, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, dim))


class _Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim, heads, norm):
        super().__init__()
        self.norm1, self.attn = norm(dim), _Attention(dim, heads)
        self.norm2, self.mlp = norm(dim), _Mlp(dim, 4 * dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def _eps6(dim):
    return nn.LayerNorm(dim, eps=1e-6)


class VisionTransformer(nn.Module):
    """timm's, as far as the keyword arguments below go."""

    def __init__(
        self,
        img_size,
        patch_size,
        embed_dim,
        depth,
        num_heads,
        class_token=True,
        no_embed_class=False,
        global_pool="token",
        num_classes=1000,
        norm_layer=_eps6,
    ):
        super().__init__()
        assert global_pool == "" and num_classes == 0
        patch = patch_size if isinstance(patch_size, int) else patch_size[0]
        count = (img_size[0] // patch) * (img_size[1] // patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.no_embed_class = no_embed_class
        places = count + int(class_token and not no_embed_class)
        self.pos_embed = nn.Parameter(torch.randn(1, places, embed_dim) * 0.02)
        self.patch_embed = _PatchEmbed(patch, embed_dim)
        self.blocks = nn.Sequential(*(_Block(embed_dim, num_heads, norm_layer) for _ in range(depth)))
        self.norm = norm_layer(embed_dim)

    def forward_features(self, x):
        x = self.patch_embed(x)
        if self.cls_token is None:
            return self.norm(self.blocks(x + self.pos_embed))
        token = self.cls_token.expand(len(x), -1, -1)
        if self.no_embed_class:
            return self.norm(self.blocks(torch.cat([token, x + self.pos_embed], dim=1)))
        return self.norm(self.blocks(torch.cat([token, x], dim=1) + self.pos_embed))


class Encoder(VisionTransformer):
    """PARSeq's."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio):
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, False, global_pool="", num_classes=0)

    def forward(self, x):
        return self.forward_features(x)


class ViT(VisionTransformer):
    """OpenOCR's, whose attention multiplies its own matrices."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, norm_layer=nn.LayerNorm):
        super().__init__(
            img_size,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            False,
            global_pool="",
            num_classes=0,
            norm_layer=norm_layer,
        )

    def forward(self, x):
        return self.forward_features(x)


class _BasicBlock(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.downsample = None
        if n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + residual)


class _ResNet(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        c16, c8, c4, c2 = out // 16, out // 8, out // 4, out // 2

        def conv(name, n_in, n_out, *args):
            setattr(self, f"conv{name}", nn.Conv2d(n_in, n_out, *args, bias=False))
            setattr(self, f"bn{name}", nn.BatchNorm2d(n_out))

        def layer(n_in, n_out, blocks):
            return nn.Sequential(*(_BasicBlock(n_out if i else n_in, n_out) for i in range(blocks)))

        conv("0_1", channels, c16, 3, 1, 1)
        conv("0_2", c16, c8, 3, 1, 1)
        self.layer1 = layer(c8, c4, 1)
        conv("1", c4, c4, 3, 1, 1)
        self.layer2 = layer(c4, c2, 2)
        conv("2", c2, c2, 3, 1, 1)
        self.layer3 = layer(c2, out, 5)
        conv("3", out, out, 3, 1, 1)
        self.layer4 = layer(out, out, 3)
        conv("4_1", out, out, 2, (2, 1), (0, 1))
        conv("4_2", out, out, 2, 1, 0)

    def _unit(self, name, x):
        return F.relu(getattr(self, f"bn{name}")(getattr(self, f"conv{name}")(x)))

    def forward(self, x):
        x = self._unit("0_2", self._unit("0_1", x))
        x = self._unit("1", self.layer1(F.max_pool2d(x, 2, 2)))
        x = self._unit("2", self.layer2(F.max_pool2d(x, 2, 2)))
        x = self._unit("3", self.layer3(F.max_pool2d(x, 2, (2, 1), (0, 1))))
        return self._unit("4_2", self._unit("4_1", self.layer4(x)))


class ResNet_FeatureExtractor(nn.Module):
    """DTRB's."""

    def __init__(self, input_channel, output_channel=512):
        super().__init__()
        self.ConvNet = _ResNet(input_channel, output_channel)

    def forward(self, x):
        return self.ConvNet(x)


class _Localization(nn.Module):
    def __init__(self, count, channels):
        super().__init__()
        layers = []
        for n_in, n_out in ((channels, 64), (64, 128), (128, 256), (256, 512)):
            layers += [nn.Conv2d(n_in, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(True)]
            layers.append(nn.MaxPool2d(2, 2) if n_out < 512 else nn.AdaptiveAvgPool2d(1))
        self.conv = nn.Sequential(*layers)
        self.localization_fc1 = nn.Sequential(nn.Linear(512, 256), nn.ReLU(True))
        self.localization_fc2 = nn.Linear(256, 2 * count)
        self.count = count

    def forward(self, x):
        return self.localization_fc2(self.localization_fc1(self.conv(x).flatten(1))).view(-1, self.count, 2)


class _GridGenerator(nn.Module):
    def __init__(self, count, size):
        super().__init__()
        self.register_buffer("inv_delta_C", torch.zeros(count + 3, count + 3))
        self.register_buffer("P_hat", torch.zeros(size[0] * size[1], count + 3))

    def forward(self, points):
        padded = torch.cat([points, points.new_zeros(len(points), 3, 2)], dim=1)
        return self.P_hat @ (self.inv_delta_C @ padded)


class TPS_SpatialTransformerNetwork(nn.Module):
    """DTRB's."""

    def __init__(self, F, I_size, I_r_size, I_channel_num=1):
        super().__init__()
        self.size = I_r_size
        self.LocalizationNetwork = _Localization(F, I_channel_num)
        self.GridGenerator = _GridGenerator(F, I_r_size)

    def forward(self, x):
        grid = self.GridGenerator(self.LocalizationNetwork(x)).view(len(x), *self.size, 2)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


class BidirectionalLSTM(nn.Module):
    """DTRB's."""

    def __init__(self, input_size, hidden_size, output_size):
        super().__init__()
        self.rnn = nn.LSTM(input_size, hidden_size, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden_size, output_size)

    def forward(self, x):
        return self.linear(self.rnn(x)[0])


class DiGEncoder(nn.Module):
    """DiG's encoder: query and value biases apart, fixed positions that are not in the file, no final norm."""

    def __init__(self, dim, heads, depth, width):
        super().__init__()
        made = VisionTransformer((32, width), 4, dim, depth, heads, False, global_pool="", num_classes=0)
        self.patch_embed, self.blocks = made.patch_embed, made.blocks
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim))
        for block in self.blocks:
            block.attn.q_bias = nn.Parameter(torch.randn(dim) * 0.02)
            block.attn.v_bias = nn.Parameter(torch.randn(dim) * 0.02)
            block.attn.qkv.register_parameter("bias", None)

    def forward(self, x):
        x = self.patch_embed(x)
        place = torch.arange(x.shape[1])[:, None].double()
        rate = 10000 ** (-2 * (torch.arange(x.shape[2]) // 2) / x.shape[2]).double()
        table = place * rate
        table[:, 0::2], table[:, 1::2] = table[:, 0::2].sin(), table[:, 1::2].cos()
        x = x + table.float()
        for block in self.blocks:
            attn = block.attn
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
            batch, count, dim = x.shape
            qkv = F.linear(block.norm1(x), attn.qkv.weight, bias).reshape(batch, count, 3, attn.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            weights = (q * (dim // attn.num_heads) ** -0.5 @ k.transpose(2, 3)).softmax(3)
            x = x + attn.proj((weights @ v).transpose(1, 2).reshape(batch, count, dim))
            x = x + block.mlp(block.norm2(x))
        return x


_MODULES = {
    "timm.models.vision_transformer": {"VisionTransformer": VisionTransformer},
    "strhub.models.parseq.modules": {"Encoder": Encoder},
    "openrec.modeling.encoders.vit": {"ViT": ViT},
    "modules.feature_extraction": {"ResNet_FeatureExtractor": ResNet_FeatureExtractor},
    "modules.transformation": {"TPS_SpatialTransformerNetwork": TPS_SpatialTransformerNetwork},
    "modules.sequence_modeling": {"BidirectionalLSTM": BidirectionalLSTM},
}


def timm_itself():
    """The vision transformers of the real library, or the test is skipped.

    timm imports torchvision for its pictures. Where that was built for another torch than the one at hand (for CUDA, say,
    beside a torch for CPUs), its compiled operators do not load, and it then asks for two of them while it is imported.
    They are declared, without a body: no transformer uses them.
    """
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with suppress(RuntimeError):
        import torchvision  # noqa: F401
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return import_module("timm.models.vision_transformer")


@contextmanager
def installed():
    """While entered, the re-creations can be imported under the names of the projects."""
    made = {}
    for path, content in _MODULES.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            made.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        for name, found in content.items():
            setattr(made[path], name, found)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def shaken(module: nn.Module, seed: int) -> nn.Module:
    """Running statistics and affine parameters that are not those of a new network; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in module.state_dict().items():
            if name.endswith("running_var"):
                x.copy_(torch.rand(x.shape, generator=generator) + 0.5)
            elif name.endswith(("running_mean", "bias")) and x.dim() == 1:
                x.add_(torch.randn(x.shape, generator=generator) * 0.05)
    return module.eval()
