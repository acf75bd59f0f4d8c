"""MkDocs hook: pages that lie beside what they tell of (benchmarks, changelog, contributing) join the site.

In the repository docs/ links to them as `../benchmarks/...`; on the site they stand under `measured/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

PATTERNS = ("README.md", "compile/COMPILED.md", "results/**/*", "study/*/*.md", "study/*/*.png")
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
    for name, page in AT_THE_TOP.items():
        markdown = markdown.replace(f"](../{name})", f"]({page})")
    return markdown.replace("](../benchmarks/", "](measured/")
