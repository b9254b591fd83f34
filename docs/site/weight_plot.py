"""Draws docs/pictures/weight.svg from a run of `fastdpo demo`: the mean weight of the pairs, a line for each beta.

python docs/site/weight_plot.py demo_run
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastdpo.cli.demo import DEMO_FILE
from fastdpo.report.plots import training_curves
from fastdpo.report.sections import svg

PICTURE = Path(__file__).parents[1] / "pictures" / "weight.svg"


def main(folder: str) -> int:
    models = json.loads((Path(folder) / DEMO_FILE).read_text())["models"]
    histories = {model["model"]: model["log_history"] for model in models if model["log_history"]}
    [(_, figure)] = training_curves(histories, ["rewards/weight"])
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(svg(figure))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
