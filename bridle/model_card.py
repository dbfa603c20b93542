"""README.md of a model folder, which is its card on the Hugging Face hub too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PLAIN = ("iteration", "steps", "clips", "run")
OF_A_CODEBOOK = {
    "accuracy": "accuracy", "position_accuracy": "by position alone", "codebook_majority": "most frequent code",
    "codebook_usage": "CUR", "codebook_ecu": "ECU", "codebook_perplexity": "perplexity",
}  # fmt: skip
"""Figures of each codebook, and what they are called in the table."""
ABOUT = (
    "Accuracy: of the codes of hidden patches; it has to clear what the next two columns score: who knows a patch's "
    "position only, and who always names the most frequent code. CUR: share of the codes that occur; ECU: 1 where all "
    "occur equally often. Both are of the held-out clips, few of which cannot fill many codes."
)


def model_card(config: Mapping[str, Any]) -> str:
    """The card of a model; config: `ModelConfig` as plain data. `trained` may hold `note`, `data`, `figures`, `probe`,
    the last two as `bridle.evaluation.card_figures` makes them."""
    quantizer, trained = config["quantizer"], config["trained"]
    kind = "a random projection, from the cold start" if config["tokenizer"] == "cold_start" else "learned"
    parts = [
        _head(config),
        f"# {config['name']}",
        f"A BRIDLE model for {config['modality']}: an encoder of width {config['encoder']['width']} and depth "
        f"{config['encoder']['depth']}, and a residual-quantization tokenizer with {quantizer['codebooks']} codebooks "
        f"of {quantizer['codebook_size']} codes of width {quantizer['dim']} ({kind}).",
        trained.get("note", ""),
        _USE,
        f"Trained with bridle {config['bridle']}: {_trained(trained)}.",
        _data(trained.get("data")),
        _figures(trained.get("figures") or {}),
        _probe(trained.get("probe") or {}),
        "## Licence",
        f"Weights: {config['licence']}."
        if config.get("licence")
        else "None was recorded; ask who published the model.",
        _CITE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_USE = """```python
import bridle

model = bridle.load("path/to/this/folder")  # or "owner/name", with revision="…"
stream = model.tokenize("file")  # stream.codes: [positions, codebooks]
```

`import bridle.hf` makes `transformers.AutoModel.from_pretrained` load it as well."""
_CITE = """## How to cite

Name this model and its sha256 (`bridle.load(…).sha256`), the version of bridle, and the paper:
Nguyen et al., *BRIDLE: Generalized Self-supervised Learning with Quantization*, 2025."""


def _head(config: Mapping[str, Any]) -> str:
    lines = ["library_name: bridle", f"tags: [bridle, {config['modality']}, tokenizer, feature-extraction]"]
    if config.get("licence"):
        lines.append(f"license: {config['licence']}")
    return "\n".join(["---", *lines, "---"])


def _trained(trained: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {trained[key]}" for key in PLAIN if key in trained) or "nothing recorded"


def _data(names: Any) -> str:
    return "Data: " + ", ".join(f"`{name}`" for name in names) + "." if names else ""


def _figures(figures: Mapping[str, Any]) -> str:
    """A table with a line per codebook, then what the model has one figure of."""
    if not figures:
        return ""
    columns = {title: figures[key] for key, title in OF_A_CODEBOOK.items() if isinstance(figures.get(key), list)}
    lines = [[str(number + 1), *cells] for number, cells in enumerate(zip(*columns.values(), strict=True))]
    single = [[name, value] for name, value in figures.items() if not isinstance(value, list) and name != "verdict"]
    parts = [
        "## Held-out figures",
        f"{figures['verdict']}." if "verdict" in figures else "",
        _table(["codebook", *columns], lines) if lines else "",
        ABOUT if lines else "",
        _table(["figure", "value"], single) if single else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _probe(probe: Mapping[str, Any]) -> str:
    if not probe:
        return ""
    scores = probe["scores"]
    readers = list(next(iter(scores.values()), {}))
    lines = [[name, *(by_reader[reader] for reader in readers)] for name, by_reader in scores.items()]
    told = "\n".join(f"- {line}" for line in probe["verdicts"])
    parts = ["## Probes", f"{probe['about']}.", _table(["feature", *readers], lines), told]
    return "\n\n".join(part for part in parts if part)


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *([_number(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
