"""What `fastpref plan` prints: what each way takes, the plan that is made and why, and the longest sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from fastpref.linear.peaks import USES, Step, Use, chunked_peak, logits_peak, plain_peak
from fastpref.linear.plan import (
    Machine,
    Plan,
    Problem,
    cost_in_products,
    keeping_pays,
    kept_dtype,
    minimum_budget,
    plan_preference,
    plan_tokens,
)

SHORTEST = 2  # a sequence of one token predicts nothing
CALLERS = ("linear_sequence_logps", "linear_preference_loss")
PLANS = ("keep", "mixed", "recompute", "two-pass", "stream")


@dataclass(frozen=True)
class Path:
    """One way at one use. `longest` is the longest sequence that fits the memory asked about, 0 where none does."""

    name: str
    products: float
    peak_bytes: int  # beyond hidden states and gradients
    longest: int | None = None
    longest_plan: str | None = None  # at that length,
    longest_budget: int | None = None  # with what is then left of the memory, as memory_budget
    plan: str | None = None
    why: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A plan of the trainable head: what it would cost, and what it asks for."""

    name: str
    cost: float | None  # in products, with the traffic that it adds; None where it does not fit the budget
    peak_bytes: int | None
    least_budget: int
    chosen_by: tuple[str, ...]


@dataclass(frozen=True)
class UseReport:
    use: Use
    held_bytes: int  # hidden states and gradients
    paths: tuple[Path, ...]


def explain(step: Step, budget: int, memory: int | None = None) -> list[UseReport]:
    """All ways at all uses. ValueError for a budget below one tile.

    `budget` is fastpref's memory_budget; `memory` is what hidden states, gradients and the rest may take together.
    """
    return [UseReport(use, step.held_bytes(use), _paths(step, use, budget, memory)) for use in USES]


def _paths(step: Step, use: Use, budget: int, memory: int | None) -> tuple[Path, ...]:
    products = 1 + USES.index(use)
    everywhere = products * step.positions / step.rows
    recomputed = products if use == "forward" else products + 1
    fixed: list[tuple[str, float, Callable[[Step, Use], int]]] = [
        ("plain", everywhere, plain_peak),
        ("chunked", recomputed, chunked_peak),
        ("sequence_logps", everywhere, logits_peak),
    ]
    found = []
    for name, count, peak in fixed:
        path = Path(name, count, peak(step, use))
        if memory is not None:
            fits = partial(_fits, peak=peak, use=use, memory=memory)
            path = replace(path, longest=_longest(step, fits))
        found.append(path)
    callers = CALLERS if use == "trainable" else CALLERS[:1]
    return (*found, *(_linear_path(caller, step, use, budget, memory) for caller in callers))


def _fits(at: Step, *, peak: Callable[[Step, Use], int], use: Use, memory: int) -> bool:
    return at.held_bytes(use) + peak(at, use) <= memory


def choose(caller: str, step: Step, use: Use, budget: int) -> Plan:
    """The plan that this function makes."""
    make = plan_preference if caller == "linear_preference_loss" else plan_tokens
    return make(step.problem(use), step.machine, budget)


def _linear_path(caller: str, step: Step, use: Use, budget: int, memory: int | None) -> Path:
    plan = choose(caller, step, use, budget)
    found = Path(caller, plan.products, plan.peak, plan=plan.describe, why=_why(caller, step, use, budget, plan))
    if memory is None:
        return found

    def left(at: Step) -> int:
        return min(budget, memory - at.held_bytes(use))

    longest = _longest(step, lambda at: minimum_budget(at.problem(use), at.machine) <= left(at))
    if longest == 0:
        return replace(found, longest=0)
    there = replace(step, length=longest)
    plan = choose(caller, there, use, left(there))
    return replace(found, longest=longest, longest_plan=plan.describe, longest_budget=left(there))


def _longest(step: Step, fits: Callable[[Step], bool]) -> int:
    """The longest sequence that fits; 0 where not even the shortest does."""
    if not fits(replace(step, length=SHORTEST)):
        return 0
    return _first(lambda length: not fits(replace(step, length=length)), above=SHORTEST) - 1


def _first(holds: Callable[[int], bool], *, above: int) -> int:
    """The least number above `above` of which it holds, by doubling and bisection."""
    low, high = above, above + 1
    while not holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _why(caller: str, step: Step, use: Use, budget: int, plan: Plan) -> str:
    problem, machine = step.problem(use), step.machine
    if plan.name == "forward":
        return "no gradient is wanted: each tile is folded into the logsumexp and forgotten"
    if plan.name == "frozen":
        return "only dh is wanted: it gathers beside the logsumexp, from the same tiles"
    cost = cost_in_products(plan, problem, machine)
    if plan.name == "stream":
        other = plan_tokens(problem, machine, budget)
        return (
            f"costs {cost:.2f} products with its traffic, {other.name} {cost_in_products(other, problem, machine):.2f}"
        )
    traffic = kept_dtype(problem.operand).itemsize * machine.balance / problem.hidden_size
    kept = f"writing and reading all tiles costs {traffic:.2f} products and saves 1"
    if plan.name == "two-pass":
        why = "the budget has no room for dh in float32: dh and dW are made in sweeps of their own"
    elif not keeping_pays(problem, machine):
        why = f"{kept}: nothing is kept"
    elif plan.name == "keep":
        why = f"{kept}, and all fit the budget"
    elif plan.name == "mixed":
        why = f"{kept}; the budget holds {plan.kept} of {plan.slices} slices, the others are computed again"
    else:
        why = f"{kept}, but the budget does not hold a single slice"
    if caller == "linear_preference_loss" and not step.streams:
        why += "; a loss of more than one argument cannot stream"
    elif caller == "linear_preference_loss":
        stream = _attempt("stream", problem, machine, budget)
        rival = "does not fit" if stream is None else f"{cost_in_products(stream, problem, machine):.2f}"
        why += f"; {plan.name} costs {cost:.2f} products with its traffic, stream {rival}"
    return why


def candidates(step: Step, budget: int) -> list[Candidate]:
    """The plans of a trainable head, each forced in turn; "mixed" is left out where everything can be kept."""
    problem, machine = step.problem("trainable"), step.machine
    chosen = {caller: choose(caller, step, "trainable", budget).name for caller in CALLERS}
    found: list[Candidate] = []
    for name in PLANS:
        plan = _attempt(name, problem, machine, budget)
        if (name == "stream" and not step.streams) or (name == "mixed" and plan is not None and plan.name == "keep"):
            continue
        found.append(
            Candidate(
                name=name,
                cost=None if plan is None else cost_in_products(plan, problem, machine),
                peak_bytes=None if plan is None else plan.peak,
                least_budget=_least_budget(name, problem, machine),
                chosen_by=tuple(caller for caller in CALLERS if chosen[caller] == name),
            )
        )
    return found


def _attempt(name: str, problem: Problem, machine: Machine, budget: int) -> Plan | None:
    """The plan of that name, or None where it does not fit; for "mixed" also "keep", of which it is the start."""
    try:
        plan = plan_preference(problem, machine, budget, force=name)
    except ValueError:  # how the planner says that a plan does not fit
        return None
    return plan if plan.name == name or (name, plan.name) == ("mixed", "keep") else None


def _least_budget(name: str, problem: Problem, machine: Machine) -> int:
    """The smallest memory_budget under which this plan fits."""
    return _first(lambda budget: _attempt(name, problem, machine, budget) is not None, above=0)
