"""The kernels of the linear path against a plain statement of what they compute, in float64."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import pytest
import torch
from acceptance import Triple, no_worse_than_eager
from torch import Tensor

linear = pytest.importorskip("fastpref.kernels.linear", reason="Triton is not installed")

COLUMNS = [1, 2, 31, 127, 129, 255, 507, 2048]
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0, "logit_scale": 1.0, "softcap": None},
    "scaled": {"temperature": 0.7, "logit_scale": 0.3, "softcap": None},
    "softcap": {"temperature": 1.0, "logit_scale": 1.0, "softcap": 5.0},
    "softcap, scaled": {"temperature": 1.3, "logit_scale": 0.6, "softcap": 3.0},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = TRANSFORMS["plain"]
START = 40  # of a tile that is not the first
GUARD = -77.0  # what stands around a view and must still stand there afterwards


class Running(NamedTuple):
    maximum: Tensor  # (R,)
    total: Tensor  # (R,)
    target: Tensor  # (R,)


def make_running(rows: int, device: str) -> Running:
    """As before the first tile; NaN is where nothing may be read before it is written."""
    return Running(*(torch.full((rows,), value, device=device) for value in (-math.inf, 0.0, math.nan)))


def make_tile(rows: int, columns: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (rows, columns), and labels in the first and last column, just outside on both sides, and anywhere."""
    generator = torch.Generator().manual_seed(1000 * seed + columns)
    x = torch.randn(rows, columns, generator=generator) * 4
    labels = torch.randint(START, START + columns, (rows,), generator=generator)
    edges = torch.tensor([START, START + columns - 1, START - 1, START + columns])
    labels[: min(4, rows)] = edges[: min(4, rows)]
    return x.to(device), labels.to(device)


