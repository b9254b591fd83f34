"""Tables of samples in the loggers of a run: TensorBoard, W&B and trackio.

In: the callbacks of a trainer, and a table of texts. Out: the table in every logger that is on and has started. Other
loggers have no tables and get nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def log_table(
    callbacks: Iterable[TrainerCallback], name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
) -> None:
    """Writes the table into the loggers among the callbacks, under the same name in all of them."""
    columns, rows = list(columns), [list(row) for row in rows]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(name, _markdown(columns, rows), step)
        elif isinstance(callback, WandbCallback):
            import wandb  # type: ignore[import-not-found]

            if wandb.run is not None:
                wandb.log({name: wandb.Table(columns=columns, data=rows), "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            import trackio  # type: ignore[import-not-found]

            if trackio.context_vars.current_run.get() is not None:
                trackio.log({name: trackio.Table(columns=columns, data=rows), "train/global_step": step})


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.strip().replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"

    return "\n".join([line(columns), "|" + " --- |" * len(columns), *map(line, rows)])
