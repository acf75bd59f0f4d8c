"""Each kernel as its launcher launches it, from the launchers' own constants: what the compiler is asked about.

For `fastpref.benchmarks.compile.report`, which explains the fields and demands a case of every kernel with a grid. No
kernel imports this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import linear, logps, logps_backward, preference, rows, sequence, statistics

DTYPES = ("bf16", "fp16", "fp32")


class CompileCase(NamedTuple):
    """One kernel as its launcher launches it; `fastpref.benchmarks.compile.report` explains each field."""

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = {}
    num_warps: int | None = None
    num_stages: int | None = None
    hip_num_warps: int | None = None
    dtypes: tuple[str, ...] = DTYPES
    note: str = ""


FACTORS = dict.fromkeys(["inner", "inner_low", "outer", "outer_low"], "fp32")
ROW_WARPS: dict[str, Any] = {"num_warps": logps.NUM_WARPS, "hip_num_warps": logps.HIP_NUM_WARPS}


def linear_cases() -> Iterator[CompileCase]:
    """C = 4096: values alone, values with every extra, keeping; an odd C at an odd stride in the widest row, with all.

    Both gradients of both, the one from logits with the entropy's too.
    """
    values = {"x": "*fp32:16", "labels": "*i64", "start": "i32", **FACTORS}
    values |= dict.fromkeys(["maximum", "total", "target"], "*fp32")
    folding = {**values, "keep_scale": "fp32"}
    keeping = {**folding, "rescale": "*fp32", "out": "*{dtype}:16"}
    kept = {"kept": "*{dtype}:16", "labels": "*i64", "start": "i32", "rowscale": "*fp32", "own": "*fp32"}
    kept |= {"out": "*{dtype}:16"}
    logits = {name: kind for name, kind in (values | kept).items() if name not in ("total", "target", "kept")}
    biased = {"bias": "*{dtype}:16"}
    more = dict.fromkeys(["weighted", "squares", "sum_z"], "*fp32")
    no_more: dict[str, Any] = dict.fromkeys(more)
    even = dict.fromkeys(["C", "stride", "out_stride"], "i32:16")
    odd = dict.fromkeys(["C", "stride", "out_stride"], "i32")
    plain: dict[str, Any] = {"HAS_SOFTCAP": False, "EXACT": True, "bias": None}
    capped: dict[str, Any] = {"HAS_SOFTCAP": True, "EXACT": False}
    nothing: dict[str, Any] = {"out": None, "rescale": None}

    for columns, signature, constants, note in (
        (4096, folding | biased | even, capped | nothing | no_more, "C % 16 == 0, bias, softcap, values"),
        (4096, folding | biased | even | more, capped | nothing, "C % 16 == 0, bias, softcap, values and extras"),
        (4096, keeping | even, plain | no_more, "C % 16 == 0, keeping"),
        (linear.MAX_COLUMNS, keeping | biased | odd, capped | no_more, "odd C, bias, softcap, keeping"),
        (linear.MAX_COLUMNS, keeping | biased | odd | more, capped, "odd C, bias, softcap, keeping, extras"),
    ):
        block = linear.row_block(columns)
        warps: dict[str, Any] = {
            "num_warps": linear.fold_warps(block, 32),
            "hip_num_warps": linear.fold_warps(block, 64),
        }
        yield CompileCase(linear.fold_kernel, signature, {**constants, "BLOCK": block}, note=note, **warps)
    warps = {"num_warps": linear.NUM_WARPS, "hip_num_warps": linear.HIP_NUM_WARPS}
    block_of = {"BLOCK": linear.BLOCK}
    yield CompileCase(linear.gradient_from_kept_kernel, kept | even, block_of, note="C % 16 == 0", **warps)
    yield CompileCase(linear.gradient_from_kept_kernel, kept | odd, block_of, note="odd C", **warps)
    for signature, constants, note in (
        (logits | even, plain | {"tilt": None}, "C % 16 == 0"),
        (logits | even | {"tilt": "*fp32"}, plain, "C % 16 == 0, entropy"),
        (logits | biased | odd, capped | {"tilt": None}, "odd C, bias, softcap"),
        (logits | biased | odd | {"tilt": "*fp32"}, capped, "odd C, bias, softcap, entropy"),
    ):
        yield CompileCase(linear.gradient_from_logits_kernel, signature, constants | block_of, note=note, **warps)


def row_arguments() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Of the kernels over rows of logits: a note, the types of what all of them take, and their common constants.

    V is a multiple of 16 or GPT-2's odd one, and logits have 2³¹ elements and more (64-bit strides).
    """
    pointers = {"logits": "*{dtype}:16", "labels": "*i64:16", "mask": "*u8:16"}
    for divisible, softcap in ((True, False), (False, False), (True, True)):
        note = ("V % 16 == 0" if divisible else "odd V") + ", softcap" * softcap
        end = ":16" if divisible else ""
        sizes = {"V": "i32" + end, "stride_b": "i64" + end, "stride_t": "i32" + end}
        signature = {**pointers, **dict.fromkeys(rows.UNSPECIALISED, "i32"), **FACTORS, **sizes}
        yield note, signature, {"HAS_MASK": True, "HAS_SOFTCAP": softcap, "EXACT": not softcap}


