"""The index of one tar: where every member of every sample begins and how long it is.

``NAME.tar.index`` holds JSON lines. The first is the header::

    {"version": 1, "bytes": 52428800, "samples": 160, "kinds": {"json+wav": 160}, "sha256": "…" or null}

`kinds` counts the samples by the extensions they have. Each further line is one sample, in the order of the tar::

    {"key": "dog/1-100032-A-0", "members": {"wav": [512, 441044], "json": [442368, 96]}}

with [offset, size] in bytes. WebDataset's rule makes a member's key: folder and base name up to its first dot; the
rest, lower case, is its extension.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import posixpath
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bridle.data.errors import ShardError
from bridle.data.files import written_aside

VERSION = 1
SUFFIX = ".index"
KEY_RULE = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")
ZERO_BLOCKS = bytes(2 * tarfile.BLOCKSIZE)
COPIED_AT_ONCE = 1 << 20
DECODE = json.JSONDecoder().decode
AGAIN = "copy or build the shard again"


@dataclass(frozen=True)
class Header:
    """First line of an index.

    bytes: size of the tar. samples: lines that follow. kinds: samples by their extensions, sorted and joined by ``+``.
    sha256: of the tar, hexadecimal; none where nobody has read the whole tar yet.
    """

    bytes: int
    samples: int
    kinds: dict[str, int]
    sha256: str | None

    def with_any_of(self, extensions: set[str]) -> int:
        """Samples that have a member of at least one of `extensions`."""
        return sum(count for kind, count in self.kinds.items() if extensions & set(kind.split("+")))

    def almost(self, extensions: set[str]) -> dict[str, int]:
        """Samples without any of `extensions` but with a longer one that ends so (``input.jpg``), by that."""
        found: dict[str, int] = {}
        for kind, count in self.kinds.items():
            parts = kind.split("+")
            longer = next((part for part in parts if "." in part and part.rpartition(".")[2] in extensions), None)
            if longer is not None and not extensions & set(parts):
                found[longer] = found.get(longer, 0) + count
        return found


@dataclass(frozen=True)
class Entry:
    """One sample: key, and (offset, size) in bytes of each member by extension."""

    key: str
    members: dict[str, tuple[int, int]]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member by WebDataset's rule; none for names that make no sample (``._x``, ``README``)."""
    match = KEY_RULE.match(name)
    return (match[1], match[2].lower()) if match else None


def scan(path: Path, *, hashed: bool = False) -> tuple[Header, list[Entry]]:
    """Reads the headers of a whole tar; with `hashed` also every byte, for the sha256.

    Raises:
        ShardError: not a plain tar, truncated, damaged, or a key that stands in two places.
    """
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        _refuse_compressed(path, stream)
        entries = _entries(path, stream, size)
        digest = _sha256(stream) if hashed else None
    kinds: dict[str, int] = {}
    for entry in entries:
        kind = "+".join(sorted(entry.members))
        kinds[kind] = kinds.get(kind, 0) + 1
    return Header(size, len(entries), kinds, digest), entries


def _entries(path: Path, stream: BinaryIO, size: int) -> list[Entry]:
    entries: list[Entry] = []
    seen: set[str] = set()
    stored: dict[str, tuple[int, int]] = {}
    links: list[tuple[Entry, str, tarfile.TarInfo]] = []
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen
                _refuse_sparse(path, member)
                if member.isreg():
                    stored[member.name] = (member.offset_data, member.size)
                named = split_name(member.name) if member.isreg() or member.islnk() or member.issym() else None
                if named is None:
                    continue
                key, extension = named
                if not entries or entries[-1].key != key:
                    if key in seen:
                        raise _duplicate(path, member.name, member.offset, f"the key '{key}' stands in two places")
                    seen.add(key)
                    entries.append(Entry(key, {}))
                if extension in entries[-1].members:
                    raise _duplicate(path, member.name, member.offset, f"two members '{extension}' of the key '{key}'")
                entries[-1].members[extension] = (member.offset_data, member.size)
                if not member.isreg():
                    links.append((entries[-1], extension, member))
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{path}: not a whole tar: {error} (file of {size} bytes); {AGAIN}") from None
    _check_end(path, stream, end, size)
    for entry, extension, member in links:
        entry.members[extension] = _linked(path, member, links, stored)
    return entries


def _refuse_sparse(path: Path, member: tarfile.TarInfo) -> None:
    if member.issparse():
        raise ShardError(
            f"{path}: member '{member.name}' at offset {member.offset} is sparse: its holes are not in the tar, so it"
            " cannot be read by offset; pack it again without --sparse"
        )


