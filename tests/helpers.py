"""What several test files share."""

from __future__ import annotations

import pytest

# For tests that take long in Triton's interpreter, and whose kernels other tests run by default.
slow_interpreted = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=[pytest.mark.kernels, pytest.mark.slow])], indirect=True
)
