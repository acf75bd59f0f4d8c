"""The element-wise work on one tile of logits, between two matrix products.

    z = outer·(x + b), or with a softcap outer·t with t = tanh(inner·(x + b))
    slope = 1 − t² (without a softcap 1): dz/dx less its constant factor logit_scale / temperature

A tile x (float32, as a matrix product left it) holds R rows and the columns start ... start + C of the vocabulary.
`fold` takes it into each row's running maximum and sum; the two gradients make of it, or of what `fold` kept, the left
side of the next product. The label's own logit never enters a sum: the caller holds it apart as `target`, so that a
confident row keeps 1 − p.

Bytes: `fold` reads 4·R·C, and writes R·C·itemsize where it keeps; a gradient reads the tile and writes it once. A bias
is read again by every row, from L2. Tiles of some 32 MB stay in the L2 of an H200, so that L2 sets the limit.

Per-row arguments are contiguous (R,). A row's values depend on its elements, C and the alignment of the tile, never on
the row's place in it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .transform import factors_of, on_device, scaled, tanh

# Not swept on a GPU yet. `fold` holds a row in registers: 16 float32 a thread are four loads of 16 bytes in flight, and
# leave the registers for a softcap at four blocks a multiprocessor; C = 4096 takes 8 warps, 8192 takes 16.
ROW_PER_THREAD = 16
MIN_ROW_BLOCK = 512  # one warp; narrower tiles are the last of a vocabulary
MAX_COLUMNS = 8192
# The gradients hold nothing across columns: 16 elements a thread again.
BLOCK = 2048
# A wavefront of AMD's has 64 threads: as many threads in half as many.
THREADS_PER_WARP = 32 if torch.version.hip is None else 64
NUM_WARPS, HIP_NUM_WARPS = 4, 2

# One element of these is read or written by a program: alignment would only multiply the compiled kernels.
_PER_ROW = ["labels", "maximum", "total", "target", "rescale", "rowscale", "own", "tilt"]
_PER_ROW += ["weighted", "squares", "sum_z"]


@triton.jit
def _local_label(labels, row, start, C):
    """The label's column in this tile, −1 where it is in another."""
    local = tl.load(labels + row).to(tl.int64) - start
    return tl.where((local >= 0) & (local < C), local, -1).to(tl.int32)


