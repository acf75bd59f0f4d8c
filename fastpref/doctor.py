"""`fastpref doctor`: what is installed, which path will run, and whether it computes the truth here.

It needs torch alone: a missing extra or a broken Triton is something to report, not to stop at. `--help` does not wait
for torch, which the functions that need it import.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import fastpref
from fastpref.environment import package_version, variables
from fastpref.integrations import tested

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CORE = ("torch", "triton", "numpy")
TRAIN_EXTRA = (
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
    "tensorboard",
    "matplotlib",
)
# Errors are pooled over so many cases. The largest of one is luck: of 64 cases on a CPU 3 had a value and 3 a gradient
# over the limit below; of four pools of 16 the worst ratio was 1.10. Interpreted kernels take seconds a case.
CASES, CASES_INTERPRETED = 16, 4
# Allowed: what eager torch in float32 makes on the same inputs, times this for another order of sums, ...
ALLOWED_RATIO = 1.5
# ... or, where eager happens to be exact, two float32 roundings: of a value below 64, of a gradient below 4.
VALUE_FLOOR = 2**-18
GRAD_FLOOR = 2**-22


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 0 where the check agrees with the truth, 1 where it does not or cannot run."""
    parser = argparse.ArgumentParser(prog="fastpref doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", help="where to run the check (default: the GPU where there is one)")
    options = parser.parse_args(argv)
    import torch

    print(f"fastpref {fastpref.__version__}, Python {platform.python_version()}, {platform.platform()}")
    _section("packages", [_version(name) for name in CORE])
    _section("[train] extra", [_version(name) for name in TRAIN_EXTRA])
    _section("trainers", _trainers())
    _section("devices", _devices())
    _section(
        "environment",
        [f"{name}={value}" for name, value in variables().items()] or ["nothing set"],
    )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    lines, healthy = _check(device)
    _section(f"log-probs on {device}", lines)
    print("\nall is well" if healthy else "\nsomething is wrong: see above")
    return 0 if healthy else 1


def _section(title: str, lines: Sequence[str]) -> None:
    print(f"\n{title}")
    for line in lines:
        print(f"  {line}")


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        hint = ": pip install 'fastpref[train]'" if name in TRAIN_EXTRA else ""
        return f"{name:<13} not installed{hint}"
    return f"{name:<13} {package_version(name) or 'found, without a version'}"


def _trainers() -> list[str]:
    """Trainers that `fastpref.integrations` serves; only TRL's own code is overridden, so only its version matters."""
    lines = [f"{name:<13} {package_version(name)}" for name in ("verl", "openrlhf") if package_version(name)]
    found = package_version("trl")
    if found is None:
        return ["trl           not installed: pip install 'fastpref[trl]'", *lines]
    if tested.in_range(found, tested.TRL):
        return [f"trl           {found}, in the tested range ({tested.TRL}.*)", *lines]
    return [f"trl           {found}, outside the tested range: pip install 'trl=={tested.TRL}.*'", *lines]


