"""Orders other than a uniform shuffle: what they visit when, in every epoch and after a resume."""

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from test_microbatches import dpo_trainer, ranked_rows
from tiny import make_rows
from torch.utils.data import BatchSampler, DataLoader

from fastdpo import DPOConfig
from fastdpo.data.batches.samplers import LengthSampler, PromptSampler


def test_rows_of_a_prompt_are_visited_together_in_a_new_order_each_epoch():
    prompts = np.array([0, 1, 2, 0, 1, 3, 0, 4, 4])
    epochs = iter([0, 1])
    sampler = PromptSampler(prompts, 3, lambda: next(epochs))
    first, second = list(sampler), list(sampler)
    assert list(PromptSampler(prompts, 3, lambda: 0)) == first != second
    for order in (first, second):
        assert sorted(order) == list(range(9))
        visited = prompts[order]
        assert (np.diff(visited) != 0).sum() == 4  # five prompts, never left and come back to


def test_length_bucketing_makes_steps_of_similar_length_and_visits_every_row():
    lengths = np.random.default_rng(0).integers(1, 1000, size=803)
    sampler = LengthSampler(lengths, 8, 0, lambda: 0)
    order = list(sampler)
    assert sorted(order) == list(range(803))
    assert len(sampler) == 803
    steps = lengths[np.array(order[:800]).reshape(-1, 8)]
    uniform = lengths[np.random.default_rng(1).permutation(803)[:800].reshape(-1, 8)]
    assert np.ptp(steps, axis=1).mean() < 0.1 * np.ptp(uniform, axis=1).mean()
    assert abs(np.corrcoef(np.arange(100), steps.mean(1))[0, 1]) < 0.3  # steps do not come by length


def test_regrouping_makes_a_prompt_run_once(tmp_path):
    """Four prompts with six pairs each, far apart in the dataset: batches of six are one group each."""
    prompts = [[1, 5 + i, 6 + i] for i in range(4)]
    rows = [{**row, "prompt_ids": prompt} for row in ranked_rows() for prompt in prompts]
    trainer = dpo_trainer(tmp_path, rows, per_device_train_batch_size=6, regroup_dataset=True, num_train_epochs=1)
    sizes = []
    trainer.data_collator = lambda examples: sizes.append(inputs := trainer.collator(examples)) or inputs
    trainer.train()
    assert [inputs["input_ids"].numel() for inputs in sizes] == [3 + 7 * 3] * 4
    assert trainer.state.global_step == 4


def test_length_bucketing_reaches_the_batches(tmp_path):
    trainer = dpo_trainer(tmp_path, make_rows(64), per_device_train_batch_size=4, length_bucketing=True, max_steps=16)
    spreads = []

    def collate(examples):
        lengths = [2 * len(e["prompt_ids"]) + sum(map(len, e["responses"])) for e in examples]
        spreads.append(max(lengths) - min(lengths))
        return trainer.collator(examples)

    trainer.data_collator = collate
    trainer.train()
    assert len(spreads) == 16
    assert sum(spreads) / 16 <= 2


def test_orders_that_contradict_each_other_are_refused(tmp_path):
    for settings in (
        {"regroup_dataset": True, "length_bucketing": True},
        {"regroup_dataset": True, "train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "group_by_length"},
    ):
        with pytest.raises(ValueError, match=r"must not both|train_sampling_strategy must be"):
            DPOConfig(str(tmp_path), use_cpu=True, **settings)


def visits(trainer):
    """What each collated batch holds, by its responses."""
    visited, collate = [], trainer.collator.__call__

    def recording(examples):
        visited.append([example["responses"] for example in examples])
        return collate(examples)

    trainer.data_collator = recording
    return visited


@pytest.mark.parametrize("order", ["regroup_dataset", "length_bucketing"])
def test_a_resumed_run_goes_on_in_the_order_of_its_epoch(tmp_path, order):
    rows, settings = make_rows(12), {order: True, "per_device_train_batch_size": 2, "num_train_epochs": 3}
    whole = dpo_trainer(tmp_path / "whole", rows, **settings)
    all_visits = visits(whole)
    whole.train()
    assert len(all_visits) == 18
    assert all_visits[:6] != all_visits[6:12] != all_visits[12:]
    dpo_trainer(tmp_path / "cut", rows, **settings, save_strategy="steps", save_steps=8).train()
    again = dpo_trainer(tmp_path / "cut", rows, **settings)
    later_visits = visits(again)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    assert later_visits == all_visits[8:]


def test_so_does_one_on_several_processes():
    """There accelerate's `set_epoch` ends at the wrapper that skips batches."""
    sampler = PromptSampler(np.arange(16), 0, lambda: 1)

    def loader():
        batches = DataLoader(range(16), batch_sampler=BatchSampler(sampler, 2, False))
        return prepare_data_loader(batches, num_processes=2, process_index=1, put_on_device=False)

    resumed = skip_first_batches(loader(), 2)
    for either in (whole := loader(), resumed):
        either.set_epoch(1)
    batches = [batch.tolist() for batch in whole]
    assert len(batches) == 4
    assert [batch.tolist() for batch in resumed] == batches[2:]