@triton.jit
def _logits(x, inner, inner_low, outer, outer_low, HAS_SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """z and slope; `inner_low` and `outer_low` are what rounding the factors to float32 left over."""
    if HAS_SOFTCAP:
        t = tanh(scaled(x, inner, inner_low, EXACT))
        slope = 1.0 - t * t
        z = scaled(t, outer, outer_low, EXACT)
    else:
        slope = 1.0
        z = scaled(x, outer, outer_low, EXACT)
    return z, slope


@triton.jit(do_not_specialize=["start"], do_not_specialize_on_alignment=_PER_ROW)
def fold_kernel(
    x,  # (R, C) float32
    labels,  # (R,) int64
    bias,  # (C,) or None
    maximum,  # (R,) float32, updated
    total,  # (R,) float32, updated
    target,  # (R,) float32, updated
    out,  # (R, C) or None; may be x
    rescale,  # (R,) float32 or None
    weighted,  # (R,) float32, updated, or None
    squares,  # (R,) float32, updated, or None
    sum_z,  # (R,) float32, updated, or None
    C,
    start,
    stride,
    out_stride,
    inner,
    inner_low,
    outer,
    outer_low,
    keep_scale,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """new = max(m, max z), s' = s·exp(m − new) + Σ exp(z − new), kept = keep_scale·exp(z − new)·slope; a program a row.

    Maximum and sum are over the columns other than the label's. Reads 4·C bytes a row (and the bias); writes
    C·itemsize where it keeps; 12 to 28 bytes of running values, and 8 for each sum that is asked for besides:
    weighted = Σ exp(z − new)·(z − new), squares = Σ exp(2·(z − new)), sum_z = Σ z.
    """
    row = tl.program_id(0).to(tl.int64)  # rows times stride may pass 2³¹
    local = _local_label(labels, row, start, C)
    # All that another thread of this program may overwrite is read here: the reductions below are the barrier.
    m = tl.load(maximum + row)
    s = tl.load(total + row)
    if weighted is not None:
        w = tl.load(weighted + row)
    if squares is not None:
        q = tl.load(squares + row)
    if sum_z is not None:
        a = tl.load(sum_z + row)
    x_label = tl.load(x + row * stride + local, mask=local >= 0, other=0.0)
    column = tl.arange(0, BLOCK)
    inside = column < C
    x_row = tl.load(x + row * stride + column, mask=inside, other=0.0)
    if bias is not None:
        x_label += tl.load(bias + local, mask=local >= 0, other=0.0).to(tl.float32)
        x_row += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)

    z_label, _ = _logits(x_label, inner, inner_low, outer, outer_low, HAS_SOFTCAP, EXACT)
    z, slope = _logits(x_row, inner, inner_low, outer, outer_low, HAS_SOFTCAP, EXACT)
    counted = inside & (column != local)
    z = tl.where(counted, z, float("-inf"))
    new = tl.maximum(m, tl.max(z, axis=0))
    base = tl.where(new == float("-inf"), 0.0, new)  # a tile that is all −inf must not make NaN
    e = tl.exp(z - base)
    carried = tl.exp(m - base)
    if weighted is not None:
        # 0·(−inf) would be NaN: of an entry, and of a row that has seen nothing yet.
        earlier = tl.where(carried > 0.0, carried * (w + s * (m - base)), 0.0)
        tl.store(weighted + row, earlier + tl.sum(tl.where(e > 0.0, e * (z - base), 0.0), axis=0))
    if squares is not None:
        tl.store(squares + row, q * (carried * carried) + tl.sum(e * e, axis=0))
    if sum_z is not None:
        tl.store(sum_z + row, a + tl.sum(tl.where(counted, z, 0.0), axis=0))
    s = s * carried + tl.sum(e, axis=0)

    tl.store(maximum + row, new)
    tl.store(total + row, s)
    tl.store(target + row, z_label, mask=local >= 0)
    if rescale is not None:
        tl.store(rescale + row, carried)
    if out is not None:
        kept = tl.where(counted, keep_scale * (e * slope), 0.0)  # the slope of a label's NaN is NaN
        tl.store(out + row * out_stride + column, kept.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start"], do_not_specialize_on_alignment=_PER_ROW)
def gradient_from_kept_kernel(
    kept,  # (R, C)
    labels,  # (R,) int64
    rowscale,  # (R,) float32
    own,  # (R,) float32
    out,  # (R, C), which may be `kept`
    C,
    start,
    stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    """out = kept·rowscale, and `own` at the label; one program a row and BLOCK columns.

    Reads R·C and writes R·C elements. Each element is read before it is written and by the same program.
    """
    row = tl.program_id(0).to(tl.int64)  # rows times stride may pass 2³¹
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    local = _local_label(labels, row, start, C)
    scale = tl.load(rowscale + row)
    at_label = tl.load(own + row)
    e = tl.load(kept + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    dx = tl.where(column == local, at_label, e * scale)
    tl.store(out + row * out_stride + column, dx.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start"], do_not_specialize_on_alignment=_PER_ROW)
def gradient_from_logits_kernel(
    x,  # (R, C) float32
    labels,  # (R,) int64
    bias,  # (C,) or None
    maximum,  # (R,) float32, the label's logit included
    rowscale,  # (R,) float32
    own,  # (R,) float32
    tilt,  # (R,) float32 or None
    out,  # (R, C), which may be x
    C,
    start,
    stride,
    out_stride,
    inner,
    inner_low,
    outer,
    outer_low,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (rowscale + tilt·(z − m))·exp(z − m)·slope, and `own` at the label; a program a row and BLOCK columns.

    Reads 4·R·C bytes (and the bias), writes R·C·itemsize. Each element is read before it is written and by the same
    program.
    """
    row = tl.program_id(0).to(tl.int64)  # rows times stride may pass 2³¹
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    local = _local_label(labels, row, start, C)
    m = tl.load(maximum + row)
    scale = tl.load(rowscale + row)
    at_label = tl.load(own + row)
    x_row = tl.load(x + row * stride + column, mask=inside, other=0.0)
    if bias is not None:
        x_row += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    z, slope = _logits(x_row, inner, inner_low, outer, outer_low, HAS_SOFTCAP, EXACT)
    e = tl.exp(z - m)
    if tilt is not None:
        scale += tl.load(tilt + row) * tl.where(e > 0.0, z - m, 0.0)  # 0·(−inf) would be NaN
    dx = tl.where(column == local, at_label, scale * (e * slope))
    tl.store(out + row * out_stride + column, dx.to(out.dtype.element_ty), mask=inside)


def fold(
    x: Tensor,  # (R, C) float32, last stride 1, C up to MAX_COLUMNS
    labels: Tensor,  # (R,) int64
    bias: Tensor | None,  # (C,) any float dtype
    maximum: Tensor,  # (R,) float32
    total: Tensor,  # (R,) float32
    target: Tensor,  # (R,) float32
    *,
    start: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    out: Tensor | None = None,  # (R, C) any float dtype, last stride 1
    rescale: Tensor | None = None,  # (R,) float32
    keep_scale: float = 1.0,
    weighted: Tensor | None = None,  # (R,) float32
    squares: Tensor | None = None,  # (R,) float32
    sum_z: Tensor | None = None,  # (R,) float32
    num_warps: int | None = None,
) -> None:
    """Takes a tile into `maximum`, `total` and `target`, in place.

    `out` receives keep_scale·exp(z − base)·slope, 0 at the label, with base the new maximum or 0 where that is −inf;
    `rescale` the factor exp(old maximum − base), by which what was kept of earlier tiles has shrunk.
    `weighted`, `squares` and `sum_z` are updated as `total` is: Σ exp(z − base)·(z − base), Σ exp(2·(z − base)), Σ z.
    """
    rows, columns = x.shape
    if rows == 0 or columns == 0:
        return
    block = row_block(columns)
    factors = factors_of(temperature, logit_scale, softcap or 0.0)
    with on_device(x):
        fold_kernel[(rows,)](
            x,
            labels,
            bias,
            maximum,
            total,
            target,
            out,
            rescale,
            weighted,
            squares,
            sum_z,
            columns,
            start,
            x.stride(0),
            0 if out is None else out.stride(0),
            *factors,
            keep_scale,
            HAS_SOFTCAP=bool(softcap),
            EXACT=factors[1] == factors[3] == 0.0,
            BLOCK=block,
            num_warps=num_warps or fold_warps(block),
        )


def gradient_from_kept(
    kept: Tensor,  # (R, C) any float dtype, last stride 1
    labels: Tensor,  # (R,) int64
    rowscale: Tensor,  # (R,) float32
    own: Tensor,  # (R,) float32
    out: Tensor,  # (R, C) any float dtype, last stride 1; may be `kept`
    *,
    start: int,
    block: int = BLOCK,
    num_warps: int = NUM_WARPS if torch.version.hip is None else HIP_NUM_WARPS,
) -> None:
    """kept·rowscale into `out`, and `own` at the label, rounded once."""
    rows, columns = kept.shape
    if rows == 0 or columns == 0:
        return
    with on_device(kept):
        gradient_from_kept_kernel[(rows, triton.cdiv(columns, block))](
            kept,
            labels,
            rowscale,
            own,
            out,
            columns,
            start,
            kept.stride(0),
            out.stride(0),
            BLOCK=block,
            num_warps=num_warps,
        )


def gradient_from_logits(
    x: Tensor,  # (R, C) float32, last stride 1
    labels: Tensor,  # (R,) int64
    bias: Tensor | None,  # (C,) any float dtype
    maximum: Tensor,  # (R,) float32, the row's final one
    rowscale: Tensor,  # (R,) float32
    own: Tensor,  # (R,) float32
    out: Tensor,  # (R, C) any float dtype, last stride 1; may be x
    *,
    start: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    tilt: Tensor | None = None,  # (R,) float32
    block: int = BLOCK,
    num_warps: int = NUM_WARPS if torch.version.hip is None else HIP_NUM_WARPS,
) -> None:
    """exp(z − maximum)·slope·(rowscale + tilt·(z − maximum)) into `out`, and `own` at the label, rounded once."""
    rows, columns = x.shape
    if rows == 0 or columns == 0:
        return
    factors = factors_of(temperature, logit_scale, softcap or 0.0)
    with on_device(x):
        gradient_from_logits_kernel[(rows, triton.cdiv(columns, block))](
            x,
            labels,
            bias,
            maximum,
            rowscale,
            own,
            tilt,
            out,
            columns,
            start,
            x.stride(0),
            out.stride(0),
            *factors,
            HAS_SOFTCAP=bool(softcap),
            EXACT=factors[1] == factors[3] == 0.0,
            BLOCK=block,
            num_warps=num_warps,
        )


def row_block(columns: int) -> int:
    """Elements of registers for a row of so many columns."""
    if columns > MAX_COLUMNS:
        raise ValueError(f"fold takes tiles of at most {MAX_COLUMNS} columns, got {columns}: split the tile")
    return max(MIN_ROW_BLOCK, triton.next_power_of_2(columns))


def fold_warps(block: int, threads_per_warp: int = THREADS_PER_WARP) -> int:
    return max(1, block // (ROW_PER_THREAD * threads_per_warp))
