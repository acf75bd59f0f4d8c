"""`fastpref demo`: its options."""

from __future__ import annotations

import sys
from pathlib import Path

from fastpref.demo.pairs import DEFAULT_UNIVERSITY, check_university
from fastpref.folders import Owner, claim, claim_next
from fastpref.options import Parser, given_path, whole

# Seeds feed torch and `random`; beyond this torch refuses them.
LARGEST_SEED = 2**31 - 1
FOLDER = Path("fastpref-demo")


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
    parser.add_argument(
        "--output_dir", type=given_path, help=f"new folder of the results (default: {FOLDER}, {FOLDER}-2, ...)"
    )
    parser.add_argument(
        "--seed", type=whole(0, LARGEST_SEED), default=0, help="seed of data, weights and sampling (default: 0)"
    )
    parser.add_argument("--quick", action="store_true", help="the same at a small scale, for CI; proves little")
    return parser


def main(argv: list[str]) -> int:
    """Run the demo; 0, or 2 after one line on stderr where an option does not fit."""
    try:
        options = _parser().parse_args(argv)
        from fastpref.console import Console  # after the options: what these import takes seconds
        from fastpref.demo.run import FULL, QUICK, run_demo

        university = check_university(options.university)
        owner = Owner("fastpref demo")
        claimed = claim_next(FOLDER, owner) if options.output_dir is None else claim(options.output_dir, owner)
    except (ValueError, OSError) as error:
        print(f"fastpref demo: error: {error}", file=sys.stderr)
        return 2
    with claimed:
        claimed.finish()  # from here on it writes, and never a second time
        run_demo(
            QUICK if options.quick else FULL,
            university=university,
            seed=options.seed,
            output_dir=claimed.folder,
            console=Console(out=sys.stdout),
        )
    return 0
