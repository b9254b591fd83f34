"""What `fastdpo bench` measures: workloads from names, sizes of sweeps, slopes; a wrong step has no figures."""

import json
import math

import pytest
import torch
from tiny import make_llama

from fastdpo.evidence.bench import cases
from fastdpo.evidence.bench.steps import growth
from fastdpo.evidence.bench.steps.growth import Size


def workload(**given):
    settings = {"model": "tiny", "vocab": "211", "dataset": None, "profile": "hh", "pairs": 2, "max_length": 64}
    return cases.make_workload(**{**settings, "dtype": "float32", **given})


def test_slopes_are_exponents():
    xs = [1.0, 2.0, 4.0, 8.0]
    assert math.isclose(cases.slope(xs, [3.0 * x**2 for x in xs]), 2.0)
    assert math.isclose(cases.slope(xs, [5.0] * 4), 0.0, abs_tol=1e-12)
    with pytest.raises(ValueError, match=r"points must be at least two, all above 0"):
        cases.slope([1.0, 2.0], [1.0, 0.0])


def test_the_line_goes_through_points_on_a_line():
    assert cases.line_through([1.0, 2.0, 4.0], [2.5, 4.5, 8.5]) == (0.5, 2.0)
    assert cases.line_through([2.0, 2.0], [1.0, 3.0]) == (2.0, 0.0)


def test_a_preset_has_the_shape_of_its_model_and_the_vocabulary_that_is_asked_for():
    found = workload(model="0.5B", vocab="gemma3")
    assert (found.hidden_size, found.num_layers, found.vocab_size) == (896, 24, 262144)
    assert workload(model="1B", vocab=None).vocab_size == 128256
    assert cases.make_shape(found, 512).num_rows == 512


def test_a_folder_of_an_adapter_has_the_shape_of_its_base(tmp_path):
    make_llama(hidden_size=64, num_hidden_layers=3).save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    named = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(named))
    found = workload(model=str(tmp_path / "adapter"))
    assert (found.hidden_size, found.num_layers, found.vocab_size) == (64, 3, 211)
    with torch.device("meta"):
        assert found.make_model("meta").config.hidden_size == 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "./nowhere"}, "does not exist; the shapes without a folder are tiny, 0.5B, 1B, 8B"),
        ({"profile": "short"}, "profile must be one of hh, ultrafeedback, long, got 'short'"),
        ({"vocab": "llama"}, "vocab must be one of llama3, qwen3, gemma3 or a number of at least 8, got 'llama'"),
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"max_length": 3}, "max_length must be at least 16, got 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        workload(**given)


def test_a_model_that_does_not_fit_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(cases, "free_bytes", lambda: 2**20)
    with pytest.raises(ValueError, match=r"model must fit the memory .* use a smaller model, or --only head"):
        cases.check_fits(workload())


def test_shared_prompts_count_once():
    size = Size(4, 211, num_prompts=2, num_responses=4, prompt=10, response=5)
    assert (size.raw_tokens, size.unique_tokens) == (120, 60)


@pytest.mark.parametrize("kind", ["length", "batch", "responses"])
def test_every_sweep_has_four_sizes_that_double(kind):
    xs = [size.x for size in growth.sizes(kind, workload())]
    assert [x / xs[0] for x in xs] == [1.0, 2.0, 4.0, 8.0]


def test_a_step_with_a_wrong_gradient_has_no_figures(monkeypatch):
    steps = growth._steps

    def wrong(*args):
        found = steps(*args)
        right = found[growth.OURS]
        return {**found, growth.OURS: lambda: (right()[0], 1.01 * right()[1])}

    monkeypatch.setattr(growth, "_steps", wrong)
    model = workload().make_model("cpu")
    size = Size(2, 211, num_prompts=1, num_responses=2, prompt=4, response=3)
    plain, ours, unshared = growth._measured(model, size, torch.device("cpu"), "float32", 1)
    assert "ms" in plain
    assert "ms" in unshared
    assert "ms" not in ours
    assert "is expected" in ours["error"]
