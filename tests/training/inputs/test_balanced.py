"""`balance_ranks`: steps keep their rows, whichever process runs them."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler

from fastdpo.training.inputs.balanced import balanced

RNG = np.random.default_rng(0)
ROWS = [
    {"prompt_ids": [1] * int(RNG.integers(1, 60)), "responses": [[2] * int(RNG.integers(1, 60)), [3]], "row": row}
    for row in range(53)
]


def read(num_processes=2, batch_size=3, accumulation=2, skip=0, epochs=1, **settings):
    """(processes, batches) rows of each batch."""
    args = SimpleNamespace(
        **{
            "balance_ranks": True,
            "regroup_dataset": False,
            "prefix_sharing": True,
            "gradient_accumulation_steps": accumulation,
            **settings,
        }
    )
    dataset, found = Dataset.from_list(ROWS), []
    for process in range(num_processes):
        loader = DataLoader(dataset, batch_size, sampler=RandomSampler(dataset), collate_fn=lambda rows: rows)
        loader = prepare_data_loader(
            loader,
            num_processes=num_processes,
            process_index=process,
            put_on_device=False,
            use_seedable_sampler=True,
            data_seed=3,
        )
        loader = balanced(loader, dataset, args)
        loader = skip_first_batches(loader, skip) if skip else loader
        found.append([[row["row"] for row in batch] for _ in range(epochs) for batch in loader])
    return found


def tokens(rows):
    return sum(len(ROWS[row]["prompt_ids"]) + sum(map(len, ROWS[row]["responses"])) for row in rows)


def steps_of(found, accumulation=2):
    """For each step, the rows of each process."""
    of_process = [
        [list(chain(*batches[i : i + accumulation])) for i in range(0, len(batches), accumulation)] for batches in found
    ]
    return list(zip(*of_process, strict=True))


def test_every_step_has_the_rows_it_had_and_its_processes_about_equally_many_tokens():
    plain, dealt = steps_of(read(balance_ranks=False)), steps_of(read())
    assert len(plain) == len(dealt) == 5
    excess = {"plain": 0, "dealt": 0}
    for before, after in zip(plain[:4], dealt[:4], strict=True):  # of 12 rows each
        assert sorted(chain(*before)) == sorted(chain(*after))
        assert [len(rows) for rows in after] == [6, 6]
        for name, step in (("plain", before), ("dealt", after)):
            excess[name] += max(map(tokens, step)) - sum(map(tokens, step)) / 2
    assert excess["dealt"] < 0.3 * excess["plain"]


def test_an_epochs_last_rows_that_fill_no_step_are_read_in_their_order():
    plain, dealt = steps_of(read(balance_ranks=False))[4], steps_of(read())[4]
    # 53 rows are four steps of 12 and 5: three for one process and two for the other, filled up with repeated rows
    assert dealt[0][:3] == plain[0][:3]
    assert dealt[1][:2] == plain[1][:2]


def test_epochs_differ_and_a_resumed_one_goes_on_where_it_was():
    (first, _), (resumed, _) = read(epochs=2), read(skip=4)
    assert len(first) == 18
    assert first[:9] != first[9:]
    assert resumed == first[4:9]


@pytest.mark.parametrize("settings", [{"regroup_dataset": True}, {"num_processes": 1}])
def test_rows_of_a_prompt_and_a_single_process_are_left_alone(settings):
    assert read(**settings) == read(**settings, balance_ranks=False)


def test_unshared_prompts_count_with_every_response():
    def largest_first(**settings):
        return [sorted(rows) for step in steps_of(read(**settings)) for rows in step]

    assert largest_first() != largest_first(prefix_sharing=False)
