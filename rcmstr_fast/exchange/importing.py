"""Other projects' trained encoders as `encoder.safetensors`: what was mapped, left out and missing is listed."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safetensors.torch import save
from torch import Tensor

from rcmstr_fast import models
from rcmstr_fast.config import ConfigError, ModelConfig, PretrainConfig, resolve
from rcmstr_fast.exchange import layouts
from rcmstr_fast.exchange.archive import read_tensors
from rcmstr_fast.exchange.candidates import PREFIXES, Candidate, best_of, nearest
from rcmstr_fast.exchange.networks import Networks
from rcmstr_fast.train.checkpoint import write_whole
from rcmstr_fast.train.export import export_encoder, refuse_nonfinite

PROJECTS = tuple(PREFIXES)
#: Below this share of fitting tensors a file is taken for another network.
_ENOUGH = 0.5
_NEAREST = 5
_SHOWN = 12


@dataclass(frozen=True)
class Imported:
    """What became of a foreign file.

    Attributes:
        model: the architecture that was written.
        mapped: foreign name -> our name.
        left_out: foreign names that have no place in an encoder.
        missing: our tensors that the file lacks; they have their initial values.
        notes: what was converted on the way.
    """

    model: ModelConfig
    mapped: dict[str, str]
    left_out: list[str]
    missing: list[str]
    notes: list[str]

    def describe(self) -> str:
        """Several lines: the architecture, and every list with its number and first names."""
        model = self.model
        size = f"width {model.width:g}" if model.encoder == "resnet29" else f"depth {model.depth}"
        rectifier = f", rectifier (align_corners={model.tps_align_corners})" if model.tps != "none" else ""
        lines = [f"{model.encoder}, {size}, input {model.height} x {model.image_width}{rectifier}"]
        lines += [_listed("mapped", [f"{theirs} -> {ours}" for theirs, ours in self.mapped.items()])]
        lines += [_listed("left out", self.left_out), _listed("missing, at their initial values", self.missing)]
        return "\n".join(lines + self.notes)


def import_encoder(
    path: str | Path,
    project: str,
    out: str | Path,
    *,
    part: Literal["encoder", "rectifier"] = "encoder",
    tps: Literal["frozen", "trainable"] = "frozen",
    image_width: int = 0,
    sequence: bool = False,
) -> Imported:
    """Write another project's encoder, with its rectifier where it has one, as ours.

    Args:
        path: safetensors or a torch checkpoint; read without running code from it.
        project: dtrb, rclstr, dig, timm or moco: whose names the file has.
        out: the file to write.
        part: `rectifier` writes the rectifier alone, for `model.tps_checkpoint`.
        tps: whether later training leaves the rectifier as it is.
        image_width: pixels; 0: as the file says, else 100 (CNN) or 128 (ViT).
        sequence: DTRB's LSTM layers become part of the encoder (SeqCLR's R = H).
    Returns:
        The lists.
    Raises:
        ConfigError: unreadable, values that are not finite, or the tensors of some other network.
    """
    path, out = Path(path), Path(out)
    if project not in PROJECTS:
        raise ConfigError(f"from must be one of {', '.join(PROJECTS)}, got {project!r}")
    if out.suffix != ".safetensors":
        raise ConfigError(f"out must end in .safetensors, got {out.name}")
    state = read_tensors(path)
    ranked, read = best_of(state, project, image_width, sequence)
    best = _only_rectifier(ranked[0]) if part == "rectifier" else ranked[0]
    if best.share < _ENOUGH:
        near = "; ".join(candidate.describe() for candidate in nearest(state, _NEAREST))
        raise ConfigError(
            f"{path}: its {len(state)} tensors, such as {next(iter(state))}, are those of no architecture of this "
            f"program under --from {project}; nearest: {near}"
        )
    _check_whole(path, best, read)
    tensors = {name: read[best.names[name]].float() for name in best.fitting if not name.endswith("_tracked")}
    refuse_nonfinite(tensors, str(path))
    model = replace(best.model, tps=tps) if best.model.tps != "none" else best.model
    if part == "rectifier":
        alone = {name.removeprefix("rectifier."): x.contiguous() for name, x in tensors.items()}
        whole = {name.removeprefix("rectifier."): x for name, x in _state(model, tensors)[1].items()}
        write_whole(out, lambda file: file.write(save(whole | alone, {"format": "pt"})))
    else:
        _write(model, tensors, out, f"{project} {path.name}")
    ours = [name for name in layouts.shapes_of(best.model) if part == "encoder" or name.startswith("rectifier.")]
    return _report(best, model, state, read, [name for name in ours if name not in best.fitting])


def _only_rectifier(best: Candidate) -> Candidate:
    """The candidate's rectifier without its encoder."""
    names = {name: theirs for name, theirs in best.names.items() if name.startswith("rectifier.")}
    if not names:
        raise ConfigError("part=rectifier needs a file with a TPS rectifier (Transformation.*), it has none")
    return replace(best, names=names, fitting=best.fitting & names.keys())


