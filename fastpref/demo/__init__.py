"""`fastpref demo`: from nothing to a base model aligned with DPO and with DPOP, and what each did to it."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = ("accelerate", "matplotlib", "rich", "tokenizers", "transformers")

if _missing := [name for name in NEEDED if find_spec(name) is None]:
    raise ImportError(f'the demo needs {", ".join(_missing)}, which is not installed: pip install "fastpref[train]"')
