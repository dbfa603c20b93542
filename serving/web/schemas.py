"""What goes in and comes out, for the OpenAPI document and for the checks of parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bridle.tokens.layouts import Layout

Name = Annotated[str, Field(min_length=1, max_length=200)]


class Parameters(BaseModel):
    """Query parameters; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    model: Name | None = None
    """Name of a loaded model (see /v1/models). By default the content decides."""
    modality: Name | None = None
    """`audio`, `image` or `video`, where the content does not decide."""


class TokenizeParameters(Parameters):
    """Parameters of `/tokenize`."""

    layout: Layout | None = None
    """Also answer flat `ids` for a language model, in this order."""
    offset: Annotated[int, Field(ge=0, le=2**53)] = 0
    """The first id of `ids`, most often the size of the text vocabulary."""
    text: bool = False
    """Also answer `text`, the same as text tokens."""


class EncodeParameters(Parameters):
    """Parameters of `/encode`."""

    pool: Literal["mean", "none"] = "mean"
    """`mean`: one embedding of the whole clip. `none`: one for each position."""


class ClassifyParameters(Parameters):
    """Parameters of `/classify`."""

    top: Annotated[int, Field(ge=1, le=100_000)] = 5
    """So many classes, the likeliest first."""


class ReloadParameters(BaseModel):
    """Parameters of a reload."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    model: Name | None = None
    """Which one; all by default."""


class ClipAnswer(BaseModel):
    """What every clip's answer holds."""

    model_config = ConfigDict(protected_namespaces=(), use_attribute_docstrings=True)

    model: str
    """Name of the model."""
    modality: str
    """Its modality."""
    grid: dict[str, int]
    """Positions along each axis; their product is N. Positions are row-major, the first axis outermost."""
    duration_s: float | None = None
    """Seconds of content; null without time."""


class Codes(ClipAnswer):
    """One clip's codes."""

    codebooks: int
    """M."""
    codebook_size: int
    """K."""
    codes: list[list[int]]
    """M lists of N integers, coarse to fine."""
    ids: list[int] | None = None
    """Flat ids in the layout asked for."""
    text: str | None = None
    """Text tokens in the layout asked for."""


class TokenizeAnswer(BaseModel):
    """The clips in the order they were sent."""

    clips: list[Codes]


class Embedding(ClipAnswer):
    """One clip's embeddings."""

    width: int
    """D, the encoder's width."""
    embedding: list[float] | None = None
    """D numbers, with pool=mean."""
    embeddings: list[list[float]] | None = None
    """N lists of D numbers, with pool=none."""


class EncodeAnswer(BaseModel):
    """The clips in the order they were sent."""

    clips: list[Embedding]


class ClassProbability(BaseModel):
    """One class of a clip."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: Annotated[str, Field(alias="class")]
    """Its name."""
    probability: float
    """Of this class by itself, or its share, as the classifier was trained."""


class Classified(BaseModel):
    """One clip's classes."""

    model_config = ConfigDict(protected_namespaces=(), use_attribute_docstrings=True)

    model: str
    """Name of the classifier."""
    modality: str
    """Its modality."""
    duration_s: float | None = None
    """Seconds of content; null without time."""
    classes: list[ClassProbability]
    """The likeliest first."""


class ClassifyAnswer(BaseModel):
    """The clips in the order they were sent."""

    clips: list[Classified]


class ClipCodes(BaseModel):
    """Codes of one clip."""

    model_config = ConfigDict(extra="forbid")

    codes: list[list[int]]
    """M' lists of N integers; fewer than M codebooks give the coarser latents."""


class DequantizeRequest(BaseModel):
    """Codes to dequantize."""

    model_config = ConfigDict(extra="forbid")

    clips: Annotated[list[ClipCodes], Field(min_length=1)]


class Latents(BaseModel):
    """One clip's quantized latents."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    codebooks: int
    dim: int
    latents: list[list[float]]


class DequantizeAnswer(BaseModel):
    """The clips in the order they were sent."""

    clips: list[Latents]


class ModelInfo(BaseModel):
    """One loaded model."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    id: str
    modality: str
    codebooks: int
    codebook_size: int
    dim: int
    grid: dict[str, int]
    positions_per_second: float | None
    sha256: str


class ClassifierInfo(BaseModel):
    """One loaded classifier."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    id: str
    modality: str
    classes: list[str]
    grid: dict[str, int]
    sha256: str


class ModelList(BaseModel):
    """The loaded models; the first of a modality is its default."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]
    classifiers: list[ClassifierInfo] = []


class Info(BaseModel):
    """The service."""

    version: str
    limits: dict[str, Any]
    models: list[ModelInfo]
    classifiers: list[ClassifierInfo] = []


class Problem(BaseModel):
    """RFC 9457 problem details."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
