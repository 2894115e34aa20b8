"""From losses to a verdict: loss table, metrics, significance, verdict, and the pages that show it."""

from __future__ import annotations

from moqe.evaluate.judge import judge
from moqe.evaluate.loss_table import LossTable
from moqe.evaluate.metrics import METRICS, Metric, bits_per_byte, perplexity
from moqe.evaluate.outcome import Outcome, cascaded, routed
from moqe.evaluate.predictions import BASE, Predictions, read_predictions
from moqe.evaluate.significance import Interval, intervals, mcnemar
from moqe.evaluate.table_file import Chunk, LossTableFile, read_losses
from moqe.evaluate.verdict import ExpertSummary, ProtocolVerdict, Verdict, read_verdict, write_verdict

__all__ = [
    "BASE",
    "METRICS",
    "Chunk",
    "ExpertSummary",
    "Interval",
    "LossTable",
    "LossTableFile",
    "Metric",
    "Outcome",
    "Predictions",
    "ProtocolVerdict",
    "Verdict",
    "bits_per_byte",
    "cascaded",
    "intervals",
    "judge",
    "mcnemar",
    "perplexity",
    "read_losses",
    "read_predictions",
    "read_verdict",
    "routed",
    "write_verdict",
]
