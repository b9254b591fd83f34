"""The task of the sentiment experiment: it repeats for a seed, and comes back from its folder as it was saved."""

from dataclasses import replace

import pytest
import torch

from fastdpo.alignment import task as module
from fastdpo.alignment.task import SIZES, cached_task, prepare_task
from fastdpo.data.synthetic import true_reward

SIZE = replace(
    SIZES["small"],
    num_train_prompts=24,
    num_heldout_prompts=12,
    num_pairs=40,
    hidden_size=16,
    num_layers=1,
    sft_epochs=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("task") / "seed_0"


@pytest.fixture(scope="module")
def task(folder):
    return cached_task(SIZE, 0, folder)


def test_pairs_are_samples_of_the_reference_on_training_prompts(task):
    assert 30 < len(task.train_rows) <= 40  # pairs of equal texts are left out
    assert len(task.heldout_prompts) == 12
    assert not {row["prompt"] for row in task.train_rows} & set(task.heldout_prompts)
    assert {row["prompt"] for row in task.heldout_rows} <= set(task.heldout_prompts)
    assert len(task.reference_rewards) == 2 * (40 + 12)
    assert {true_reward(row["chosen"]) for row in task.train_rows} <= set(task.reference_rewards)


def test_a_saved_task_comes_back_without_training(task, folder, monkeypatch):
    monkeypatch.setattr(module, "prepare_task", None)
    again = cached_task(SIZE, 0, folder)
    assert (again.train_rows, again.heldout_rows, again.heldout_prompts) == (
        task.train_rows,
        task.heldout_rows,
        task.heldout_prompts,
    )
    assert again.reference_rewards == task.reference_rewards
    assert again.sft_history == task.sft_history
    for name, value in task.reference.state_dict().items():
        assert torch.equal(again.reference.state_dict()[name], value)
    text = task.train_rows[0]["prompt"]
    assert again.tokenizer(text)["input_ids"] == task.tokenizer(text)["input_ids"]


def test_equal_seeds_give_equal_tasks_and_others_do_not(task):
    assert prepare_task(SIZE, 0).train_rows == task.train_rows
    assert prepare_task(SIZE, 1).train_rows != task.train_rows


def test_a_folder_with_another_task_is_refused(task, folder):
    with pytest.raises(ValueError, match=r"folder must hold a task of size .* and seed 1, got another one"):
        cached_task(SIZE, 1, folder)


def test_a_task_that_was_killed_while_it_was_saved_is_prepared_again(tmp_path, monkeypatch):
    def killed(rows, *args, **kwargs):
        raise KeyboardInterrupt

    folder = tmp_path / "seed_0"
    with monkeypatch.context() as patch:
        patch.setattr(module.json, "dumps", killed)
        with pytest.raises(KeyboardInterrupt):
            cached_task(SIZE, 0, folder)
    assert not folder.exists()
    assert cached_task(SIZE, 0, folder).seed == 0
    assert [path.name for path in tmp_path.iterdir()] == ["seed_0"]
