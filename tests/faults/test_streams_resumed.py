"""A run on a stream reads it again when it is resumed; a stream that does not repeat itself is named at the start."""

import itertools
import logging

import pytest
from datasets import Dataset, IterableDataset, interleave_datasets
from tiny import make_rows
from tiny_runs import tiny_trainer

from fastdpo.training.inputs.streams import why_unrepeatable

ROWS = Dataset.from_list(make_rows(16))
_readings = itertools.count()


def others_each_time():
    yield from make_rows(16, seed=next(_readings))


def stream(num_shards=2):
    return ROWS.to_iterable_dataset(num_shards=num_shards)


REPEATABLE = {
    "plain": stream(),
    "with a seed": stream().shuffle(seed=3, buffer_size=4),
    "with a large seed": stream().shuffle(seed=2**63, buffer_size=4),
    "from a generator": IterableDataset.from_generator(make_rows, gen_kwargs={"num_rows": 16}),
    "interleaved with a seed": interleave_datasets([stream(), stream()], probabilities=[0.5, 0.5], seed=1),
}
UNREPEATABLE = {
    "without a seed": (stream().shuffle(buffer_size=4), "shuffled without a seed"),
    "mapped and filtered": (stream().shuffle().map(lambda row: row).filter(lambda row: True), "without a seed"),
    "concatenated": (interleave_datasets([stream(), stream().shuffle()]), "shuffled without a seed"),
    "others": (IterableDataset.from_generator(others_each_time), "each reading gives other rows"),
}


@pytest.mark.parametrize("name", REPEATABLE)
def test_a_stream_that_repeats_itself_is_not_warned_of(name):
    assert why_unrepeatable(REPEATABLE[name]) is None


@pytest.mark.parametrize("name", UNREPEATABLE)
def test_a_stream_that_does_not_repeat_itself_is_named_at_the_start(tmp_path, caplog, name):
    dataset, why = UNREPEATABLE[name]
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, train_dataset=dataset)
    assert "A run on this training stream cannot be resumed exactly" in caplog.text
    assert why in caplog.text


@pytest.mark.parametrize(("seed", "warns"), [(1, False), (2, True)])
def test_a_run_that_is_resumed_on_another_stream_is_warned(tmp_path, caplog, seed, warns):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    tiny_trainer(tmp_path, train_dataset=stream().shuffle(seed=1, buffer_size=4), **settings).train()
    again = tiny_trainer(tmp_path, train_dataset=stream().shuffle(seed=seed, buffer_size=4), **settings)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ("begins with other rows than in the run that is resumed" in caplog.text) == warns
