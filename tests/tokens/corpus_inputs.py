"""Tiny models, and shards of small real files, for tests of bulk work."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from untrained import save_untrained

from bridle.config import load_recipe
from bridle.data.shards import open_shards
from bridle.modalities import modality_class
from bridle.tokens.bulk import VOCABULARY

CLIPS = {"audio": {"seconds": 1.0}, "image": {"size": [32, 32]}, "video": {"size": [32, 32], "frames": 4}}
QUANTIZER = {"codebooks": 3, "codebook_size": 32, "dim": 16}


def write_model(folder: Path, modality: str, seed: int = 0) -> Path:
    """An untrained model of three codebooks of 32 codes; another seed gives other codes."""
    changes = [f"model.quantizer.{name}={value}" for name, value in QUANTIZER.items()]
    recipe = load_recipe(f"{modality}-mini", [*changes, "model.encoder.depth=1"])
    recipe = recipe.model_copy(update={"clip": CLIPS[modality]})
    return save_untrained(folder, recipe, f"{modality}-tiny", seed)


def hashes(out: Path) -> dict[str, str]:
    """Of everything that must not depend on who did it; not of what a killed writer left, which goes after a while."""
    files = [*(out / "data").glob("[!.]*"), out / "manifest.json", out / "job.json", out / VOCABULARY]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sample_media(modality: str, count: int) -> list[tuple[str, bytes]]:
    """Extension and content of the first `count` files of the built-in sample."""
    shards = open_shards([f"builtin:{modality}-heldout"], extensions=modality_class(modality).extensions)
    found = [shards.read(i % len(shards)) for i in range(count)]
    return [(sample.extension, sample.data) for sample in found]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A plain tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_tokenizer(folder: Path) -> Path:
    """A byte-level text tokenizer, trained on two lines, as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(["a sound of a dog", "text of a sound"], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_shards(
    folder: Path, modality: str, counts: Iterable[int], faults: Mapping[int, bytes] | None = None
) -> list[Path]:
    """Shards of so many samples each, with KEY.json, KEY.txt and a member of bytes.

    faults: media that stand in for the sample's own, by its number.
    """
    counts = list(counts)
    media = sample_media(modality, sum(counts))
    paths, number = [], 0
    for shard, count in enumerate(counts):
        members: list[tuple[str, bytes]] = []
        for _ in range(count):
            extension, data = media[number]
            key = f"k{number:03d}"
            about = {"label": f"l{number % 3}", "caption": f"sound {number}"}
            members += [
                (f"{key}.{extension}", (faults or {}).get(number, data)),
                (f"{key}.json", json.dumps(about).encode()),
                (f"{key}.txt", f"text of {number}".encode()),
                (f"{key}.raw", bytes([255, number % 256])),
            ]
            number += 1
        paths.append(write_tar(folder / f"s{shard}.tar", members))
    return paths
