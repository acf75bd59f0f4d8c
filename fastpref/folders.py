"""The one way to claim a folder for what a command writes; nothing that the command did not write is replaced.

A claimed folder holds a marker, `.fastpref`: the command, what makes two of its runs the same (their identity),
whether the run has finished, and notes. The marker is locked while the claim is held, at most until the process ends.
Every refusal is a FolderError of one line, and nothing has been changed then.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARKER = ".fastpref"
RUNS = "runs"  # the one parent that is made where it is missing: default folders lie in it
LOCKED_BYTE = 1 << 30  # Windows locks bytes, and lets nobody read them: one beyond the marker's text
SHOWN = 3  # names of files in a message
MARK_BYTES = 4096


class FolderError(FileExistsError):
    """A folder or file that a command may not write to; one line with the reason and the way out."""


@dataclass(frozen=True)
class Owner:
    """Who wants a folder, and what for."""

    command: str  # as its user writes it: "fastpref train"
    identity: Mapping[str, Any] = field(default_factory=dict)  # JSON values by name; with others it is another run
    resume: bool = False  # go on with a run of this identity, finished or not; else only an unfinished one starts again
    inputs: Mapping[str, str | None] = field(default_factory=dict)  # paths (or hub names) that are read, by option
    besides: Sequence[str] = ()  # glob patterns of what may lie in the folder already, and stays as it is


class Claim(AbstractContextManager["Claim"]):
    """A folder that is this process's own until `release`, or the end of a `with` block."""

    def __init__(self, folder: Path, owner: Owner, made: Sequence[Path]) -> None:
        self.folder, self._made, self._marker = folder, made, folder / MARKER
        self._before = set(os.listdir(folder))
        self._file = os.open(self._marker, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._close = weakref.finalize(self, os.close, self._file)
        try:
            _lock(self._file, folder, owner)
            if not (self._marker.exists() and os.path.samestat(os.fstat(self._file), self._marker.stat())):
                raise _busy(folder, owner)  # another process has given the folder up just now
            fresh = _check_content(folder, owner)
        except BaseException:
            self._close()
            raise
        self.notes: dict[str, Any] = {} if fresh else _read(folder)
        if fresh:
            self.note(command=owner.command, identity=dict(owner.identity), finished=False)

    def note(self, **notes: Any) -> None:
        """Keep JSON values in the marker, for the `notes` of the next claim; one call writes them all."""
        self.notes |= notes
        text = (json.dumps(self.notes, ensure_ascii=False) + "\n").encode()
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, text.ljust(os.fstat(self._file).st_size))  # blanks over the rest of a longer text
        os.fsync(self._file)

    def finish(self) -> None:
        """From now on only `resume` may go on in the folder: the run has ended."""
        self.note(finished=True)

    def release(self) -> None:
        """Let others have the folder. A claim under which nothing was written leaves nothing."""
        with suppress(OSError):  # gone already; or in use by now; and Windows unlinks no open file
            if self._close.alive and set(os.listdir(self.folder)) - self._before == {MARKER}:
                self._marker.unlink()
                for folder in reversed(self._made):
                    folder.rmdir()
        self._close()

    def __exit__(self, *error: object) -> None:
        self.release()


def check(folder: Path, owner: Owner) -> None:
    """Raise what `claim` would, and change nothing."""
    with _one_line(folder):
        place = _check_place(folder)
        if place != folder:
            try_folder(place)
        _check_content(folder, owner)
        if (folder / MARKER).exists():
            file = os.open(folder / MARKER, os.O_RDWR)
            try:
                _lock(file, folder, owner)
            finally:
                os.close(file)


