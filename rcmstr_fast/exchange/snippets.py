"""The programs of the model cards: each loads the file beside it and reads `word.png`."""

from pathlib import Path

from rcmstr_fast.exchange.graph import FACTS
from rcmstr_fast.exchange.networks import Source
from rcmstr_fast.models.transformer import PATCH
from rcmstr_fast.models.vit import SIZES


def _picture(source: Source) -> str:
    """Lines that make the normalised batch `images` of a picture."""
    height, width = source.size
    return (
        "import numpy as np\nimport torch\nfrom PIL import Image\n\n"
        f'picture = Image.open("word.png").convert("RGB").resize(({width}, {height}), Image.Resampling.BICUBIC)\n'
        "images = (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5\n"
    )


def _weights(out: Path, holder: str = "") -> str:
    """Lines that read the state dict `weights`."""
    if out.suffix == ".safetensors":
        return f'from safetensors.torch import load_file\n\nweights = load_file("{out.name}")\n'
    entry = f'["{holder}"]' if holder else ""
    return f'weights = torch.load("{out.name}", weights_only=True){entry}\n'


def _grid(source: Source) -> str:
    height, width = source.size
    return f"({height // PATCH}, {width // PATCH})"


def timm(source: Source, out: Path) -> str:
    """timm's VisionTransformer."""
    model = source.model
    dim, heads = SIZES[model.encoder]
    token = "class_token=True, no_embed_class=True" if model.class_token else "class_token=False"
    norm = "" if model.final_norm else "encoder.norm = torch.nn.Identity()\n"
    cut = "[:, 1:]" if model.class_token else ""
    return (
        f"{_picture(source)}from timm.models.vision_transformer import VisionTransformer\n"
        f"{_weights(out)}encoder = VisionTransformer(\n"
        f"    img_size={source.size}, patch_size={PATCH}, embed_dim={dim}, depth={model.depth}, num_heads={heads},\n"
        f'    {token}, global_pool="", num_classes=0,\n).eval()\n{norm}'
        "encoder.load_state_dict(weights)\n"
        f"with torch.no_grad():\n    tokens = encoder.forward_features(images){cut}\n"
        f"frames = tokens.unflatten(1, {_grid(source)}).mean(1)\n"
    )


def parseq(source: Source, out: Path) -> str:
    """PARSeq's encoder, inside its checkout or with its package."""
    model = source.model
    dim, heads = SIZES[model.encoder]
    return (
        f"{_picture(source)}from strhub.models.parseq.modules import Encoder\n"
        f"{_weights(out)}encoder = Encoder({source.size}, ({PATCH}, {PATCH}), embed_dim={dim}, depth={model.depth}, "
        f"num_heads={heads}, mlp_ratio=4).eval()\n"
        'encoder.load_state_dict({name.removeprefix("encoder."): x for name, x in weights.items()})\n'
        "with torch.no_grad():\n    tokens = encoder(images)\n"
        f"frames = tokens.unflatten(1, {_grid(source)}).mean(1)\n"
    )


def openocr(source: Source, out: Path) -> str:
    """OpenOCR's ViT, whose LayerNorms have another epsilon by default."""
    model = source.model
    dim, heads = SIZES[model.encoder]
    return (
        f"{_picture(source)}from functools import partial\n\nfrom openrec.modeling.encoders.vit import ViT\n"
        f"{_weights(out, 'state_dict')}encoder = ViT(\n"
        f"    img_size={list(source.size)}, patch_size=[{PATCH}, {PATCH}], embed_dim={dim}, depth={model.depth},\n"
        f"    num_heads={heads}, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),\n).eval()\n"
        'encoder.load_state_dict({name.removeprefix("encoder."): x for name, x in weights.items()})\n'
        "with torch.no_grad():\n    tokens = encoder(images)\n"
        f"frames = tokens.unflatten(1, {_grid(source)}).mean(1)\n"
    )


