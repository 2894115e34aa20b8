"""Advice before building: what a mixture of specialists that share codes would gain at each width, in minutes.

    moqe.advise("HuggingFaceTB/SmolLM2-135M", ["news.jsonl=news", "code.parquet=code"], minutes=10)

On a sample of the texts every width's generalist is quantized and distilled, specialists branch off it, and all are
scored on documents that none of them has seen. docs/advise.md says what is measured and what is extrapolated.
"""

from __future__ import annotations

from moqe.advice.advice import Advice, Range, Row, Sampled, WidthFacts
from moqe.advice.run import advise

__all__ = ["Advice", "Range", "Row", "Sampled", "WidthFacts", "advise"]
