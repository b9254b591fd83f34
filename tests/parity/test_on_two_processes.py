"""Two processes whose rows do not fill an epoch's last step log as many tokens as TRL does on them."""

import pytest
from datasets import Dataset
from peers import peer
from processes import on_processes
from side_by_side import trained
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import logged

import fastdpo

trl = peer("trl")


def num_tokens(folder, batch_size):
    """Of our run and of TRL's: 10 rows in steps of 4, 4 and 2; accelerate fills the last with two rows of the first.

    With balanced processes these would be two others.
    """
    settings = {"per_device_train_batch_size": batch_size, "max_steps": -1, "num_train_epochs": 1}
    found = []
    for package, more in ((fastdpo, {"balance_ranks": False}), (trl, {})):
        rows, models = Dataset.from_list(make_rows(10)), {"ref_model": make_llama(seed=1)}
        trainer = trained(package, folder, make_llama(), make_tokenizer(), models, {**settings, **more}, rows)
        found.append(logged(trainer, "num_tokens"))
    return found


@pytest.mark.slow
def test_repeated_rows_count_as_tokens_that_have_run(tmp_path):
    (processes,) = on_processes(num_tokens, [{"batch_size": 2}], tmp_path)
    alone, _ = num_tokens(tmp_path, batch_size=4)
    for ours, theirs in processes:
        assert ours == theirs
        assert ours[:2] == alone[:2]
        assert ours[2] > alone[2]
