"""docs/around_the_loss.md: its Python runs, its settings exist, its thresholds are those of the code."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from tiny import make_llama, make_rows, make_tokenizer

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.training.callbacks import warning_checks
from fastdpo.training.callbacks.predictions import PAIR_VALUES
from fastdpo.training.callbacks.watch import WINDOW_PAIRS

PAGE = (Path(__file__).parents[1] / "docs" / "around_the_loss.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"DPOConfig": DPOConfig}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        if "trainer." in block:
            names["trainer"] = DPOTrainer(
                make_llama(),
                args=DPOConfig("out", use_cpu=True, max_steps=1, report_to="none", disable_tqdm=True),
                train_dataset=make_rows(8),
                eval_dataset=make_rows(4, seed=1),
                processing_class=make_tokenizer(),
                compute_metrics=names["compute_metrics"],
            )
            names["trainer"].train()
            assert names["trainer"].evaluate()["eval_hard_accuracy"] == pytest.approx(0.0)
        exec(block, names)
    assert (tmp_path / "out" / "report.html").exists()


def test_its_settings_and_names_exist():
    known = {f.name for f in fields(DPOConfig)} | set(PAIR_VALUES)
    for name in re.findall(
        r"`(num_\w+|eval_sample\w*|router\w*|ref_model_\w+|training_\w+|\w+_logps|\w+_rewards)\b", PAGE
    ):
        assert name in known, name
    for value in (
        f"{warning_checks.CHOSEN_FALL:g} nats less likely",
        f"{100 * warning_checks.SATURATED_ACCURACY:g} % of the training pairs",
        f"at least {warning_checks.WORTHY_MARGIN:g}",
        f"exceed {warning_checks.LOGRATIO_PER_TOKEN:g} nat a token"
        f" and {warning_checks.LOGRATIO_NATS:g} nats a response",
        f"{warning_checks.LENGTH_RATIO:g} times as long",
        f"last {WINDOW_PAIRS} pairs",
    ):
        assert value in PAGE, value
