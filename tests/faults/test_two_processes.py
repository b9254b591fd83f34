"""Runs on two processes that are stopped and resumed: order, metrics under way and weights go on exactly."""

import os

import pytest
from datasets import Dataset
from processes import on_processes
from tiny import make_llama, make_rows
from tiny_runs import logged, tiny_trainer

CASES = {
    "shuffled, second epoch": {},
    "accumulated": {"gradient_accumulation_steps": 2, "max_tokens_per_microbatch": 20},
    "a stream": {"stream": True},
    "similar lengths": {"length_bucketing": True},
}


def stop_and_resume(folder, **settings):
    """Whether the run that saved at step 7 and was resumed is the undisturbed one, with logs of every third step."""
    is_streamed = settings.pop("stream", False)

    def build(name, **more):
        rows = Dataset.from_list(make_rows(16))
        return tiny_trainer(
            folder / name,
            make_llama(attention_dropout=0.1),
            train_dataset=rows.to_iterable_dataset() if is_streamed else rows,
            max_steps=10,
            per_device_train_batch_size=2,
            disable_dropout=False,
            learning_rate=1e-2,
            logging_steps=3,
            **settings,
            **more,
        )

    whole = build("whole", save_strategy="steps", save_steps=7)
    whole.train()
    again = build("whole")
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-7"))
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    files = sorted(path.name for path in (folder / "whole" / "checkpoint-7").glob("fastdpo_*"))
    return {
        "rank": int(os.environ["RANK"]),
        "weights": all(one.equal(other) for one, other in pairs),
        "logs": [logged(whole, key) == logged(again, key) for key in ("loss", "rewards/margins", "num_tokens")],
        "files": files,
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return dict(
        zip(CASES, on_processes(stop_and_resume, list(CASES.values()), tmp_path_factory.mktemp("two")), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_on_two_processes_goes_on_exactly(of_two, case):
    for rank, found in enumerate(of_two[case]):
        assert found == {
            "rank": rank,
            "weights": True,
            "logs": [True, True, True],
            "files": ["fastdpo_manifest.json", "fastdpo_progress.json", "fastdpo_progress_1.json"],
        }
