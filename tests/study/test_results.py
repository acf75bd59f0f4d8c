"""The committed studies: the page that stands beside their results is what the code makes of these."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the study needs fastpref[train]")
pytest.importorskip("rich", reason="the study needs fastpref[train]")
pytest.importorskip("matplotlib", reason="the study needs fastpref[train]")

from fastpref.benchmarks.study.reading import Study
from fastpref.benchmarks.study.report import markdown
from fastpref.benchmarks.study.settings import METHODS, SIZES

FOLDER = Path(__file__).parents[2] / "benchmarks" / "study"


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in FOLDER.glob("*/results.json")), ids=lambda folder: folder.name
)
def test_a_committed_page_is_made_of_its_results(folder: Path) -> None:
    """`fastpref study --report benchmarks/study/SIZE` writes it anew after a change of the code."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    pictures = {path.name for path in folder.glob("*.png")}
    assert markdown(Study(results), pictures) == (folder / "README.md").read_text(encoding="utf-8")
    assert results["size"] == folder.name
    assert tuple(results["seeds"]) == SIZES[folder.name].seeds
    assert tuple(results["methods"]) == METHODS
