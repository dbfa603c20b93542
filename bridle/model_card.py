"""README.md of a model folder, which is its card on the Hugging Face hub too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN = ("iteration", "steps", "clips", "run")


def model_card(config: Mapping[str, Any]) -> str:
    """The card of a model; config: `ModelConfig` as plain data. `trained` may hold `data`, `figures` and `probe`."""
    quantizer, trained = config["quantizer"], config["trained"]
    kind = "a random projection, from the cold start" if config["tokenizer"] == "cold_start" else "learned"
    parts = [
        _head(config),
        f"# {config['name']}",
        f"A BRIDLE model for {config['modality']}: an encoder of width {config['encoder']['width']} and depth "
        f"{config['encoder']['depth']}, and a residual-quantization tokenizer with {quantizer['codebooks']} codebooks "
        f"of {quantizer['codebook_size']} codes of width {quantizer['dim']} ({kind}).",
        _USE,
        f"Trained with bridle {config['bridle']}: {_trained(trained)}.",
        _data(trained.get("data")),
        _table("Held-out figures", trained.get("figures")),
        _table("Probes", trained.get("probe")),
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
stream = model.tokenize("file")   # stream.codes: [positions, codebooks]
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


def _table(title: str, figures: Any) -> str:
    if not figures:
        return ""
    rows = "\n".join(f"| {name} | {_number(value)} |" for name, value in figures.items())
    return f"## {title}\n\n| figure | value |\n| --- | --- |\n{rows}"


def _number(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
