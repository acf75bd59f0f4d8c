"""The record of what a result was made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastpref.environment import VARIABLES, record


def test_a_record_is_json_and_names_the_packages_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREF_VALIDATE", "1")
    monkeypatch.setenv("SECRET", "1")
    found = record(("numpy", "no-such-package"))
    assert json.loads(json.dumps(found)) == found
    assert list(found["versions"]) == ["numpy", "no-such-package"]
    assert found["versions"]["no-such-package"] is None
    assert found["threads"] == torch.get_num_threads()
    assert found["variables"]["FASTPREF_VALIDATE"] == "1"
    assert set(found["variables"]) <= set(VARIABLES)


def test_a_folder_outside_a_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record((), folder=tmp_path)["commit"] is None
