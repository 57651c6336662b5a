"""The pieces of `make gpu`, in the order in which they are worth running."""

from functools import partial

from bench.gpu import benchmarks, machine, training
from bench.gpu.setting import Piece

_TESTING = ("pytest", "hypothesis", "scipy")
_RENDERING = ("lmdb", "PIL", "fontTools", "tqdm", "yaml", "tensorboard", "safetensors")
#: name -> entries of bench.ops; compiled peers take minutes, so each is a piece
_OPERATIONS = {
    "frame": ("relational_loss frame: M=13312 K=65536 D=128",),
    "terms": ("five_terms step: B=512",),
    "kl": ("relation_kl",),
    "cross-entropy": ("queue_cross_entropy",),
    "levels": ("relational_loss subword", "relational_loss word"),
    "small": (
        "hierarchical_pool",
        "masked_mse",
        "replace_tokens",
        "enqueue_",
        "momentum_update_",
        "draw_masks",
        "project",
    ),
    **{f"d{width}": (f"relational_loss frame: M=13312 K=65536 D={width}",) for width in (64, 256, 512)},
    "256": ("five_terms step: B=256", "relational_loss frame: M=6656"),
    "1024": ("five_terms step: B=1024", "relational_loss frame: M=26624"),
}
_SMALL, _LARGE = (128, 256, 512), (512, 1024, 2048)


def _pieces() -> list[Piece]:
    steps = benchmarks.steps
    return [
        Piece("build", "compile the extension in place", machine.build, ("pybind11",), ("cmake", "nvcc"),
              holds=machine.is_built),
        Piece("ceilings", "copy, large product, every dense layer of the encoders", machine.ceilings),
        Piece("steady", "no host synchronisation in a step; graph and eager agree", machine.steady),
        Piece("tests-ops", "the suite's tests of operations and kernels on the GPU",
              partial(machine.tests, folders=("tests/ops", "tests/kernels")), _TESTING),
        Piece("tests-train", "the suite's tests of networks, methods and trainer on the GPU",
              partial(machine.tests, folders=("tests/models", "tests/methods", "tests/train", "tests/golden")), _TESTING),
        Piece("memcheck", "compute-sanitizer memcheck over every operation", partial(machine.sanitize, tool="memcheck"),
              (), ("compute-sanitizer",)),
        Piece("racecheck", "compute-sanitizer racecheck over every operation",
              partial(machine.sanitize, tool="racecheck"), (), ("compute-sanitizer",)),
        Piece("step-cnn", "whole steps of the CNN, ours and eager, B = 128 to 512",
              partial(steps, encoder="resnet29", providers=["eager"], batches=_SMALL)),
        Piece("step-vit", "whole steps of the ViT, ours and eager, B = 128 to 512",
              partial(steps, encoder="vit_small", providers=["eager"], batches=_SMALL)),
        Piece("compile-cnn", "the CNN's baseline under torch.compile, B = 512",
              partial(steps, encoder="resnet29", providers=["compile"], batches=(512,))),
        Piece("compile-vit", "the ViT's baseline under torch.compile, B = 512",
              partial(steps, encoder="vit_small", providers=["compile"], batches=(512,))),
        Piece("compile-max-cnn", "the CNN's baseline under torch.compile with max-autotune, B = 512",
              partial(steps, encoder="resnet29", providers=["compile_max"], batches=(512,))),
        Piece("compile-max-vit", "the ViT's baseline under torch.compile with max-autotune, B = 512",
              partial(steps, encoder="vit_small", providers=["compile_max"], batches=(512,))),
        Piece("parts", "every part of the step against its floor, the longest kernels", benchmarks.parts),
        Piece("switches", "ours with graph and compile on and off", benchmarks.switches),
        *(
            Piece(f"operations-{name}", f"operations against their peers: {', '.join(only)}",
                  partial(benchmarks.operations, only=only))
            for name, only in _OPERATIONS.items()
        ),
        Piece("masked-pass", "sparse against dense x mask, stage by stage", benchmarks.masked_pass),
        Piece("sweep", "tiles of the loss kernels", benchmarks.sweep),
        Piece("data", "the data path, its stages and their peers", benchmarks.data_path, (*_RENDERING, "scipy")),
        Piece("large-cnn", "whole steps of the CNN, B = 512 to 2048",
              partial(steps, encoder="resnet29", providers=["eager"], batches=_LARGE[1:])),
        Piece("large-vit", "whole steps of the ViT, B = 512 to 2048",
              partial(steps, encoder="vit_small", providers=["eager"], batches=_LARGE[1:])),
        Piece("methods", "whole steps of RCLSTR with the CNN, B = 512",
              partial(steps, encoder="resnet29", providers=["eager"], batches=(512,), method="rclstr")),
        Piece("memory", "peak memory over batch, largest batch of each card", benchmarks.memory),
        Piece("real", "five minutes of training, stopped and resumed", training.real_run, _RENDERING),
        *(
            Piece(f"learning-{row}", f"what {row} learns: pretraining and two decoders",
                  partial(training.learning, row=row), (*_RENDERING, "rapidfuzz"), seeded=True)
            for row in training.TABLE
        ),
    ]  # fmt: skip


PIECES = {piece.name: piece for piece in _pieces()}
