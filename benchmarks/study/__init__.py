"""`fastpref study`: a base model aligned by DPO, DPOP, SFT, KL-SFT and TRL's trainer, measured on held-out prompts."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = ("accelerate", "jinja2", "matplotlib", "rich", "tokenizers", "transformers")

if _missing := [name for name in NEEDED if find_spec(name) is None]:
    raise ImportError(f'the study needs {", ".join(_missing)}, which is not installed: pip install "fastpref[train]"')
