"""What `no_worse_than_eager` accepts and what it finds, on errors drawn from a known distribution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from acceptance import GROWTH, Triple, no_worse_than_eager
from torch import Tensor

SIZE, DRAWS = 200, 4
TRUTH = torch.linspace(1.0, 2.0, SIZE, dtype=torch.float64)
EAGER = 1e-5  # the size of eager's errors: far over the floors, which are in units of 2.4e-7


def pair(seed: int, change: Callable[[Tensor], Tensor], scale: float = EAGER) -> list[Triple]:
    """Errors of ours and of eager from one distribution, independent of each other; ours are then changed."""
    noise = scale * torch.randn(2, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [((TRUTH + change(noise[0])).float(), (TRUTH + noise[1]).float(), TRUTH)]


def one_element(error: float) -> Callable[[Tensor], Tensor]:
    return lambda noise: torch.cat([noise[:7], torch.tensor([error], dtype=torch.float64), noise[8:]])


def test_errors_of_the_same_distribution_pass() -> None:
    for first in range(0, 5000, 100):
        no_worse_than_eager(lambda seed, first=first: pair(first + seed, lambda noise: noise), DRAWS)


@pytest.mark.parametrize("times", [1.7, 2.0])
def test_errors_larger_than_eager_s_are_found(times: float) -> None:
    for first in range(0, 1000, 100):
        with pytest.raises(AssertionError, match="rms"):
            no_worse_than_eager(lambda seed, first=first: pair(first + seed, lambda noise: times * noise), DRAWS)


def test_one_wrong_element_of_each_draw_is_found() -> None:
    """Twice as far from the truth as the largest of eager's errors is likely to be."""
    with pytest.raises(AssertionError, match="rms of the draws' largest"):
        no_worse_than_eager(lambda seed: pair(seed, one_element(6 * EAGER)), DRAWS)


def test_one_wrong_element_of_a_single_draw_is_found() -> None:
    """Beyond three times the largest of eager's errors, in whichever draw of the first pool."""
    for place in range(DRAWS):
        with pytest.raises(AssertionError, match="largest"):
            no_worse_than_eager(
                lambda seed, place=place: pair(seed, one_element(15 * EAGER) if seed == place else lambda noise: noise),
                DRAWS,
            )


def test_one_unlucky_draw_of_many_passes_after_more_draws() -> None:
    drawn = []

    def draw(seed: int) -> list[Triple]:
        drawn.append(seed)
        return pair(seed, lambda noise: 2 * noise if seed == 0 else noise)

    no_worse_than_eager(draw, draws=1)
    assert len(drawn) in GROWTH[1:]


def test_a_bias_within_a_unit_in_the_last_place_passes_where_eager_is_exact() -> None:
    unit = torch.finfo(torch.float32).eps * 2.0
    no_worse_than_eager(lambda seed: pair(seed, lambda noise: noise + unit / 5, scale=0.0), DRAWS)
    with pytest.raises(AssertionError, match="rms"):
        no_worse_than_eager(lambda seed: pair(seed, lambda noise: noise + unit, scale=0.0), DRAWS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_found(value: float) -> None:
    with pytest.raises(AssertionError):
        no_worse_than_eager(lambda seed: pair(seed, one_element(value)), DRAWS)


def test_other_shapes_are_found() -> None:
    with pytest.raises(AssertionError):
        no_worse_than_eager(lambda seed: [(torch.ones(2), torch.ones(1), torch.ones(2).double())], DRAWS)
