"""MkDocs hooks: pages from outside docs/ join the site, and the table of options is made.

In the repository docs/ links to `../benchmarks/...`; on the site these pages stand under `measured/`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from fastpref import TrainConfig

PATTERNS = ("README.md", "compile/COMPILED.md", "results/**/*", "study/small/*")
AT_THE_TOP = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Any, config: Any) -> Any:
    root = Path(config.config_file_path).parent
    for name, page in AT_THE_TOP.items():
        files.append(File.generated(config, page, abs_src_path=str(root / name)))
    found = {path for pattern in PATTERNS for path in (root / "benchmarks").glob(pattern) if path.is_file()}
    for path in sorted(found):
        page = "measured/" + path.relative_to(root / "benchmarks").as_posix()
        files.append(File.generated(config, page, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = markdown.replace("<!-- options -->", table_of_options())
    return markdown.replace("](../benchmarks/", "](measured/")


def table_of_options() -> str:
    """A line for each field of TrainConfig, in the order of `fastpref train --help`."""
    lines = ["| option | default | |", "| --- | --- | --- |"]
    for option in fields(TrainConfig):
        text = option.metadata["help"].replace("|", "\\|")
        default = "" if option.default is None else f"`{option.default}`"
        lines.append(f"| `{option.name}` | {default} | {text} |")
    return "\n".join(lines)
