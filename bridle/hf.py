"""`import bridle.hf` teaches `transformers` about model folders: AutoConfig and AutoModel then load them.

No code comes from the repository: `trust_remote_code` is not needed, and the weights are safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from bridle.model_folder import PublishableModel, load


class BridleConfig(PretrainedConfig):
    """`config.json` of a model folder."""

    model_type = "bridle"


@dataclass
class BridleOutput(ModelOutput):
    """codes: int64 ``[B, N, M]``. last_hidden_state: the encoder's embeddings, float32 ``[B, N, width]``."""

    codes: Tensor | None = None
    last_hidden_state: Tensor | None = None


class BridleAutoModel(PreTrainedModel):
    """A `BridleModel` as `transformers` holds models; `bridle` is the model itself, with all its methods."""

    config_class = BridleConfig
    base_model_prefix = "bridle"
    main_input_name = "input_values"

    def __init__(self, config: BridleConfig, loaded: PublishableModel) -> None:
        super().__init__(config)
        self.bridle = loaded
        self.encoder, self.tokenizer = loaded.encoder, loaded.tokenizer

    @classmethod
    def from_pretrained(cls, source: str | Path, *_: Any, **options: Any) -> BridleAutoModel:  # type: ignore[override]
        """The model in a folder or of a hub's repository; options: `revision`, `dtype` (float32 or bfloat16), `config`.

        Raises:
            HubError, ModelError: see `bridle.load`.
        """
        dtype = str(options.get("dtype") or options.get("torch_dtype") or "float32").removeprefix("torch.")
        loaded = load(source, dtype="float32" if dtype == "auto" else dtype, revision=options.get("revision"))
        config = options.get("config")
        return cls(config if isinstance(config, BridleConfig) else BridleConfig(**loaded.config.model_dump()), loaded)

    @torch.inference_mode()
    def forward(self, input_values: Tensor, **_: Any) -> BridleOutput:
        """Normalised clips ``[B, C, *S]``, as `bridle.modality.windows` gives them, to codes and embeddings."""
        return BridleOutput(codes=self.bridle.codes(input_values), last_hidden_state=self.bridle.embed(input_values))

    def save_pretrained(self, folder: str | Path, *_: Any, licence: str | None = None, **__: Any) -> None:  # type: ignore[override]
        """See `BridleModel.save_pretrained`."""
        self.bridle.save_pretrained(folder, licence=licence)

    def push_to_hub(self, repo: str, *_: Any, **options: Any) -> str:  # type: ignore[override]
        """See `BridleModel.push_to_hub`."""
        return self.bridle.push_to_hub(repo, **options)


AutoConfig.register("bridle", BridleConfig)
AutoModel.register(BridleConfig, BridleAutoModel)