def _check_whole(path: Path, best: Candidate, state: dict[str, Tensor]) -> None:
    """Raise ConfigError where a tensor is missing that does not start at a known value."""
    missing = sorted(name for name in best.names if name not in best.fitting)
    needed = [name for name in missing if not name.endswith(layouts.OPTIONAL)]
    wrong = [best.names[name] for name in missing if best.names[name] in state]
    if wrong:
        got = list(state[wrong[0]].shape)
        raise ConfigError(f"{path}: {best.describe()}, but {wrong[0]} has another shape, {got}")
    if needed:
        more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
        raise ConfigError(f"{path}: {best.describe()}, but {best.names[needed[0]]}{more} is missing")


def _state(model: ModelConfig, tensors: dict[str, Tensor]) -> tuple[Networks, dict[str, Tensor]]:
    """Our networks with these weights, and the whole state of the rectifier."""
    encoder, rectifier = models.build_encoder(model), models.build_rectifier(model)
    for prefix, module in (("encoder.", encoder), ("rectifier.", rectifier)):
        held = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(module.state_dict() | held)
    whole = {f"rectifier.{name}": x for name, x in rectifier.state_dict().items()}
    return Networks(encoder, rectifier), whole


def _write(model: ModelConfig, tensors: dict[str, Tensor], out: Path, origin: str) -> None:
    made, _ = _state(model, tensors)
    # The weights of the rectifier are in the file, so where they came from is all that is left to say of them.
    config = resolve(PretrainConfig(run="", model=model))
    export_encoder(made, out, config, 0, facts={"origin": origin})


def _report(
    best: Candidate, model: ModelConfig, state: dict[str, Tensor], read: dict[str, Tensor], missing: list[str]
) -> Imported:
    mapped = {best.names[name]: name for name in sorted(best.fitting)}
    joined = {name for name in mapped if name not in state}  # made of several
    halves = {name.replace("qkv.bias", half) for name in joined for half in ("q_bias", "v_bias")}
    left_out = [name for name in state if name not in mapped and name not in halves]
    notes = []
    if joined:
        notes.append(f"query and value biases joined in {len(joined)} layers")
    grey = [
        name for name in mapped if name in state and state[name].shape != read[name].shape and state[name].dim() == 4
    ]
    if grey:
        notes.append("trained on grey pictures: the first convolutions weigh RGB to grey")
    if best.model.class_token and f"{best.prefix}pos_embed" in mapped:
        notes.append("the class token's position was added to the token")
    return Imported(model, mapped, left_out, missing, notes)


def _listed(title: str, names: Iterable[str]) -> str:
    """A title with the number of names and the first of them, each on a line."""
    names = list(names)
    lines = [f"{title}: {len(names)}", *(f"  {name}" for name in names[:_SHOWN])]
    return "\n".join(lines + ([f"  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []))
