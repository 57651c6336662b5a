"""Convolution and max-pooling at the active sites of a mask."""

from torch import Tensor

from rcmstr_fast.ops import checks, listed, listed_pool, packed, reference, site_rows
from rcmstr_fast.ops.dispatch import operation
from rcmstr_fast.ops.reference import CastWeight as CastWeight
from rcmstr_fast.ops.reference import Sites
from rcmstr_fast.ops.reference.cast_weight import values

Pair = int | tuple[int, int]

_masked_conv2d = operation("masked_conv2d", reference.masked_conv2d)
_masked_max_pool2d = operation("masked_max_pool2d", reference.masked_max_pool2d)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _window(op: str, kernel: Pair, stride: Pair, padding: Pair) -> site_rows.Window:
    if min(*_pair(kernel), *_pair(stride)) < 1 or min(_pair(padding)) < 0:
        raise ValueError(
            f"{op}: kernel and stride must be 1 or more and padding 0 or more, got {kernel}, {stride}, {padding}"
        )
    return site_rows.Window(_pair(kernel), _pair(stride), _pair(padding))


def _check(op: str, x: Tensor, sites: Sites, window: site_rows.Window) -> None:
    """x and the maps of its stage must fit the window."""
    if x.dim() == 2 and isinstance(sites, packed.StoredSites):
        checks.check_tensor(op, "x", x, (sites.inputs(x, window).count, "C"), like="the active sites")
        return
    checks.check_tensor(op, "x", x, ("B", "C", "h", "w"))
    out = window.output_size((x.shape[2], x.shape[3]))
    if min(out) < 1:
        raise ValueError(f"{op}: x must be at least as large as the kernel {window.kernel}, got {list(x.shape)}")
    active = (x.shape[0], 1, *out)
    checks.check_tensor(op, "sites.active", sites.active, active, "bool", like="the output")
    if tuple(x.shape[2:]) != out:
        source = (x.shape[0], 1, *x.shape[2:])
        checks.check_tensor(op, "sites.source", sites.source, source, "bool", like="x")
    checks.check_devices(op, **{"x": x, "sites.active": sites.active, "sites.source": sites.source})


def check_convolution(
    op: str, x: Tensor, weight: Tensor | CastWeight, sites: Sites, stride: Pair, padding: Pair
) -> site_rows.Window:
    """The window of a convolution whose arguments fit each other; else TypeError or ValueError."""
    kernel = values(weight)
    checks.check_tensor(op, "weight", kernel, ("O", "C", "kh", "kw"))
    window = _window(op, (kernel.shape[2], kernel.shape[3]), stride, padding)
    _check(op, x, sites, window)
    checks.check_tensor(op, "weight", kernel, ("O", x.shape[1], "kh", "kw"), like="x")
    checks.check_devices(op, x=x, weight=kernel)
    return window


def masked_conv2d(
    x: Tensor,
    weight: Tensor | CastWeight,
    sites: Sites,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    backend: str | None = None,
) -> Tensor:
    """Convolution without bias whose inactive inputs count as zero and whose inactive outputs are zero.

    With nothing hidden it is `torch.nn.functional.conv2d`. What inactive inputs hold (also NaN) reaches neither the
    output nor a gradient; the gradient of inactive inputs is zero.

    Args:
        x: [B, C, h0, w0] floating point, or rows [N, C] with sites of `masked_storage`.
        weight: [O, C, kh, kw] floating point; under autocast also a `CastWeight`.
        sites: maps of the output's stage; `active` [B, 1, h, w]. Where the input's size differs from it,
            `source` [B, 1, h0, w0] is the input's map.
        stride: rows and columns.
        padding: rows and columns, zeros.
        backend: None (automatic), "reference", "cpp", "triton" or "cuda".
    Returns:
        [B, O, h, w] in the dtype that `conv2d` gives (autocast applies); rows [N, O] at packed stages.
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree.
    """
    window = check_convolution("masked_conv2d", x, weight, sites, stride, padding)
    if isinstance(sites, packed.StoredSites):
        inputs = sites.inputs(x, window)
        if backend in (None, "cpp") and sites.packs(x):
            return packed.convolution(packed.as_rows(x, inputs), weight, sites.lists(window, inputs))
        x = packed.as_map(x, inputs)
    return _masked_conv2d(x, weight, sites, stride=stride, padding=padding, backend=backend)


def masked_max_pool2d(
    x: Tensor, sites: Sites, *, kernel_size: Pair, stride: Pair, padding: Pair = 0, backend: str | None = None
) -> Tensor:
    """Maximum over the active sites of each window; windows without any and inactive outputs are zero.

    Args:
        x: [B, C, h0, w0] floating point; inactive sites may hold anything, also NaN. Or rows [N, C] with sites of
            `masked_storage`.
        sites: maps of the output's stage; `source` [B, 1, h0, w0] is the input's map where the size differs.
        kernel_size: rows and columns.
        stride: rows and columns.
        padding: rows and columns, at most half the kernel; ignored like inactive sites.
        backend: None (automatic), "reference", "cpp", "triton" or "cuda".
    Returns:
        [B, C, h, w] in the dtype of x; rows [N, C] at packed stages.
    Raises:
        TypeError: x is not floating point.
        ValueError: shapes or devices disagree, padding above half the kernel.
    """
    window = _window("masked_max_pool2d", kernel_size, stride, padding)
    if any(2 * p > k for p, k in zip(_pair(padding), _pair(kernel_size))):
        raise ValueError(f"masked_max_pool2d: padding must be at most half of {kernel_size}, got {padding}")
    _check("masked_max_pool2d", x, sites, window)
    if isinstance(sites, packed.StoredSites):
        inputs = sites.inputs(x, window)
        if backend in (None, "cpp") and sites.packs(x):
            return packed.max_pool(packed.as_rows(x, inputs), sites.lists(window, inputs))
        x = packed.as_map(x, inputs)
    return _masked_max_pool2d(x, sites, kernel_size=kernel_size, stride=stride, padding=padding, backend=backend)


def _packed_conv2d(x: Tensor, weight: Tensor | CastWeight, sites: Sites, *, stride: Pair, padding: Pair) -> Tensor:
    stored = packed.StoredSites.of(sites)
    return stored.rows.unpack(masked_conv2d(x, weight, stored, stride=stride, padding=padding))


def _packed_max_pool2d(x: Tensor, sites: Sites, *, kernel_size: Pair, stride: Pair, padding: Pair) -> Tensor:
    stored = packed.StoredSites.of(sites)
    return stored.rows.unpack(masked_max_pool2d(x, stored, kernel_size=kernel_size, stride=stride, padding=padding))


packed.register_packed(_masked_conv2d, _packed_conv2d)
packed.register_packed(_masked_max_pool2d, _packed_max_pool2d)
listed.register_listed(_masked_conv2d)
listed_pool.register_listed_pool(_masked_max_pool2d)
