"""The pieces of `make gpu`, in the order in which they are worth running.

The first half hour of a rented machine: does everything run at all, the masked convolution beside cuDNN with a sweep of
its tiles, steady steps, the step of the CNN dense and sparse, its parts, and then a sanitizer.
"""

from functools import partial

from bench.gpu import machine, speed, tiles, training
from bench.gpu.setting import Piece

_TESTING = ("pytest", "hypothesis", "scipy")
_RENDERING = ("lmdb", "PIL", "fontTools", "tqdm", "yaml", "tensorboard", "safetensors")
#: name -> what the names of bench.ops contain; compiled peers take minutes, so each is a piece
_OPERATIONS = {
    "frame": ("relational_loss frame B=512",),
    "terms": ("five_terms step B=512",),
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
    **{f"d{width}": (f"relational_loss frame D={width}",) for width in (64, 256, 512)},
    "256": ("five_terms step B=256", "relational_loss frame B=256"),
    "1024": ("five_terms step B=1024", "relational_loss frame B=1024"),
}
_SMALL, _LARGE = (128, 256, 512), (1024, 2048)


def _steps(name: str, about: str, encoder: str, batches: tuple[int, ...], *providers: str, **more: object) -> Piece:
    run = partial(speed.steps, encoder=encoder, providers=list(providers), batches=batches, **more)  # type: ignore[arg-type]
    return Piece(name, "steps", f"whole steps of {about}", run)


def _first_half_hour() -> list[Piece]:
    return [
        Piece("build", "machine", "compile the extension in place", machine.build, ("pybind11",), ("cmake", "nvcc"),
              holds=machine.is_built),
        Piece("once", "machine", "every operation and kernel once", machine.once),
        Piece("conv-tiles", "tiles", "masked convolution at two shapes: lists, cuDNN, a sweep of tiles",
              tiles.convolutions),
        Piece("steady", "machine", "no host synchronisation in a step; graph and eager agree; dense and sparse",
              machine.steady),
        _steps("step-cnn", "the CNN, ours dense and sparse, and eager, B = 512", "resnet29", (512,), "eager",
               masked=speed.MASKED),
        Piece("parts", "parts", "every part of the step against its floor, the longest kernels", speed.parts),
        Piece("memcheck", "machine", "compute-sanitizer memcheck over every operation",
              partial(machine.sanitize, tool="memcheck"), (), ("compute-sanitizer",)),
    ]  # fmt: skip


def _pieces() -> list[Piece]:
    vit, cnn = "vit_small", "resnet29"
    return [
        *_first_half_hour(),
        Piece("ceilings", "parts", "copy, large product, every dense layer of the encoders", machine.ceilings),
        _steps("compile-cnn", "the CNN's baseline under torch.compile, B = 512", cnn, (512,), "compile"),
        _steps("step-vit", "the ViT, ours and eager, B = 128 to 512", vit, _SMALL, "eager"),
        Piece("operations-masked", "operations", "the masked pass stage by stage, sparse against dense x mask",
              partial(speed.operations, only=("masked_pass",))),
        *(
            Piece(f"operations-{name}", "operations", f"operations against their peers: {', '.join(only)}",
                  partial(speed.operations, only=only))
            for name, only in _OPERATIONS.items()
        ),
        _steps("small-cnn", "the CNN, ours dense and sparse, and eager, B = 128 and 256", cnn, _SMALL[:2], "eager",
               masked=speed.MASKED),
        _steps("compile-vit", "the ViT's baseline under torch.compile, B = 512", vit, (512,), "compile"),
        _steps("compile-max-cnn", "the CNN's baseline under max-autotune, B = 512", cnn, (512,), "compile_max"),
        _steps("compile-max-vit", "the ViT's baseline under max-autotune, B = 512", vit, (512,), "compile_max"),
        Piece("loss-tiles", "tiles", "tiles of the loss kernels", tiles.losses),
        Piece("tests-ops", "machine", "the suite's tests of operations and kernels on the GPU",
              partial(machine.tests, folders=("tests/ops", "tests/kernels")), _TESTING),
        Piece("tests-train", "machine", "the suite's tests of networks, methods and trainer on the GPU",
              partial(machine.tests, folders=("tests/models", "tests/methods", "tests/train", "tests/golden")),
              _TESTING),
        Piece("racecheck", "machine", "compute-sanitizer racecheck over every operation",
              partial(machine.sanitize, tool="racecheck"), (), ("compute-sanitizer",)),
        Piece("switches", "steps", "ours with graph and compile on and off", speed.switches),
        Piece("data", "data", "the data path, its stages and their peers", speed.data_path, (*_RENDERING, "scipy")),
        _steps("large-cnn", "the CNN, B = 1024 and 2048", cnn, _LARGE, "eager"),
        _steps("large-vit", "the ViT, B = 1024 and 2048", vit, _LARGE, "eager"),
        _steps("methods", "RCLSTR with the CNN, B = 512", cnn, (512,), "eager", method="rclstr"),
        Piece("memory", "steps", "peak memory over batch, largest batch of each card", speed.memory),
        Piece("real", "data", "five minutes of training, stopped and resumed", training.real_run, _RENDERING),
        *(
            Piece(f"learning-{row}", "learning", f"what {row} learns: pretraining and two decoders",
                  partial(training.learning, row=row), (*_RENDERING, "rapidfuzz"), seeded=True)
            for row in training.TABLE
        ),
    ]  # fmt: skip


PIECES = {piece.name: piece for piece in _pieces()}
