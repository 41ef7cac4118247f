"""`/v1/segmentations` on the wire: what a request may say and what an answer holds.

Boxes are `[x0, y0, x1, y1]` in pixels of the original, upright picture, half-open: `x1 - x0` is the width. Sizes of RLE
masks are `[height, width]`, as COCO writes them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_IMAGES = 8
MOST_EXPRESSIONS = 64
MOST_CLASSES = 256
LONGEST_EXPRESSION = 400  # characters
LONGEST_NAME = 1024  # of a model: a path may be one


class MaskFormat(StrEnum):
    COCO_RLE = "coco_rle"
    PNG = "png"
    POLYGONS = "polygons"
    LABEL_MAP = "label_map"


class GrammarMode(StrEnum):
    ON = "on"
    OFF = "off"


class OnRefusal(StrEnum):
    """What to do when the model ends its answer without a mask."""

    FORCE = "force"  # make it go on with one; the result says `forced: true`
    RETURN = "return"  # an empty result with status `none`


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_enum_values=False)


class ImageUrl(_Strict):
    url: str = Field(min_length=1)


Expression = Annotated[str, Field(min_length=1, max_length=LONGEST_EXPRESSION)]


class SegmentationRequest(_Strict):
    """The body of `POST /v1/segmentations`; a multipart upload carries the same fields, and its files in `image`.

    Exactly one of `expressions`, `classes` and `everything` says what to look for. `refiner` is `none` or the name of
    the one that the server was started with, which is also used where nothing is said.
    """

    model: str | None = Field(default=None, max_length=LONGEST_NAME)
    image: str | ImageUrl | None = None
    images: list[str | ImageUrl] | None = Field(default=None, min_length=1, max_length=MOST_IMAGES)
    expressions: list[Expression] | None = Field(default=None, min_length=1, max_length=MOST_EXPRESSIONS)
    classes: list[Expression] | None = Field(default=None, min_length=1, max_length=MOST_CLASSES)
    everything: bool = False
    mask_format: MaskFormat = MaskFormat.COCO_RLE
    components: bool = False
    coco: bool = False
    grammar: GrammarMode = GrammarMode.ON
    on_refusal: OnRefusal = OnRefusal.FORCE
    score: bool = False
    stream: bool = False
    refiner: str | None = Field(default=None, max_length=LONGEST_EXPRESSION)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    max_tokens: int | None = Field(default=None, ge=1)
    user: str | None = None

    @field_validator("expressions", "classes", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _says_what_to_look_for(self) -> SegmentationRequest:
        given = [name for name in ("expressions", "classes") if getattr(self, name) is not None]
        given += ["everything"] if self.everything else []
        if len(given) != 1:
            raise ValueError(
                f"exactly one of expressions, classes and everything must be given, got {' and '.join(given) or 'none'}"
            )
        if self.image is not None and self.images is not None:
            raise ValueError("image and images exclude each other")
        return self

    def image_urls(self) -> list[tuple[str, str]]:
        """The field's name and the URL of each picture, in order."""
        if self.image is not None:
            return [("image", _url(self.image))]
        return [(f"images.{i}", _url(image)) for i, image in enumerate(self.images or [])]


def _url(image: str | ImageUrl) -> str:
    return image if isinstance(image, str) else image.url


class Component(BaseModel):
    """A connected part of a mask. Not an instance: two that touch are one, and one behind a pole is two."""

    id: int
    box: tuple[int, int, int, int]
    area: int


class ResultError(BaseModel):
    message: str
    type: str
    param: str | None = None


class SegmentationResult(BaseModel):
    """One expression, or one class of a class list, in one picture.

    Attributes:
        block: which descriptor of the answer; only without a grammar can there be a second one.
        status: of the descriptor: complete, truncated, repaired, malformed, none (no mask in the answer), or error.
        repairs: what was mended, as names.
        warnings: what was known before the answer was generated, in words: a budget that may not suffice.
        empty: nothing was found: area 0, no box.
        score: mean probability of the tokens that spell the label, without the grammar (of `others`, where the label
            is nowhere); null unless asked for.
        forced: the model ended its answer without a mask and was made to go on, or was still talking where the grammar
            allows no more talk.
        refiner: what made the mask from the coarse one, by name; or why the mask is the coarse one: `failed`
            (error, timeout, out of memory), `skipped` (it is empty), `kept` (the refined one had too little to do with
            it). Null where no refiner was used.
        text: the raw descriptor; `answer` is what the model said before it.
        components_dropped: how many smaller parts are not in `components`.
    """

    index: int
    image_index: int
    query_index: int
    block: int = 0
    expression: str | None = None
    label: str | None = None
    kind: Literal["semantic"] = "semantic"
    status: str
    repairs: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    mask: dict[str, Any] | None = None
    box: tuple[int, int, int, int] | None = None
    area: int = 0
    empty: bool = True
    score: float | None = None
    forced: bool = False
    refiner: str | None = None
    grid: tuple[int, int] | None = None
    text: str | None = None
    answer: str | None = None
    components: list[Component] | None = None
    components_dropped: int | None = None
    error: ResultError | None = None


class ImageFacts(BaseModel):
    index: int
    width: int
    height: int


class LabelMap(BaseModel):
    """All labels of one descriptor of one picture: an 8- or 16-bit greyscale PNG of indices into `labels`."""

    image_index: int
    query_index: int
    block: int = 0
    labels: list[str]
    png: str


class Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: dict[str, int] | None = None


class Timings(BaseModel):
    """Milliseconds: reading and squashing the pictures, generating, refining, making masks, and the whole request."""

    image_ms: float = 0.0
    generate_ms: float = 0.0
    refine_ms: float = 0.0
    mask_ms: float = 0.0
    total_ms: float = 0.0


class SegmentationResponse(BaseModel):
    id: str
    object: Literal["segmentation"] = "segmentation"
    created: int
    model: str
    images: list[ImageFacts]
    results: list[SegmentationResult]
    label_maps: list[LabelMap] | None = None
    coco: dict[str, Any] | None = None
    usage: Usage
    timings: Timings
