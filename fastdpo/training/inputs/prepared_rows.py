"""Prepared rows before training: whether the model can take them, and a warning of those that the run leaves out.

In: a dataset of token columns, its report, the settings it was made with. Out: ValueError for rows that the model
cannot take; one line on lost rows, and a notice that stands out where most are lost.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import nn
from transformers.utils import logging

from fastdpo.data.prepare import Report
from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.head import whole_shape
from fastdpo.training.setup.models import check_lengths, check_token_ids
from fastdpo.training.setup.rotary import warn_of_mixed_lengths

logger = logging.get_logger(__name__)

_SHARE_THAT_STANDS_OUT = 0.5


def check_rows(model: nn.Module, dataset: Dataset, name: str) -> None:
    """Refuses rows that the model cannot take.

    Raises:
        ValueError: a sequence is longer than the model has positions, or a token id has no embedding.
    """
    check_lengths(model, dataset, name)
    warn_of_mixed_lengths(model, dataset, name)
    check_token_ids(dataset, whole_shape(bare_model(model).get_input_embeddings().weight)[0], name)


def warn_of_lost_rows(report: Report, name: str, args: Any) -> None:
    """Warns if the run drops rows."""
    if report.num_kept < report.num_rows:
        logger.warning(_lost_rows_text(report, name, args))


def _lost_rows_text(report: Report, name: str, args: Any) -> str:
    """The first line of the report; in a frame and with remedies if more than half of the rows are dropped."""
    first = report.lines()[0]
    if report.num_kept >= _SHARE_THAT_STANDS_OUT * report.num_rows:
        return f"{name} dataset: {first}"
    title = f"MOST ROWS ARE LOST: {report.num_rows - report.num_kept} of {report.num_rows} of the {name} dataset"
    lines = [
        title,
        first,
        *(f"{reason}: {what}" for reason, what in _remedies(args).items() if reason in report.dropped),
    ]
    rule = "!" * 100
    return "\n".join(["", rule, *(f"!! {line}" for line in lines), rule])


def _remedies(args: Any) -> dict[str, str]:
    longer = f"raise max_length, now {args.max_length}, or set max_prompt_length to leave space for responses"
    return {
        "prompt fills max_length": longer,
        "chosen equals rejected after truncation": longer,
        "chosen equals rejected": "check that the columns being read hold the two answers",
        "empty response": "check that the columns being read hold the answers",
        "empty prompt": "check that the column being read holds the prompt",
    }
