"""The notebooks: what is saved in them is of a whole run, and a real model runs every cell."""

import json
from pathlib import Path

import pytest
from pretrained import needs_smollm2

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_has_been_run_in_order_and_without_an_error(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]


@needs_smollm2
def test_the_first_run_makes_answers_shorter(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    (path,) = (path for path in NOTEBOOKS if path.stem == "first_dpo")
    names = {}
    for cell in code_cells(path):
        exec("".join(cell["source"]), names)
    assert len(names["pairs"]) > 40
    assert names["measured"]["eval_rewards/margins"] > 0
    assert names["mean_words"](names["after"]) < 0.8 * names["mean_words"](names["before"])
