"""Files and folders that appear whole or not at all, that outlive a kill and a power cut, and that show damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK = 1 << 24
# Names of what is not (or no longer) there: dot, name, ending. Nothing that reads a run looks at them, and nobody else
# gives such a name to a file: `sweep` deletes what it finds.
NEW, OLD, GONE = ".fastpref-new", ".fastpref-old", ".fastpref-gone"
# What writing raises where it fails: torch's zip writer turns an OSError into a RuntimeError.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SaveError(RuntimeError):
    """A file of the run could not be written; the message names it, the reason and the room on the disk."""


@contextmanager
def writing(
    path: Path, *, errors: tuple[type[Exception], ...] = (OSError,), needed: int | None = None
) -> Iterator[None]:
    """Turn what a failing write of `path` raises into a SaveError; without `needed` bytes of room, before it starts."""
    try:
        if needed is not None and needed > free_bytes(path.parent):
            raise OSError("there is too little room")
        yield
    except SaveError:
        raise
    except errors as error:
        raise SaveError(f"{path} could not be written: {_reason(error)}. {_room(path.parent, needed)}") from error


@contextmanager
def full_disk_noticed(folder: Path) -> Iterator[None]:
    """Turn what any write in the run folder raises on a full disk into a SaveError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        name = error.filename or f"a file in {folder}"
        raise SaveError(f"{name} could not be written: {_reason(error)}. {_room(folder, None)}") from error


def free_bytes(folder: Path) -> int:
    """Of the disk that `folder` is on, or would be if somebody had not deleted it."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _room(folder: Path, needed: int | None) -> str:
    needs = "" if needed is None else f"It needs about {needed / 2**20:,.1f} MiB, and "
    return f"{needs}{free_bytes(folder) / 2**20:,.1f} MiB are free there"


def _reason(error: BaseException) -> str:
    """The system's own words for it, which torch's writer hides behind its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `folder`, in the place of an earlier one, when the block ends.

    Then its manifest is written and everything is on the disk before the name is. If the block raises, nothing is left.
    """
    temporary = _hidden(folder, NEW)
    _delete(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        write_manifest(temporary)
        _sync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    # A kill between the two renames leaves the old one, which `sweep` puts back.
    old = _hidden(folder, OLD)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    _sync_folder(folder.parent)
    if old.exists():
        remove_folder(old)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A hidden file to write, which replaces `path` when the block ends; if that raises, nothing is left."""
    temporary = _hidden(path, NEW)
    try:
        yield temporary
        _sync_file(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    _sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that at no moment half of it stands under its name."""
    gone = folder.with_name(folder.name.removesuffix(OLD) + GONE) if folder.name[0] == "." else _hidden(folder, GONE)
    _delete(gone)
    os.rename(folder, gone)
    _sync_folder(folder.parent)
    shutil.rmtree(gone)


def sweep(parent: Path) -> None:
    """Clear away what a killed run left half written or half deleted, and put back what it was about to replace."""
    for old in parent.glob(f".*{OLD}"):
        folder = old.with_name(old.name[1:].removesuffix(OLD))
        if folder.exists():
            remove_folder(old)
        else:
            os.rename(old, folder)
    for ending in (NEW, GONE):
        for left in parent.glob(f".*{ending}"):
            _delete(left)


def write_manifest(folder: Path) -> None:
    """Sizes and checksums of all files in `folder`, as they can be read back now."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "crc32": _crc(path)} for path in paths}
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What keeps `folder` from being as it was written, naming the file; None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["size"], entry["crc32"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST} has format {manifest.get('format')!r}, and this version reads {FORMAT}"
    for name, (size, _) in files.items():  # of all files first: that takes no time
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    for name, (_, crc) in files.items():
        try:
            same = _crc(folder / name) == crc
        except OSError as error:  # a bad sector
            return f"{name} cannot be read ({error.strerror})"
        if not same:
            return f"{name} has changed since it was written (its checksum is another)"
    return None


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}{ending}")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _crc(path: Path) -> str:
    # CRC-32 finds damage, which is all that is asked, at several times the speed of a cryptographic hash.
    crc = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
        else:
            _sync_file(path)
    _sync_folder(folder)


def _sync_file(path: Path) -> None:
    with path.open("r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # has no such thing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
