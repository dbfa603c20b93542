"""The card of a tokenized data set, which Hugging Face's `datasets` reads too."""

from __future__ import annotations

from typing import Any

_LOADERS = {"parquet": "parquet", "jsonl": "jsonl", "webdataset": "tar"}


def card(manifest: dict[str, Any]) -> str:
    """README.md of an output folder."""
    model, settings, summary = manifest["model"], manifest["settings"], manifest["summary"]
    ending = _LOADERS.get(settings["format"])
    head = f'---\nconfigs:\n- config_name: default\n  data_files: "data/*.{ending}"\n---\n\n' if ending else ""
    per_second = summary["codes_per_second"]
    time = f"{summary['seconds']:.1f} s of content, {per_second:.1f} codes a second, " if per_second else ""
    return f"""{head}# Codes of {model["name"]}

{summary["samples"]} samples of {model["modality"]}: {time}{summary["codes"]} codes, {summary["tokens"]} ids of
documents; {summary["skipped"]} samples were skipped (`manifest.json` names them).

Model `{model["name"]}`, sha256 `{model["sha256"]}`: {model["codebooks"]} codebooks of {model["codebook_size"]} codes.
Layout `{settings["layout"]}`, template `{settings["template"]}`; `vocabulary.json` says what each of the
{settings["ids"]} ids is, and `tokenizer/` loads with `transformers.AutoTokenizer`.
"""
