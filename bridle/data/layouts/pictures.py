"""ImageNet's layouts: a folder for each label, or a flat folder and a file of labels."""

from __future__ import annotations

import re
from pathlib import Path

from bridle.data.errors import ShardError
from bridle.data.layouts.common import IMAGE, Plan, RawDataSet, extension, files, split_folder

WNID = re.compile(r"n\d{8}")
HEADERS = {"imageid", "image", "filename", "file", "name"}


def imagefolder(source: RawDataSet) -> Plan:
    """``LABEL/*.JPEG`` (also deeper), or with a table of labels any tree of images, such as ImageNet's flat ``val``."""
    root = split_folder(source)
    if root is None:
        raise ShardError(f"{source.folder}: no folder of split '{source.split}' in it; leave --split out or name it")
    found = Plan()
    images = []
    for path in files(root, besides=source.table):
        if extension(path) in IMAGE:
            images.append(path)
        else:
            found.leave_out(path)
    if source.table is not None:
        _labelled_by(Labels(source.table), root, images, found)
        return found
    flat = [path for path in images if path.parent == root]
    if flat and len(flat) == len(images):
        fix = "name their labels with --table FILE (see docs/data.md), or take --kind folder to go without"
        raise ShardError(f"{root}: its {len(flat)} images, such as {flat[0].name}, stand in no label's folder; {fix}")
    found.ignored += len(flat)
    for path in images:
        if path.parent != root:
            relative = path.relative_to(root)
            about = {"label": relative.parts[0], "source": relative.as_posix()}
            found.add(relative.with_suffix("").as_posix(), path, about)
    found.group_by_folder()
    return found


def _labelled_by(labels: Labels, root: Path, images: list[Path], found: Plan) -> None:
    for path in images:
        label = labels.take(path)
        if label is None:
            found.leave_out(path)
            continue
        relative = path.relative_to(root)
        found.add(relative.with_suffix("").as_posix(), path, {"label": label, "source": relative.as_posix()})
    found.missing += labels.untaken()


class Labels:
    """Labels of images from a file, by name or by number.

    Each line is ``NAME LABEL`` (separated by a comma or white space; the extension of NAME may be there or not), or all
    lines are just ``LABEL``, line n for the image whose name ends with the number n. Where the part behind NAME holds a
    WordNet id (``n01440764``), that is the label, else all of it.

    Raises:
        ShardError: the file cannot be read, or is neither.
    """

    def __init__(self, table: Path) -> None:
        try:
            lines = table.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise ShardError(f"{table}: {error.strerror}; name the file of labels with --table") from None
        except UnicodeDecodeError as error:
            raise ShardError(f"{table}: not a text in UTF-8: {error}") from None
        split = [re.split(r"[\s,]+", line.strip(), maxsplit=1) for line in lines if line.strip()]
        if split and split[0][0].lower() in HEADERS:
            del split[0]
        if not split:
            raise ShardError(f"{table}: holds no labels; expected lines 'NAME LABEL' or 'LABEL'")
        self.numbered = all(len(fields) == 1 for fields in split)
        if not self.numbered and any(len(fields) == 1 for fields in split):
            odd = next(fields[0] for fields in split if len(fields) == 1)
            raise ShardError(f"{table}: some lines are 'NAME LABEL', but '{odd}' stands alone; repair the file")
        self._left = (
            {str(number): fields[0] for number, fields in enumerate(split, start=1)}
            if self.numbered
            else {_stem(name): _label(rest) for name, rest in split}
        )
        self._taken: set[str] = set()

    def take(self, path: Path) -> str | None:
        """The label of an image; none if it has none."""
        name = path.stem
        if self.numbered:
            digits = re.search(r"\d+$", name)
            name = str(int(digits[0])) if digits else ""
        self._taken.add(name)
        return self._left.get(name)

    def untaken(self) -> list[str]:
        """What the file labels and nobody asked for."""
        return [f"line {name}" if self.numbered else name for name in self._left if name not in self._taken]


def _stem(name: str) -> str:
    path = Path(name)
    return path.stem if extension(path) in IMAGE else path.name


def _label(rest: str) -> str:
    wnid = WNID.search(rest)
    return wnid[0] if wnid else rest.strip()