def logps_cases() -> Iterator[CompileCase]:
    outputs = dict.fromkeys(["row_max", "row_sum", "logps"], "*fp32:16")
    sizes = {"WIDTH": logps.WIDTH, "DEPTH": logps.DEPTH}
    for note, arguments, constants in row_arguments():
        kernel = logps.token_logps_forward_kernel
        yield CompileCase(kernel, arguments | outputs, constants | sizes, note=note, **ROW_WARPS)


def logps_backward_cases() -> Iterator[CompileCase]:
    pointers = dict.fromkeys(["row_max", "row_sum", "grad", "bonus", "entropy"], "*fp32:16") | {"out": "*{dtype}:16"}
    strides = {f"{name}_stride_{axis}": "i32" for name in ("grad", "bonus") for axis in "bt"}
    for note, arguments, constants in row_arguments():
        signature = arguments | pointers | strides
        signature |= {f"out_{name}": arguments[name] for name in ("stride_b", "stride_t")}
        for entropy in (False, True):
            yield CompileCase(
                logps_backward.token_logps_backward_kernel,
                signature,
                {**constants, "BLOCK": logps_backward.BLOCK, "ENTROPY": entropy},
                note=note + ", entropy" * entropy,
                **ROW_WARPS,
            )


def preference_cases() -> Iterator[CompileCase]:
    outputs = ("losses", "chosen_rewards", "rejected_rewards", "penalty", "d_chosen", "d_rejected")
    fixed = dict.fromkeys(("policy_chosen", "ref_chosen", *outputs), "*fp32:16")
    fixed |= dict.fromkeys(("beta", "scale", "lam", "tilt", "target", "clip"), "fp32")
    for shape, align in (("logistic", ":16"), ("logistic", ""), ("hinge", ":16"), ("square", ":16")):
        halves = dict.fromkeys(("policy_rejected", "ref_rejected"), f"*fp32{align}")
        yield CompileCase(
            preference._margin_loss_kernel,
            {**fixed, **halves, "size": f"i32{align}"},
            {"SHAPE": shape, "BLOCK": preference.BLOCK},
            num_warps=preference.NUM_WARPS,
            note=f"{shape}, {'B % 16 == 0' if align else 'second half of an odd batch'}",
        )


def sequence_cases() -> Iterator[CompileCase]:
    signature = {"logps": "*fp32:16", "labels": "*i64:16", "mask": "*u8:16", "values": "*fp32:16"}
    signature |= {"lengths": "*i64:16", "cu_seqlens": "*i32:16", "T": "i32", "shift": "i32", "ignore_index": "i32"}
    signature |= {f"{name}_stride_{axis}": "i32" for name in ("logps", "labels", "mask") for axis in "bt"}
    for packed in (False, True):
        yield CompileCase(
            sequence.sequence_reduce_kernel,
            signature,
            {"PACKED": packed, "HAS_MASK": True, "MEAN": True, "BLOCK": sequence.BLOCK},
            num_warps=sequence.NUM_WARPS,
            note="packed" if packed else "padded",
        )


def statistics_cases() -> Iterator[CompileCase]:
    outputs = dict.fromkeys(["maximum", "total", "target", "weighted_sum", "squares_sum", "z_sum"], "*fp32:16")
    for place, (note, arguments, constants) in enumerate(row_arguments()):
        for sums in (True, False) if place == 0 else (True,):
            depth = statistics.SUMS_DEPTH if sums else logps.DEPTH
            sizes = {"SUMS": sums, "WIDTH": logps.WIDTH, "DEPTH": depth}
            kernel, text = statistics.row_statistics_kernel, note + ", sums" * sums
            yield CompileCase(kernel, arguments | outputs, constants | sizes, note=text, **ROW_WARPS)


COMPILE_CASES = [
    *linear_cases(),
    *logps_cases(),
    *logps_backward_cases(),
    *preference_cases(),
    *sequence_cases(),
    *statistics_cases(),
]
