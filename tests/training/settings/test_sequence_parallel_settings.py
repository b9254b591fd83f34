"""Settings that cannot work if several processes compute each packed row together."""

import pytest
from accelerate.parallelism_config import ParallelismConfig
from tiny_runs import tiny_config, tiny_trainer

from fastdpo.training.inputs.collator import PackingCollator


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_parallel_size": 0}, "sequence_parallel_size must be an integer >= 1, got 0"),
        ({"sequence_parallel_size": "2"}, "sequence_parallel_size must be an integer >= 1, got '2'"),
        ({"packing": "padded"}, "packing must not be 'padded' with sequence_parallel_size=2: only a packed row is"),
        ({"attention_backend": "mask"}, "attention_backend must not be 'mask' with sequence_parallel_size=2"),
        ({"max_tokens_per_microbatch": "auto"}, "max_tokens_per_microbatch must not be 'auto' .* give a number"),
        ({"torch_compile": True}, "torch_compile must not be True with sequence_parallel_size=2"),
        ({"sequence_parallel_size": 1, "sp_size": 2}, "sp_size at 1, got 2: .* set sequence_parallel_size=2"),
        ({"sp_size": 2}, "must leave sp_size at 1"),
        ({"cp_size": 4}, "must leave cp_size at 1, got 4"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(settings, message, tmp_path):
    settings = {"sequence_parallel_size": 2, **settings}
    sizes = {name: settings.pop(name) for name in ("sp_size", "cp_size") if name in settings}
    if sizes:
        settings["parallelism_config"] = ParallelismConfig(**sizes)
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **settings)


def test_more_processes_than_there_are_is_refused_before_weights_are_loaded(tmp_path):
    with pytest.raises(ValueError, match="must divide the number of processes, 1, got 2: start 2 processes"):
        tiny_trainer(tmp_path, "no/such-model", sequence_parallel_size=2)


def test_rows_are_padded_until_the_processes_divide_them():
    row = {"prompt_ids": [1, 2, 3], "responses": [[4, 5], [6]], "preferences": [[0, 1]]}  # 6 tokens
    lengths = [PackingCollator(num_shares=n)([row])["input_ids"].shape[1] for n in (1, 2, 4, 6)]
    assert lengths == [6, 6, 8, 6]
    inputs = PackingCollator(num_shares=4, pad_to_multiple_of=6)([row])
    assert inputs["input_ids"].shape[1] == 12  # of 6 and 4
    assert inputs["shares"]["ends"] == (0, 2, 3, 3, 3)  # of 3 tokens each: row 2 predicts 4 and 6, row 3 predicts 5
