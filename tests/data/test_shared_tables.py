"""Places of samples that all loaders of a machine share: found once, right or not used."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from shard_inputs import write_tar

from bridle.data.cache import ShardCache
from bridle.data.errors import ShardError
from bridle.data.listing import listing_path, read_listing, write_listing
from bridle.data.shards import ShardSet, open_mixture, open_shards


@pytest.fixture
def patterns(tmp_path: Path) -> list[str]:
    for number, count in enumerate((3, 5)):
        members = [(f"{i}.{end}", os.urandom(10 * i + 1)) for i in range(count) for end in ("wav", "cls")]
        write_tar(tmp_path / f"s{number}.tar", members)
    return [str(tmp_path / "*.tar")]


def contents(shards: ShardSet) -> list[tuple[str, bytes]]:
    return [(shards.read(i).key, shards.data(i)) for i in range(len(shards))]


def tables(own_cache: Path) -> Path:
    (path,) = (own_cache / "tables").iterdir()
    return path


def without_their_lines(folder: Path) -> None:
    """Indexes of the same size and time whose lines say nothing: whoever reads them fails."""
    for path in folder.glob("*.tar.index"):
        about, (header, lines) = path.stat(), path.read_bytes().split(b"\n", 1)
        path.write_bytes(header + b"\n" + b"\n".join(b"!" * len(line) for line in lines.split(b"\n")))
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_what_one_process_found_others_find_in_the_file(patterns: list[str], tmp_path: Path, own_cache: Path) -> None:
    first = open_shards(patterns, extensions=["wav"])
    found = [first.data(i) for i in range(len(first))]
    without_their_lines(tmp_path)
    second = pickle.loads(pickle.dumps(open_shards(patterns, extensions=["wav"])))
    assert [second.data(i) for i in range(len(second))] == found
    with pytest.raises(ShardError, match="damaged"):  # keys stay in the index
        second.read(0)


def test_a_damaged_file_is_written_again(patterns: list[str], own_cache: Path) -> None:
    expected = contents(open_shards(patterns, extensions=["wav"]))
    path = tables(own_cache)
    good = np.fromfile(path, dtype="<i8")
    for place in range(0, len(good), 7):
        bad = good.copy()
        bad[place] += 512
        bad.tofile(path)
        assert contents(open_shards(patterns, extensions=["wav"])) == expected
        assert (np.fromfile(path, dtype="<i8") == good).all()


def test_a_shard_that_was_built_again_is_read_anew(patterns: list[str], tmp_path: Path, own_cache: Path) -> None:
    contents(open_shards(patterns, extensions=["wav"]))
    (tmp_path / "s0.tar.index").unlink()
    write_tar(tmp_path / "s0.tar", [(f"{i}.wav", b"new" * i) for i in range(3)])
    assert contents(open_shards(patterns, extensions=["wav"]))[:3] == [("0", b""), ("1", b"new"), ("2", b"newnew")]


def test_without_a_cache_that_can_be_written_each_keeps_its_own(patterns: list[str], tmp_path: Path) -> None:
    expected = contents(open_shards(patterns, extensions=["wav"]))
    (tmp_path / "file").write_bytes(b"")
    assert contents(open_shards(patterns, extensions=["wav"], cache=str(tmp_path / "file"))) == expected


def test_a_listing_gives_the_set_that_was_opened(patterns: list[str], tmp_path: Path) -> None:
    write_tar(tmp_path / "more" / "m.tar", [("k.wav", b"more")])
    mixture = [(patterns, 1.0), ([str(tmp_path / "more" / "*.tar")], 0.1)]
    opened, cache = open_mixture(mixture, extensions=["wav"]), ShardCache()
    path = listing_path(cache, mixture, ["wav"])
    write_listing(opened, path)
    read = read_listing(path, cache)
    assert (read.shards, read.sources, read.extensions) == (opened.shards, opened.sources, opened.extensions)
    assert contents(read) == contents(opened)
    path.write_text("{")
    with pytest.raises(ShardError, match="delete it"):
        read_listing(path, cache)


def test_relative_patterns_of_two_folders_have_two_listings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for name in ("one", "two"):
        write_tar(tmp_path / name / "s.tar", [(f"{name}.wav", name.encode())])
        monkeypatch.chdir(tmp_path / name)
        paths.append(listing_path(ShardCache(tmp_path / "cache"), [(["*.tar"], 1.0)], ["wav"]))
        write_listing(open_mixture([(["*.tar"], 1.0)], extensions=["wav"]), paths[-1])
    assert contents(read_listing(paths[0], ShardCache(tmp_path / "cache"))) == [("one", b"one")]