def claim(folder: Path, owner: Owner) -> Claim:
    """Make the folder, or take one that is empty or holds this owner's own run.

    Raises:
        FolderError: it is a file, read-only, in use, the folder of an input, or holds anything else; or its parent is
            missing.
    """
    check(folder, owner)
    with _one_line(folder):
        made = [path for path in (folder.parent, folder) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        return Claim(folder, owner, made)


def claim_next(base: Path, owner: Owner) -> Claim:
    """A new folder: `base`, or `base-2`, `base-3` and so on. Processes that ask at the same time get different ones."""
    with _one_line(base):
        _check_place(next_folder(base))
        made = [path for path in (base.parent,) if not path.exists()]
        base.parent.mkdir(exist_ok=True)
        while True:
            folder = next_folder(base)
            with suppress(FileExistsError):  # another process was faster
                folder.mkdir()
                break
        return Claim(folder, owner, [*made, folder])


def next_folder(base: Path) -> Path:
    """The folder that `claim_next` would make now."""
    names = itertools.chain([base.name], (f"{base.name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in map(base.with_name, names) if not os.path.lexists(folder))


def claimed(base: Path, command: str) -> list[Path]:
    """The folders of `base`'s series that hold a run of the command."""
    name = re.compile(re.escape(base.name) + r"(-\d+)?")
    found = [path.parent for path in base.parent.glob(f"*/{MARKER}") if name.fullmatch(path.parent.name)]
    return [folder for folder in found if belongs_to(folder, command)]


def belongs_to(folder: Path, command: str) -> bool:
    """Whether the folder's marker is of a run of the command."""
    return _read(folder, damaged={}).get("command") == command


def check_file(path: Path, *, mark: str, option: str) -> None:
    """Raise FolderError where a single output file cannot be written, or is there and was not written by its writer.

    `mark` stands in the first MARK_BYTES of every file of this writer.
    """
    with _one_line(path, option):
        if not path.exists():
            _check_place(path, option)
            return
        if path.is_dir():
            raise FolderError(f"{option} {str(path)!r} is a folder: give a file")
        with path.open("rb") as file:
            if mark.encode() not in file.read(MARK_BYTES):
                raise FolderError(
                    f"{option} {str(path)!r} is there already, and this command did not write it: give another name"
                )
        if not os.access(path, os.W_OK):
            raise FolderError(f"{option} {str(path)!r} is read-only: give another name")


@contextmanager
def _one_line(path: Path, option: str = "output_dir") -> Iterator[None]:
    """What the system says against a path, as a FolderError."""
    try:
        yield
    except FolderError:
        raise
    except OSError as error:
        raise FolderError(f"{option} {str(path)!r} cannot be used: {error.strerror}; give another one") from error


def _check_place(path: Path, option: str = "output_dir") -> Path:
    """Whether a folder is there and can be written to, or a folder or file can be made: in the folder given back."""
    start, place = f"{option} {str(path)!r}", path
    if not os.path.lexists(path):
        if str(path).startswith("~"):  # nobody means a folder of that name, and a mkdir or rm would take it for home
            raise FolderError(f"{start} begins with '~', which only a shell replaces by a home folder: write that out")
        place = path.absolute().parent
        if place.name == RUNS and place.parent.resolve() == Path.cwd() and not os.path.lexists(place):
            place = place.parent
        existing = next(parent for parent in (place, *place.parents) if os.path.lexists(parent))
        if not existing.is_dir():
            raise FolderError(f"{start}: {str(existing)!r} is no folder: give another one")
        if existing != place:
            parent = str(path.parent)
            raise FolderError(f"{start}: there is no folder {parent!r}: `mkdir -p {shlex.quote(parent)}` makes it")
    elif not path.is_dir():
        raise FolderError(f"{start} is {'a file' if path.exists() else 'a link to nothing'}: give a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise FolderError(f"{start}: {str(place)!r} is read-only: give another one")
    return place


def try_folder(place: Path) -> None:
    """OSError where no folder can be made in `place`, whatever its permissions say (those of /proc to root)."""
    os.rmdir(tempfile.mkdtemp(prefix=".fastpref-", dir=place))


def _check_content(folder: Path, owner: Owner) -> bool:
    """Whether nothing has been written there yet, beside a marker and what may lie there."""
    start, here = f"output_dir {str(folder)!r}", folder.resolve()
    for option, source in owner.inputs.items():
        path = Path(source or "")
        if source and path.exists() and here in (path.resolve(), *path.resolve().parents):
            relation = "is the folder of" if here == path.resolve() else "holds"
            raise FolderError(f"{start} {relation} {option} {source!r}, which is read: give another folder")
    paths = folder.iterdir() if folder.exists() else ()
    names = sorted(path.name for path in paths if not any(map(path.match, (MARKER, *owner.besides))))
    if not names:
        return True
    there = _read(folder)
    if not there:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        what = f"{', '.join(names[:SHOWN])}{more}"
        raise FolderError(f"{start} holds {what}, which {owner.command} did not write: give another folder")
    if there.get("command") != owner.command:
        raise FolderError(f"{start} is a folder of {there.get('command')}: give another one")
    if there.get("finished") and not owner.resume:
        raise FolderError(f"{start} holds an earlier run of {owner.command}: give another folder")
    earlier, wanted = there.get("identity", {}), json.loads(json.dumps(dict(owner.identity)))
    differing = [
        f"{name} {earlier.get(name)!r} (asked for: {value!r})"
        for name, value in wanted.items()
        if earlier.get(name) != value
    ]
    if differing:
        what = f"a run of {owner.command} with {', '.join(differing)}"
        raise FolderError(f"{start} holds {what}: give another folder")
    return False


def _read(folder: Path, *, damaged: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the marker says; nothing where there is none, or a kill came before its first text."""
    marker = folder / MARKER
    text = marker.read_text(encoding="utf-8", errors="replace") if marker.exists() else ""
    try:
        return dict(json.loads(text)) if text.strip() else {}
    except (ValueError, TypeError):
        if damaged is not None:
            return damaged
        raise FolderError(f"{marker}, which says whose folder it is, is damaged: give another folder") from None


def _lock(file: int, folder: Path, owner: Owner) -> None:
    """Until the file is closed."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _busy(folder, owner) from None
    except OSError as error:  # a file system without locks
        text = f"output_dir {str(folder)!r} cannot be locked ({error.strerror}): see that no other run writes to it"
        warnings.warn(text, stacklevel=2)


def _busy(folder: Path, owner: Owner) -> FolderError:
    what = f"output_dir {str(folder)!r} is in use by another {owner.command}"
    return FolderError(f"{what}: wait for its end, or give another folder")