def dtrb(source: Source, out: Path) -> str:
    """DTRB's modules, inside its checkout."""
    model = source.model
    height, width = source.size
    lines = [_picture(source), _weights(out)]
    lines.append(
        'def part(name):\n    prefix = f"module.{name}."\n'
        "    return {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}\n\n\n"
        "from modules.feature_extraction import ResNet_FeatureExtractor\n\n"
        f"features = ResNet_FeatureExtractor(3, {round(512 * model.width)}).eval()\n"
        'features.load_state_dict(part("FeatureExtraction"))\n'
    )
    if model.tps != "none":
        lines.append(
            "from modules.transformation import TPS_SpatialTransformerNetwork\n\n"
            f"rectifier = TPS_SpatialTransformerNetwork(20, ({height}, {width}), ({height}, {width}), 3).eval()\n"
            'rectifier.load_state_dict(part("Transformation"))\n'
        )
    rectified = "rectifier(images)" if model.tps != "none" else "images"
    lines.append(f"with torch.no_grad():\n    frames = features({rectified}).squeeze(2).transpose(1, 2)\n")
    if source.recogniser is not None:
        lines.append(_dtrb_head(source))
    return "".join(lines)


def _dtrb_head(source: Source) -> str:
    assert source.recogniser is not None
    hidden, classes = source.recogniser.hidden, 1 + len(source.recogniser.charset)
    channels = round(512 * source.model.width)
    text = "".join(source.recogniser.charset.characters)
    return (
        "from modules.sequence_modeling import BidirectionalLSTM\n\n"
        "context = torch.nn.Sequential(\n"
        f"    BidirectionalLSTM({channels}, {hidden}, {hidden}), BidirectionalLSTM({hidden}, {hidden}, {hidden})\n"
        f').eval()\ncontext.load_state_dict(part("SequenceModeling"))\n'
        f"prediction = torch.nn.Linear({hidden}, {classes})\n"
        'prediction.load_state_dict(part("Prediction"))\n'
        f"characters = {text!r}\n"
        "with torch.no_grad():\n    logits = prediction(context(frames))\n"
        "best = logits[0].argmax(1).tolist()\n"
        'text = "".join(characters[i - 1] for i, before in zip(best, [0, *best]) if i and i != before)\n'
    )


def onnx(source: Source, out: Path) -> str:
    """onnxruntime, without torch."""
    height, width = source.size
    head = (
        "import json\n\nimport numpy as np\nimport onnxruntime\nfrom PIL import Image\n\n"
        f'session = onnxruntime.InferenceSession("{out.name}")\n'
        f'picture = Image.open("word.png").convert("RGB").resize(({width}, {height}), Image.Resampling.BICUBIC)\n'
        "images = (np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 255 - 0.5) / 0.5\n"
    )
    if source.recogniser is None:
        return head + '(frames,) = session.run(None, {"images": images})\n'
    return (
        f'{head}facts = json.loads(session.get_modelmeta().custom_metadata_map["{FACTS}"])\n'
        'logits, ids, confidence = session.run(None, {"images": images})\n'
        'characters, first = facts["characters"], facts["first_id"]\n'
        'text = "".join(characters[i - first] for i in ids[0] if i >= first)\n'
    )


def torchscript(source: Source, out: Path) -> str:
    """torch alone."""
    head = f'{_picture(source)}\nextra = {{"{FACTS}": ""}}\nmodel = torch.jit.load("{out.name}", _extra_files=extra)\n'
    if source.recogniser is None:
        return f"{head}with torch.no_grad():\n    frames = model(images)\n"
    return (
        f'import json\n\n{head}facts = json.loads(extra["{FACTS}"])\n'
        "with torch.no_grad():\n    logits, ids, confidence = model(images)\n"
        'characters, first = facts["characters"], facts["first_id"]\n'
        'text = "".join(characters[i - first] for i in ids[0].tolist() if i >= first)\n'
    )


def safetensors(source: Source, out: Path) -> str:
    """This program itself."""
    if source.recogniser is not None:
        return (
            "import rcmstr_fast\n\n"
            f'model = rcmstr_fast.load("{out.name}")\n(reading,) = model.read(["word.png"])\ntext = reading.text\n'
        )
    return f'import rcmstr_fast\n\nencoder = rcmstr_fast.load_encoder("{out.name}")\nframes = encoder(["word.png"])\n'