def _linked(
    path: Path,
    member: tarfile.TarInfo,
    links: list[tuple[Entry, str, tarfile.TarInfo]],
    stored: dict[str, tuple[int, int]],
) -> tuple[int, int]:
    """Offset and size of the member of the same tar that a hard or symbolic link leads to, over other links too."""
    targets = {link.name: link for _, _, link in links}
    name, at = member.name, member
    for _ in range(len(links)):
        name = (
            at.linkname if at.islnk() else posixpath.normpath(posixpath.join(posixpath.dirname(at.name), at.linkname))
        )
        if name in stored or name not in targets:
            break
        at = targets[name]
    if name not in stored:
        raise ShardError(
            f"{path}: member '{member.name}' at offset {member.offset} is a link to '{member.linkname}', which is no"
            " file in this tar; pack it again with the files themselves (tar --dereference --hard-dereference)"
        )
    return stored[name]


def _check_end(path: Path, stream: BinaryIO, end: int, size: int) -> None:
    """tarfile ends without a word at a header that is damaged or cut; only the end mark tells."""
    stream.seek(end)
    found = stream.read(len(ZERO_BLOCKS))
    if len(found) < len(ZERO_BLOCKS):
        raise ShardError(
            f"{path}: truncated: at offset {end} found {len(found)} bytes to the end of the file ({size} bytes), "
            f"expected a member or the two zero blocks that end a tar; {AGAIN}"
        )
    if found != ZERO_BLOCKS:
        raise ShardError(
            f"{path}: damaged: the 512 bytes at offset {end} are neither a valid header nor the end of a tar; {AGAIN}"
        )
    while block := stream.read(COPIED_AT_ONCE):
        if block.strip(b"\0"):
            raise ShardError(
                f"{path}: more data stands behind the end of the tar at offset {end} (were tars joined with cat?); "
                "build one tar of them, or list them as separate shards"
            )


def _duplicate(path: Path, name: str, offset: int, fault: str) -> ShardError:
    return ShardError(
        f"{path}: member '{name}' at offset {offset}: {fault}; keys end at the first dot of the base name, "
        "and the members of a sample stand next to each other: rename them or build the shard again"
    )


def _refuse_compressed(path: Path, stream: BinaryIO) -> None:
    head = stream.read(6)
    stream.seek(0)
    for magic, tool in (
        (b"\x1f\x8b", "gunzip"),
        (b"BZh", "bunzip2"),
        (b"\xfd7zXZ\0", "unxz"),
        (b"\x28\xb5\x2f\xfd", "unzstd"),
    ):
        if head.startswith(magic):
            raise ShardError(f"{path}: compressed; only plain tars can be read by offset: {tool} it first")


def _sha256(stream: BinaryIO) -> str:
    stream.seek(0)
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def write(path: Path, header: Header, entries: list[Entry], tar_mtime_ns: int | None = None) -> None:
    """Writes an index; it appears whole or not at all.

    `tar_mtime_ns`, when the tar was last written before it was scanned, becomes the index's own time of writing: while
    the two are equal, the index is this tar's. A tar that is built again has another time.

    Raises:
        ShardError: no room on the disk.
    """
    with written_aside(path) as stream:
        stream.write(_line({"version": VERSION, **dataclasses.asdict(header)}))
        for entry in entries:
            stream.write(_line({"key": entry.key, "members": entry.members}))
        if tar_mtime_ns is not None:
            stream.flush()
            os.utime(stream.fileno(), ns=(tar_mtime_ns, tar_mtime_ns))


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogateescape") + b"\n"


def parse_header(line: bytes, where: str) -> Header:
    """The first line of an index.

    Raises:
        ShardError: not an index, or of another version.
    """
    try:
        fields = json.loads(line)
        version = fields["version"]
        header = Header(int(fields["bytes"]), int(fields["samples"]), dict(fields["kinds"]), fields["sha256"])
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"{where}: not an index of a shard; delete it, and it is built again") from None
    if version != VERSION:
        raise ShardError(f"{where}: version {version}, expected {VERSION}; delete it, and it is built again")
    return header


def parse_entries(lines: bytes) -> list[Entry]:
    """Further lines of an index. Raises ValueError, KeyError, TypeError or IndexError for a damaged one."""
    text = lines.decode(errors="surrogateescape").strip("\n").replace("\n", ",")  # one call, not one for each line
    return [
        Entry(fields["key"], {extension: (int(at[0]), int(at[1])) for extension, at in dict(fields["members"]).items()})
        for fields in DECODE(f"[{text}]")
    ]


def read_header(path: Path) -> Header:
    """The header of an index file.

    Raises:
        ShardError: see `parse_header`.
        OSError: no such file, or not readable.
    """
    with path.open("rb") as stream:
        return parse_header(stream.readline(COPIED_AT_ONCE), str(path))


def read(path: Path) -> tuple[Header, list[Entry]]:
    """A whole index file.

    Raises:
        ShardError: not an index, of another version, or damaged.
        OSError: no such file, or not readable.
    """
    header_line, _, lines = path.read_bytes().partition(b"\n")
    header = parse_header(header_line, str(path))
    try:
        entries = parse_entries(lines)
    except (ValueError, KeyError, TypeError, IndexError):
        raise ShardError(f"{path}: damaged; delete it, and it is built again") from None
    if len(entries) != header.samples:
        raise ShardError(f"{path}: {len(entries)} lines for {header.samples} samples; delete it, and it is built again")
    return header, entries
