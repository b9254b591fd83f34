"""The cost model's table in docs/scaling.md is what benchmarks/scaling_model.py computes."""

import pytest
import scaling_model
from shared.pages import part
from tiny import make_llama

from fastdpo.training.memory.cluster.plans import MethodModel


def test_layers_between_two_and_four_are_on_a_line_to_many():
    config = make_llama(vocab_size=1000, hidden_size=64, num_hidden_layers=7).config
    whole = MethodModel(config, "full", True, scaling_model.LORA_R).peak(4096)
    line = scaling_model.ManyLayers(config, "full", True).peak(4096)
    assert line.activations == pytest.approx(whole.activations, rel=0.01)
    assert (line.casts, line.head) == (whole.casts, whole.head)


@pytest.mark.slow
def test_the_page_shows_the_table():
    shown = part(scaling_model.PAGE.read_text(), "scaling_model.py")
    assert shown == scaling_model.table(), "run `python benchmarks/scaling_model.py --write`"