def _devices() -> list[str]:
    import torch

    lines = [f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = properties.total_memory / 2**30
        lines.append(f"cuda:{index}: {properties.name}, capability {capability}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("no GPU that torch can use: the torch path runs, in tiles sized for the cache")
    return lines


def explain_path(tensor: Tensor) -> tuple[str, str]:
    """The path of an operation on `tensor` ("triton" or "torch"), and why; raises as `backend.use_triton`."""
    from fastpref import backend

    chosen = backend.backend_choice()
    path = "triton" if backend.use_triton(tensor) else "torch"
    if chosen != "auto":
        return path, f"FASTPREF_BACKEND={chosen}"
    if path == "triton":
        return path, f"a supported GPU ({tensor.device}) and Triton"
    if tensor.device.type != "cuda":
        return path, f"the tensor is on {tensor.device}, and kernels run on a GPU"
    if not backend.triton_installed():
        return path, "Triton is not installed"
    wanted = ".".join(map(str, backend.MINIMUM_CAPABILITY))
    return path, f"the GPU is older than capability {wanted}"


def _triton_problem() -> str | None:
    """Why Triton or the kernels cannot be imported, or None."""
    try:
        importlib.import_module("fastpref.kernels.logps")
    except Exception as error:  # whatever a broken installation throws is what the user must see
        return f"{type(error).__name__}: {error}"
    return None


def _check(device: str) -> tuple[list[str], bool]:
    """The path, and its log-probs and gradient against float64 on a small case of awkward sizes."""
    import torch

    from fastpref import backend

    try:
        path, reason = explain_path(torch.zeros(1, device=device))
    except Exception as error:
        return [f"{type(error).__name__}: {error}"], False
    lines = [f"path: {path} ({reason})"]
    second = torch.bfloat16
    if path == "triton" and device == "cpu":
        lines.append("interpreted (TRITON_INTERPRET=1): for tests of the kernels, far too slow for work")
        second = torch.float16  # the interpreter rounds to bfloat16 towards zero, which no GPU does
    if backend.triton_installed():
        if (problem := _triton_problem()) is not None:
            lines.append(f"the Triton kernels cannot be imported: {problem}")
        elif (problem := importlib.import_module("fastpref.interpreter").interpreter_problem()) is not None:
            lines.append(f"{problem} (this concerns tests of the kernels without a GPU, nothing else)")
    if path == "triton" and "cuda" in device and (problem := _compiler_problem()) is not None:
        lines.append(problem)
    try:
        errors = {dtype: _errors(dtype, device) for dtype in (torch.float32, second)}
    except Exception as error:
        return [*lines, f"the check did not run: {type(error).__name__}: {error}"], False
    healthy = True
    for dtype, (value, eager_value, grad, eager_grad) in errors.items():
        value_good = value <= max(ALLOWED_RATIO * eager_value, VALUE_FLOOR)
        good = value_good and grad <= max(ALLOWED_RATIO * eager_grad, GRAD_FLOOR)
        lines.append(
            f"{str(dtype).removeprefix('torch.'):<8} error against float64: "
            f"value {value:.1e} (eager {eager_value:.1e}), gradient {grad:.1e} (eager {eager_grad:.1e}): "
            f"{'right' if good else 'WRONG'}"
        )
        healthy = healthy and good
    return lines, healthy


def _errors(dtype: torch.dtype, device: str) -> tuple[float, ...]:
    """Root mean squares of each case's largest absolute error: of our value, eager's; our gradient, eager's."""
    import torch

    from fastpref import backend

    interpreted = explain_path(torch.zeros(1, device=device))[0] == "triton" and backend.interpreting()
    cases = CASES_INTERPRETED if interpreted else CASES
    each = torch.tensor([_largest_errors(dtype, device, seed) for seed in range(cases)], dtype=torch.float64)
    return tuple(each.square().mean(0).sqrt().tolist())


def _largest_errors(dtype: torch.dtype, device: str, seed: int) -> tuple[float, float, float, float]:
    """On (3, 11, 507) logits: our value, eager's; our gradient, eager's."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(3, 11, 507, generator=generator)).to(dtype)
    labels = torch.randint(507, (3, 11), generator=generator)
    labels[:, :4] = -100  # the prompts
    labels[2] = -100  # a sequence with nothing to score
    # The truth is computed on the CPU: not every device has float64.
    value, grad = _reference(logits, labels, torch.float64)
    eager_value, eager_grad = _reference(logits, labels, torch.float32)
    leaf = logits.to(device).clone().requires_grad_()
    our_value, our_grad = _run(cast("Tensor", fastpref.sequence_logps(leaf, labels.to(device))), leaf)
    return (
        _largest(our_value - value),
        _largest(eager_value - value),
        _largest(our_grad - grad),
        _largest(eager_grad - grad),
    )


def _reference(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    import torch

    # The truth's gradient stays in float64; eager's is rounded to the logits' dtype, as ours is.
    leaf = (logits.double() if dtype == torch.float64 else logits).clone().requires_grad_()
    return _run(fastpref.reference.sequence_logps(leaf, labels, dtype=dtype), leaf)


def _run(values: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Values and the leaf's gradient, on the CPU in float64; the upstream differs in every sequence."""
    import torch

    upstream = torch.tensor([0.5, -2.0, 3.0], dtype=values.dtype, device=values.device)
    (grad,) = torch.autograd.grad(values, leaf, upstream)
    return values.detach().cpu().double(), grad.cpu().double()


def _largest(difference: Tensor) -> float:
    """NaN counts as infinitely wrong: it would compare as neither larger nor smaller."""
    return difference.abs().nan_to_num(nan=float("inf")).max().item()


def _compiler_problem() -> str | None:
    """Triton builds a small C launcher at a kernel's first run."""
    if any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return None
    return "no C compiler found (gcc, clang or $CC): Triton builds its launchers with one"


if __name__ == "__main__":
    sys.exit(main())
