"""Reference log-probs on disk: what is torn, flipped or of another key is never read; what is whole always is."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpref.training.checkpoints.durable import SaveError
from fastpref.training.reference.cache import CacheWriter, Record, ReferenceKey, cache_file, read_cache

KEY = ReferenceKey(
    weights="w", precision="fp32", logps="linear", reduction="sum", tokenizer="t", template="c", max_length=64
)


def record(number: int) -> Record:
    return Record(f"{number:032x}", number, (-1.5 * number - 0.1, -2.0 / (number + 1)))


def read(folder: Path, count: int = 13) -> tuple[dict[int, tuple[float, float]], list[str]]:
    lines: list[str] = []
    found = read_cache(folder, KEY, [record(n).pair for n in range(count)], say=lines.append)
    return {int(pair, 16): logps for pair, logps in found.logps.items()}, lines + found.damage


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A file of 13 records."""
    CacheWriter(tmp_path, KEY, process=0).append(record(n) for n in range(13))
    assert read(tmp_path) == ({n: record(n).logps for n in range(13)}, [])
    return cache_file(tmp_path, KEY, 0)


def test_the_file_has_the_documented_form(stored: Path) -> None:
    assert stored.name == f"reference-{KEY.digest[:16]}.0.jsonl"
    header, *lines = [json.loads(line) for line in stored.read_text().splitlines()]
    assert {**dataclasses.asdict(KEY), "format": 1, "key": KEY.digest}.items() <= header.items()
    assert [line["row"] for line in lines] == list(range(13))
    assert {"pair", "row", "ref_chosen_logps", "ref_rejected_logps", "crc"} == set(lines[0])


def test_a_file_cut_at_any_byte_keeps_its_whole_lines_and_is_completed(stored: Path) -> None:
    """A kill while the last two lines were written, at every byte of them."""
    whole = stored.read_bytes()
    begin = whole.rindex(b"\n", 0, whole.rindex(b"\n", 0, -1)) + 1
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(begin, len(whole)):
        stored.write_bytes(whole[:size])
        # Without its newline alone, a line is whole.
        expected = sum(end - 1 <= size for end in ends) - 1
        found, lines = read(stored.parent)
        assert found == {n: record(n).logps for n in range(expected)}
        torn = size not in ends and size + 1 not in ends
        assert lines == [f"reference log-probs: 1 damaged line of {stored} not used (1 cut short)"] * torn
        CacheWriter(stored.parent, KEY, process=0).append(record(n) for n in range(expected, 13))
        assert read(stored.parent)[0] == {n: record(n).logps for n in range(13)}


def test_a_flipped_bit_loses_its_line_and_changes_no_value(stored: Path) -> None:
    """200 times one bit, anywhere in the file; where it is in the first line, the file is set aside."""
    whole, draw = stored.read_bytes(), random.Random(5)
    header = whole.index(b"\n") + 1
    for _ in range(200):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        stored.write_bytes(damaged)
        found, lines = read(stored.parent)
        assert all(logps == record(n).logps for n, logps in found.items())
        if place < header:
            aside = stored.with_name(stored.name + ".damaged")
            assert (found, stored.exists()) == ({}, False)
            assert lines == [
                f"reference log-probs: the first line of {stored} is damaged; "
                f"the file is not used, and now {aside.name}"
            ]
        else:
            assert len(found) >= 11  # a newline that is gone takes two lines along
            if len(found) < 13:
                assert len(lines) == 1
            else:  # a space that JSON does not look at
                assert json.loads(damaged.splitlines()[whole.count(b"\n", 0, place)])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda line: line[: len(line) // 2] + b"\n", "1 not JSON"),
        (lambda line: b"\xff\xfe\n", "1 not JSON"),
        (lambda line: b"[1, 2]\n", "1 not JSON"),
        (lambda line: line.replace(b"-4.6", b"-4.7"), "1 with a wrong checksum"),
        (lambda line: line.replace(b"-4.6", b"NaN"), "1 with a wrong checksum"),
        (lambda line: b"{}\n" + line.replace(b'"row": 3', b'"row": "3"'), "2 with a wrong checksum"),
    ],
)
def test_a_damaged_line_is_dropped_and_counted(stored: Path, damage: Callable[[bytes], bytes], why: str) -> None:
    lines = stored.read_bytes().splitlines(keepends=True)
    lines[4] = damage(lines[4])
    stored.write_bytes(b"".join(lines))
    found, printed = read(stored.parent)
    assert found == {n: record(n).logps for n in range(13) if n != 3}
    count = "2 damaged lines" if why.startswith("2") else "1 damaged line"
    assert printed == [f"reference log-probs: {count} of {stored} not used ({why})"]


def test_what_is_not_finite_is_neither_kept_nor_used(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [(math.nan, -1.0), (-1.0, -math.inf), (-1.0, -1.0)]
    CacheWriter(stored.parent, KEY, process=1).append(Record(f"{13 + n:032x}", n, v) for n, v in enumerate(values))
    found, _ = read(stored.parent, count=16)
    assert set(found) == {*range(13), 15}
    monkeypatch.setattr("fastpref.training.reference.cache.math.isfinite", lambda value: True)
    CacheWriter(stored.parent, KEY, process=2).append([Record(f"{13:032x}", 0, (math.nan, -1.0))])
    monkeypatch.undo()
    found, lines = read(stored.parent, count=16)
    assert set(found) == {*range(13), 15}
    assert lines[0].endswith("not used (1 not a finite number)")


def test_a_record_of_another_key_is_not_taken(stored: Path) -> None:
    """Not even under the right name and header."""
    other = dataclasses.replace(KEY, weights="x")
    CacheWriter(stored.parent, other, process=0).append([Record(record(3).pair, 3, (-7.0, -7.0))])
    foreign = cache_file(stored.parent, other, 0).read_bytes().splitlines(keepends=True)[1]
    lines = stored.read_bytes().splitlines(keepends=True)
    stored.write_bytes(b"".join([*lines[:4], foreign, *lines[5:]]))
    found, _ = read(stored.parent)
    assert 3 not in found
    assert len(found) == 12


def test_several_write_and_read_one_folder_at_once(tmp_path: Path) -> None:
    """Two runs that append to one file in turn, and a third process's file."""
    writers = [CacheWriter(tmp_path, KEY, process=process) for process in (0, 0, 1)]
    for number in range(13):
        writers[number % 3].append([record(number)])
        assert read(tmp_path) == ({n: record(n).logps for n in range(number + 1)}, [])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_writer_whose_file_was_set_aside_begins_a_new_one(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, KEY, process=0)
    writer.append([record(0)])
    cache_file(tmp_path, KEY, 0).unlink()
    writer.append([record(1)])
    assert read(tmp_path) == ({1: record(1).logps}, [])


def test_a_full_disk_stops_the_pass_and_names_the_file(tmp_path: Path) -> None:
    path = cache_file(tmp_path, KEY, 0)
    try:
        path.symlink_to("/dev/full")
        path.stat()
    except OSError:
        pytest.skip("there is no /dev/full")
    with pytest.raises(SaveError, match=f"{path.name} could not be written: No space left on device"):
        CacheWriter(tmp_path, KEY, process=0).append([record(0)])
