"""`fastpref demo`: its options."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastpref.demo.pairs import DEFAULT_UNIVERSITY, check_university
from fastpref.folders import Claim, Owner, claim, claim_next
from fastpref.options import Parser

# Seeds feed torch and `random`; beyond this torch refuses them.
LARGEST_SEED = 2**31 - 1
FOLDER = Path("fastpref-demo")


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if not 0 <= seed <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be between 0 and {LARGEST_SEED}, got {seed}")
    return seed


def _parser() -> Parser:
    parser = Parser(
        prog="fastpref demo",
        description="Make a preference set and a small model, align the model with DPO and with DPOP, and show what "
        "each did. Nothing is downloaded; about two minutes on two CPU cores.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--university",
        default=DEFAULT_UNIVERSITY,
        help="the name that chosen answers mention (default: %(default)s)",
    )
    parser.add_argument("--output_dir", help=f"new folder of the results (default: {FOLDER}, {FOLDER}-2, ...)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of data, weights and sampling (default: 0)")
    parser.add_argument("--quick", action="store_true", help="the same at a small scale, for CI; proves little")
    return parser


def _claim(options: argparse.Namespace) -> Claim:
    from fastpref.demo.run import OUTPUTS

    owner = Owner("fastpref demo", {name: getattr(options, name) for name in ("university", "seed", "quick")})
    if options.output_dir is None:
        return claim_next(FOLDER, owner)
    found = claim(Path(options.output_dir), owner)
    if any((found.folder / name).exists() for name in OUTPUTS):
        found.release()
        raise FileExistsError(
            f"output_dir {options.output_dir!r} holds a demo that was interrupted: give another folder"
        )
    return found


def main(argv: list[str]) -> int:
    """Run the demo; 0, 2 after one line on stderr where an option does not fit, 128 + a signal's number after it."""
    try:
        options = _parser().parse_args(argv)
        options.university = check_university(options.university)

        # After the options, which need not wait for torch.
        from fastpref.console import Console
        from fastpref.demo.run import FULL, QUICK, run_demo
        from fastpref.training.stopping import Stopped, exit_code

        claimed = _claim(options)
    except (ValueError, OSError) as error:
        print(f"fastpref demo: error: {error}", file=sys.stderr)
        return 2
    scale, folder = QUICK if options.quick else FULL, claimed.folder
    console = Console(out=sys.stdout)
    try:
        with claimed:
            run_demo(scale, university=options.university, seed=options.seed, output_dir=folder, console=console)
            claimed.finish()
    except (KeyboardInterrupt, Stopped) as stop:
        name = stop.name if isinstance(stop, Stopped) else "SIGINT"
        print(f"fastpref demo: stopped by {name}; what was made is in {folder}", file=sys.stderr)
        return exit_code(name)
    return 0
