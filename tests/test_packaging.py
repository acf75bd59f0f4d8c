"""What is published: the source distribution, the wheel that is built from it, the pins, and the README's links."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NOT_PUBLISHED = (".ci/", ".gitignore")


def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, which says what should be published")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def build(source: Path, kind: str, folder: Path) -> Path:
    """The file that setuptools' `build_sdist` or `build_wheel` makes, in a process of its own."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution's folder, unpacked; built from a copy of what git tracks."""
    copy, made, unpacked = (tmp_path_factory.mktemp(name) for name in ("copy", "made", "unpacked"))
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    with tarfile.open(build(copy, "sdist", made)) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    return folder


@pytest.mark.slow
def test_the_source_distribution_holds_what_git_tracks(sdist: Path) -> None:
    wanted = {name for name in tracked() if not name.startswith(NOT_PUBLISHED)}
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert wanted - found == set()
    made = {name for name in found - wanted if not re.match(r"(fastpref\.egg-info/|PKG-INFO$|setup\.cfg$)", name)}
    assert made == set()


@pytest.mark.slow
def test_a_wheel_from_the_source_distribution_holds_every_module_and_its_texts(sdist: Path, tmp_path: Path) -> None:
    """kernels/ and benchmarks/ lie under fastpref/ there, and nothing lies outside it."""
    with zipfile.ZipFile(build(sdist, "wheel", tmp_path)) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    needed = r"(fastpref|kernels|benchmarks)/.*\.py$|fastpref/|benchmarks/study/texts/"
    modules = [name for name in tracked() if re.match(needed, name)]
    wanted = {name if name.startswith("fastpref/") else f"fastpref/{name}" for name in modules}
    assert wanted - found == set()
    assert not [name for name in found if not name.startswith("fastpref/")]


def test_every_link_and_picture_of_the_readme_works_on_a_package_page() -> None:
    """A package page has no files beside it: a link is a whole address or an anchor of the page itself."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    targets += re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def pins() -> dict[str, list[Requirement]]:
    """By name; a package has several lines where Pythons get different versions."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            found.setdefault(Requirement(line).name, []).append(Requirement(line))
    return found


@pytest.mark.parametrize("python", ["3.10.13", "3.11.7", "3.12.1", "3.13.0"])
def test_each_python_gets_one_version_of_a_package(python: str) -> None:
    """On Linux; `torch`, `triton` and `transformers` exist for each, and TRL from 3.11 on."""
    environment = {"python_full_version": python, "python_version": python.rpartition(".")[0], "sys_platform": "linux"}
    environment |= {"platform_system": "Linux", "platform_machine": "x86_64"}
    chosen = {
        name: [pin for pin in lines if pin.marker is None or pin.marker.evaluate(environment)]
        for name, lines in pins().items()
    }
    assert {name: len(lines) for name, lines in chosen.items() if len(lines) > 1} == {}
    assert all(spec.operator == "==" for lines in chosen.values() for pin in lines for spec in pin.specifier)
    for name in ("torch", "triton", "numpy", "transformers", "peft", "pytest", "ruff", "mypy"):
        assert chosen[name], f"no {name} for Python {python}"
    assert bool(chosen["trl"]) == (python != "3.10.13")


def test_compiled_md_is_of_the_triton_that_constraints_txt_names() -> None:
    (pin,) = pins()["triton"]
    page = (ROOT / "benchmarks" / "compile" / "COMPILED.md").read_text(encoding="utf-8")
    (version,) = re.findall(r"Triton (\d+\.\d+\.\d+)", page)
    assert str(pin.specifier) == f"=={version}"
