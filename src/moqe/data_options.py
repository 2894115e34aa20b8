"""Options of a recipe's `data`: where documents come from and how they become samples."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from moqe.options import Options

BUNDLED = "bundled:"  # begins the path of a bundled text, `bundled:<name>/<part>`
_BUNDLED_DOMAINS = {"python-code": "code", "python-docstrings": "docstrings", "python-topics": "reference"}


class Source(Options):
    """Where documents come from: a file or folder of texts or images, a hub id, or `bundled:<name>`.

    `domain` labels every document of a text source in tables and plots; the label of an image is its class. `split` and
    `subset` apply to hub ids, `column` to all that has columns (empty: `text`, or the first of `image` and `img`), and
    `label_column` to images. `separator` cuts text into documents: `blank` at blank lines, `wikitext` at top-level
    headings, `none` not at all; rows of files and hub ids are joined before. `skip_documents` and `max_documents` take
    a range of documents, which are images where the task is about images.
    """

    path: str
    domain: str = ""
    column: str = ""
    label_column: str = "label"
    subset: str = ""
    split: str = "train"
    separator: Literal["none", "blank", "wikitext"] = "none"
    skip_documents: int = Field(0, ge=0)
    max_documents: int | None = Field(None, ge=1)

    @property
    def label(self) -> str:
        """The domain; where none was given that of a bundled text, or the path."""
        return self.domain or (bundled_domain(self.path) if self.path.startswith(BUNDLED) else self.path)

    @property
    def text_column(self) -> str:
        """The column that holds a document's text."""
        return self.column or "text"


def bundled_domain(path: str) -> str:
    """What all parts of a bundled text are labelled in tables: its name, but for the standard library's own."""
    name = path.removeprefix(BUNDLED).partition("/")[0]
    return _BUNDLED_DOMAINS.get(name, name)


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Sources = Annotated[tuple[Annotated[Source, BeforeValidator(_as_source)], ...], Field(min_length=1)]


class Preprocessing(Options):
    """What is done to an image, for a base model whose checkpoint does not say.

    `resize`: the shorter edge, pixels; None leaves the image as it is. `crop`: the side of the square cut from the
    centre, pixels; None takes all. `mean` and `std`: per channel, of values between 0 and 1.
    """

    resize: int | None = Field(None, ge=1)
    crop: int | None = Field(None, ge=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"


class Data(Options):
    """The three kinds of documents, which must be disjoint, and how they become samples.

    `window` is in tokens. The sample limits are windows or images in total, spread evenly over domains or classes; None
    takes all. `validation_share` is the share of the router's documents kept apart for early stopping and selection.
    `calibration_precision: bfloat16` rounds the inputs of products while statistics are taken, which is several times
    faster where the processor has instructions for it; `auto` asks the processor. Sums stay in float32.
    `preprocessing` is for image models whose checkpoint states none.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"calibration_precision"})

    calibration: Sources
    router: Sources
    test: Sources
    window: int = Field(512, ge=16)
    calibration_samples: int | None = Field(128, ge=1)
    calibration_precision: Literal["auto", "float32", "bfloat16"] = "float32"
    router_samples: int | None = Field(None, ge=1)
    test_samples: int | None = Field(None, ge=1)
    validation_share: float = Field(0.25, gt=0.0, lt=1.0)
    preprocessing: Preprocessing | None = None