def plain_logits(x: Tensor, bias: Tensor | None, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """z and slope (R, C) in `dtype`."""
    x = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    x, slope = x * options["logit_scale"], torch.ones_like(x)
    if options["softcap"]:
        t = torch.tanh(x / options["softcap"])
        x, slope = options["softcap"] * t, 1 - t * t
    return x / options["temperature"], slope


def assert_one_rounding(got: Tensor, wanted: Tensor) -> None:
    """`got` is the float32 `wanted` rounded once: exact, but in bfloat16, which the interpreter rounds towards zero."""
    if got.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        step = torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(got.float(), wanted, rtol=step, atol=torch.finfo(torch.bfloat16).tiny * step)
    else:
        assert torch.equal(got, wanted.to(got.dtype))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("columns", [*COLUMNS, linear.MAX_COLUMNS])
def test_fold_of_one_tile_is_within_the_bound_of_its_roundings(columns, name, device):
    """In units of 2⁻²³: z is good to 2|z| (the sum with the bias, two factors, tanh), e to what z and the maximum are.

    A bound for each element, since few of them make a comparison with eager torch a matter of luck.
    """
    rows = 6 if columns <= 2048 else 2
    x, labels = make_tile(rows, columns, device)
    bias = torch.linspace(-1, 1, columns, device=device).to(DTYPES[columns % 3]) if columns % 2 else None
    options, running = TRANSFORMS[name], make_running(rows, device)
    out, rescale = torch.empty_like(x), torch.full((rows,), GUARD, device=device)
    linear.fold(x, labels, bias, *running, start=START, **options, out=out, rescale=rescale)

    unit = torch.finfo(torch.float32).eps
    z, slope = plain_logits(x, bias, torch.float64, options)
    own = labels.unsqueeze(1) == START + torch.arange(columns, device=device)
    others = z.masked_fill(own, -math.inf)
    assert torch.equal(running.target.isnan(), ~own.any(1))  # a label outside the tile leaves target as it was
    torch.testing.assert_close(running.target[own.any(1)].double(), z[own], rtol=2 * unit, atol=0)
    torch.testing.assert_close(running.maximum.double(), others.amax(1), rtol=2 * unit, atol=0)

    some = others.amax(1) > -math.inf  # C = 1 and its label leave nothing
    assert torch.equal(running.total == 0, ~some)
    largest = z.abs().amax(1)
    lse = running.maximum.double() + running.total.double().log()
    assert ((lse - others.logsumexp(1)).abs() <= unit * (2 * largest + 2))[some].all()
    e = torch.exp(others - torch.where(some, running.maximum, 0.0).double().unsqueeze(1))
    bound = e * unit * (3 * largest.unsqueeze(1) + 3)
    assert ((out.double() - e * slope).abs() <= bound).all()
    assert torch.equal(rescale, torch.zeros_like(rescale))  # there was nothing before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 127, 507])
def test_what_is_kept_is_rounded_once(columns, dtype, device):
    x, labels = make_tile(5, columns, device)
    kept = {}
    for kind in (torch.float32, dtype):
        kept[kind] = torch.empty(5, columns, dtype=kind, device=device)
        linear.fold(x, labels, None, *make_running(5, device), start=START, **TRANSFORMS["softcap"], out=kept[kind])
    assert_one_rounding(kept[dtype], kept[torch.float32])


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("width", [129, 255])
def test_folding_tile_by_tile_is_logsumexp_over_every_other_column(width, name, device):
    rows, vocab, options = 24, 307, TRANSFORMS[name]
    bias = torch.linspace(1, -1, vocab, device=device)
    labels = torch.arange(rows, device=device) * 13
    labels[:4] = torch.tensor([0, vocab - 1, width - 1, width], device=device)

    def draw(seed: int) -> list[Triple]:
        logits = make_tile(rows, vocab, device, seed)[0]
        running = make_running(rows, device)
        for start in range(0, vocab, width):
            tile = slice(start, start + width)
            linear.fold(logits[:, tile], labels, bias[tile], *running, start=start, **options)

        def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            z, _ = plain_logits(logits, bias, dtype, options)
            own = labels.unsqueeze(1)
            return z.gather(1, own).squeeze(1), z.scatter(1, own, -math.inf).logsumexp(1)

        found = running.target, running.maximum + running.total.log()
        return list(zip(found, plain(torch.float32), plain(torch.float64), strict=True))

    no_worse_than_eager(draw, draws=1)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_kept_tiles_times_their_rescales_are_the_gradient_and_so_are_the_logits(name, device):
    """Both ways against autograd in float64, whatever the order in which the maxima came; the two agree."""
    rows, vocab, width, options = 12, 300, 127, TRANSFORMS[name]
    bias = torch.linspace(1, -1, vocab, device=device)
    labels = torch.arange(rows, device=device) * 25
    labels[:4] = torch.tensor([0, vocab - 1, width - 1, width], device=device)
    upstream = torch.linspace(-1.5, 2.0, rows, device=device)
    starts = range(0, vocab, width)

    def draw(seed: int) -> list[Triple]:
        rising = torch.linspace(0.2, 1, vocab, device=device)  # of the maxima
        logits = make_tile(rows, vocab, device, seed)[0] * rising
        running, kept = make_running(rows, device), torch.empty_like(logits)
        shrunk: dict[int, Tensor] = {}  # by start: what the later tiles' maxima left of a tile
        for start in starts:
            tile, rescale = slice(start, start + width), torch.empty(rows, device=device)
            arguments = (logits[:, tile], labels, bias[tile], *running)
            linear.fold(*arguments, start=start, **options, out=kept[:, tile], rescale=rescale)
            shrunk = {earlier: factor * rescale for earlier, factor in shrunk.items()}
            shrunk[start] = torch.ones(rows, device=device)

        final = torch.maximum(running.maximum, running.target)
        others = running.total * torch.exp(running.maximum - final)
        rowscale = -upstream / (others + torch.exp(running.target - final))
        t = running.target * options["temperature"] / options["softcap"] if options["softcap"] else 0 * running.target
        own = -rowscale * others * (1 - t * t)
        from_kept, from_logits = torch.empty_like(logits), torch.empty_like(logits)
        for start in starts:
            tile = slice(start, start + width)
            scale = rowscale * torch.exp(running.maximum - final) * shrunk[start]
            linear.gradient_from_kept(kept[:, tile], labels, scale, own, from_kept[:, tile], start=start)
            arguments = (logits[:, tile], labels, bias[tile], final, rowscale, own, from_logits[:, tile])
            linear.gradient_from_logits(*arguments, start=start, **options)
        # Exponents near 20 are rounded in float32 on both ways, at different places.
        torch.testing.assert_close(from_kept, from_logits, rtol=40 * torch.finfo(torch.float32).eps, atol=1e-30)

        def autograd(dtype: torch.dtype) -> Tensor:
            x = logits.to(dtype).requires_grad_()
            logp = plain_logits(x, bias, dtype, options)[0].log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
            (gradient,) = torch.autograd.grad(logp, x, upstream.to(dtype))
            return gradient * (options["temperature"] / options["logit_scale"])  # the caller's factor

        truth, eager = autograd(torch.float64), autograd(torch.float32)
        return [(from_kept, eager, truth), (from_logits, eager, truth)]

    no_worse_than_eager(draw, draws=1)


def test_a_confident_row_keeps_one_minus_p(device):
    """1 − p = q / (1 + q) with q the sum of the others: no digit goes to a subtraction from 1."""
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)).to(device)
    lead = torch.tensor([5.0, 10.0, 15.0, 20.0, 40.0, 60.0, 80.0, 90.0], device=device)
    logits[:, 7] = logits.logsumexp(1) + lead
    labels, running = torch.full((8,), 7, device=device), make_running(8, device)
    for start in (0, 150):
        linear.fold(logits[:, start : start + 150], labels, None, *running, start=start, **PLAIN)
    q = running.total.double() * torch.exp(running.maximum.double() - running.target.double())
    others = logits.double().scatter(1, labels.unsqueeze(1), -math.inf).logsumexp(1)
    truth = torch.sigmoid(others - logits[:, 7].double())
    torch.testing.assert_close(q / (1 + q), truth, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("where", ["first", "last", "only"])
@pytest.mark.parametrize("own", [True, False], ids=["own label", "foreign label"])
def test_a_tile_of_minus_infinity_adds_nothing_and_makes_no_nan(own, where, device):
    x = torch.randn(3, 31, generator=torch.Generator().manual_seed(2)).to(device)
    empty, rescale = torch.full_like(x, -math.inf), torch.empty(3, device=device)
    kept = torch.empty_like(x)
    running = make_running(3, device)
    labels = torch.full((3,), 5 if own else 1000, device=device)
    tiles = {"first": [empty, x], "last": [x, empty], "only": [empty]}[where]
    for number, tile in enumerate(tiles):
        start = 0 if tile is empty else 100 + number
        linear.fold(tile, labels, None, *running, start=start, **PLAIN, out=kept, rescale=rescale)
        if tile is empty:
            assert torch.equal(kept, torch.zeros_like(kept))
        assert torch.equal(rescale, torch.full_like(rescale, 1.0 if tile is empty and where == "last" else 0.0))
    if where == "only":
        assert torch.equal(running.maximum, torch.full_like(running.maximum, -math.inf))
        assert torch.equal(running.total, torch.zeros_like(running.total))
    else:
        alone = make_running(3, device)
        linear.fold(x, labels, None, *alone, start=100, **PLAIN)
        assert torch.equal(running.maximum, alone.maximum)
        assert torch.equal(running.total, alone.total)
    wanted = torch.full((3,), -math.inf if own else math.nan, device=device)
    torch.testing.assert_close(running.target, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tile", [0, 1], ids=["first tile", "last tile"])
def test_nan_and_infinity_make_the_rows_total_nan_and_no_other(tile, softcap, value, device):
    """As in torch: logsumexp's softmax of a row with NaN or +inf is NaN. A softcap makes of +inf an ordinary number."""
    options = {**PLAIN, "softcap": softcap}
    x = torch.randn(4, 254, generator=torch.Generator().manual_seed(4)).to(device)
    clean, labels = make_running(4, device), torch.full((4,), 3, device=device)
    spoiled = x.clone()
    spoiled[1, 127 * tile + 9] = value
    running = make_running(4, device)
    for start in (0, 127):
        linear.fold(x[:, start : start + 127], labels, None, *clean, start=start, **options)
        linear.fold(spoiled[:, start : start + 127], labels, None, *running, start=start, **options)
    rest = torch.tensor([0, 2, 3], device=device)
    for ours, untouched in zip(running, clean, strict=True):
        assert torch.equal(ours[rest], untouched[rest])
    if softcap and value == math.inf:
        assert running.maximum[1].item() == softcap
        assert math.isfinite(running.total[1].item())
    else:
        assert math.isnan(running.total[1].item())


def test_a_labels_own_nan_reaches_target_and_nothing_else(device):
    """No product with a mask: 0·NaN would reach what is kept."""
    for value in (math.nan, math.inf, -math.inf):
        x = torch.randn(2, 129, generator=torch.Generator().manual_seed(5)).to(device)
        labels, kept = torch.tensor([7, 128], device=device), torch.empty_like(x)
        clean, running = make_running(2, device), make_running(2, device)
        linear.fold(x, labels, None, *clean, start=0, **TRANSFORMS["softcap"])
        x[0, 7] = value
        linear.fold(x, labels, None, *running, start=0, **TRANSFORMS["softcap"], out=kept)
        assert torch.equal(running.maximum, clean.maximum)
        assert torch.equal(running.total, clean.total)
        assert kept[0, 7].item() == 0.0
        torch.testing.assert_close(running.target[0].item(), 5.0 * math.tanh(value), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 129, 2 * linear.BLOCK + 3])
def test_gradient_from_kept_is_one_product_rounded_once(columns, dtype, device):
    rows = 7
    tile, labels = make_tile(rows, columns, device)
    kept = tile.abs().mul(-1).exp().to(dtype)
    rowscale, own = torch.linspace(-2, 1, rows, device=device), torch.linspace(3, 4, rows, device=device)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    linear.gradient_from_kept(kept, labels, rowscale, own, out, start=START)
    wanted = kept.float() * rowscale.unsqueeze(1)
    at_label = labels.unsqueeze(1) == START + torch.arange(columns, device=device)
    assert_one_rounding(out, torch.where(at_label, own.unsqueeze(1), wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "softcap, scaled"])
@pytest.mark.parametrize("columns", [*COLUMNS, linear.BLOCK + 3])
def test_gradient_from_logits_is_no_worse_than_eager(columns, name, dtype, device):
    rows, options = 6, TRANSFORMS[name]
    bias = torch.linspace(-1, 1, columns, device=device).to(dtype) if columns % 2 else None
    rowscale, own = torch.linspace(-2, 1, rows, device=device), torch.linspace(3, 4, rows, device=device)

    def draw(seed: int) -> list[Triple]:
        x, labels = make_tile(rows, columns, device, seed)
        maximum = plain_logits(x, bias, torch.float32, options)[0].amax(1) + 0.25  # that of another tile
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        linear.gradient_from_logits(x, labels, bias, maximum, rowscale, own, out, start=START, **options)
        at_label = labels.unsqueeze(1) == START + torch.arange(columns, device=device)

        def plain(kind: torch.dtype) -> Tensor:
            z, slope = plain_logits(x, bias, kind, options)
            gradient = rowscale.to(kind).unsqueeze(1) * (z - maximum.to(kind).unsqueeze(1)).exp() * slope
            return torch.where(at_label, own.to(kind).unsqueeze(1), gradient)

        return [(out, plain(torch.float32).to(dtype), plain(torch.float64))]

    no_worse_than_eager(draw, draws=4 if columns < 31 else 1)


def test_a_row_scale_of_zero_gives_zeros(device):
    x, labels = make_tile(3, 127, device)
    zeros = torch.zeros(3, device=device)
    for out in (torch.full_like(x, GUARD), torch.full_like(x, GUARD)):
        linear.gradient_from_kept(x.exp(), labels, zeros, zeros, out, start=START)
        assert torch.equal(out, torch.zeros_like(out))
        linear.gradient_from_logits(x, labels, None, x.amax(1), zeros, zeros, out, start=START, **PLAIN)
        assert torch.equal(out, torch.zeros_like(out))


def surrounded(x: Tensor, pad: int = 5) -> tuple[Tensor, Tensor]:
    """A copy of x as a view with other columns around it, and the whole buffer."""
    rows, columns = x.shape
    whole = torch.full((rows, columns + 2 * pad), GUARD, dtype=x.dtype, device=x.device)
    view = whole[:, pad : pad + columns]
    view.copy_(x)
    return view, whole


@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "apart"])
@pytest.mark.parametrize("columns", [1, 31, 255, 2048])
def test_views_of_larger_buffers_are_read_and_written_within_their_columns(columns, inplace, device):
    rows, options = 4, TRANSFORMS["softcap"]
    x, labels = make_tile(rows, columns, device)
    bias, final = torch.linspace(-1, 1, columns, device=device), x.amax(1) + 1
    rowscale, own = torch.linspace(-2, 1, rows, device=device), torch.linspace(3, 4, rows, device=device)

    def fold(tile: Tensor, out: Tensor) -> Running:
        running = make_running(rows, device)
        linear.fold(tile, labels, bias, *running, start=START, **options, out=out)
        return running

    def from_kept(tile: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        linear.gradient_from_kept(tile, labels, rowscale, own, out, start=START)
        return ()

    def from_logits(tile: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        linear.gradient_from_logits(tile, labels, bias, final, rowscale, own, out, start=START, **options)
        return ()

    for function in (fold, from_kept, from_logits):
        wanted = torch.empty_like(x)
        values = function(x.clone(), wanted)
        tile, around = surrounded(x)
        out, out_around = (tile, around) if inplace else surrounded(torch.zeros_like(x), pad=3)
        got = function(tile, out)
        # Other addresses, other widths of loads: on a GPU the sums may be taken in another order.
        torch.testing.assert_close(out, wanted, rtol=2e-6, atol=0)
        torch.testing.assert_close(got, values, rtol=2e-6, atol=0, equal_nan=True)
        guards = torch.cat([whole.flatten() for whole in (around, out_around)]) == GUARD
        assert guards.sum().item() == rows * (10 + (10 if inplace else 6))
        if not inplace:
            assert torch.equal(tile, x)


@pytest.mark.parametrize("columns", [129, 2048])
def test_twice_is_bitwise_equal_and_so_is_a_row_in_another_place(columns, device):
    x, labels = make_tile(8, columns, device)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3], device=device)

    def everything(x: Tensor, labels: Tensor) -> list[Tensor]:
        running, kept, rescale = make_running(8, device), torch.empty_like(x), torch.empty(8, device=device)
        options = TRANSFORMS["softcap, scaled"]
        linear.fold(x, labels, None, *running, start=START, **options, out=kept, rescale=rescale)
        first, second = torch.empty_like(x), torch.empty_like(x)
        rowscale = 1 / running.total.clamp(min=1)
        linear.gradient_from_kept(kept, labels, rowscale, -rowscale, first, start=START)
        arguments = (x, labels, None, running.maximum, rowscale, -rowscale, second)
        linear.gradient_from_logits(*arguments, start=START, **options)
        return [running.maximum, running.total, running.target.nan_to_num(), kept, rescale, first, second]

    once, again, moved = everything(x, labels), everything(x, labels), everything(x[order], labels[order])
    for a, b, c in zip(once, again, moved, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[order], c)


@pytest.mark.parametrize("shape", [(0, 127), (0, 0), (3, 0)])
def test_nothing_to_do_changes_nothing(shape, device):
    x = torch.empty(shape, device=device)
    labels, values = torch.zeros(shape[0], dtype=torch.long, device=device), torch.ones(shape[0], device=device)
    running = Running(values.clone(), values.clone(), values.clone())
    linear.fold(x, labels, None, *running, start=0, **PLAIN, out=x, rescale=values)
    linear.gradient_from_kept(x, labels, values, values, x, start=0)
    linear.gradient_from_logits(x, labels, None, values, values, values, x, start=0, **PLAIN)
    for value in (*running, values):
        assert torch.equal(value, torch.ones_like(value))


def test_a_tile_wider_than_fold_takes_is_an_error_that_says_so(device):
    running, labels = make_running(2, device), torch.zeros(2, dtype=torch.long, device=device)
    wider = torch.zeros(2, linear.MAX_COLUMNS + 1, device=device)
    with pytest.raises(ValueError, match="at most 8192 columns, got 8193: split the tile"):
        linear.fold(wider, labels, None, *running, start=START, **PLAIN)
