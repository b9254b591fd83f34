"""Streams of rows (`datasets.IterableDataset`) for training and evaluation."""

import pytest
import tiny_runs
from datasets import Dataset, IterableDataset
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import losses

from fastdpo import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from fastdpo.data.prepare import group_from_columns
from fastdpo.data.rows.report import StreamReport
from fastdpo.training.callbacks.summary import summary_lines

ROWS = make_rows(12)
EQUAL = {"prompt": "the cat", "chosen": "sat", "rejected": "sat"}
SETTINGS = {**tiny_runs.SETTINGS, "train_sampling_strategy": "sequential"}


def stream(rows):
    return Dataset.from_list(rows).to_iterable_dataset()


def generated(rows):
    """A stream whose columns nobody knows before it is read."""

    def rows_again():
        yield from rows

    return IterableDataset.from_generator(rows_again)


def trainer(tmp_path, train_dataset, trainer_class=DPOTrainer, config_class=DPOConfig, **settings):
    arguments = {name: settings.pop(name) for name in ("eval_dataset", "ref_model") if name in settings}
    known = {name: value for name, value in SETTINGS.items() if config_class is DPOConfig or name != "beta"}
    return trainer_class(
        make_llama(),
        args=config_class(str(tmp_path), **{**known, **settings}),
        train_dataset=train_dataset,
        processing_class=make_tokenizer(),
        **arguments,
    )


@pytest.mark.parametrize("make_stream", [stream, generated])
def test_a_streamed_run_has_the_losses_of_the_same_rows_in_order(tmp_path, make_stream):
    expected = losses(trainer(tmp_path, Dataset.from_list(ROWS)))
    assert losses(trainer(tmp_path, make_stream(ROWS))) == expected


def test_a_stream_begins_again_where_steps_outlast_it(tmp_path):
    streamed = losses(trainer(tmp_path, stream(ROWS), max_steps=5))
    assert streamed == losses(trainer(tmp_path, Dataset.from_list(ROWS), max_steps=5))


def test_a_streamed_run_goes_on_from_a_checkpoint(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    expected = losses(trainer(tmp_path, stream(ROWS), **saving))
    run = trainer(tmp_path, stream(ROWS), **saving)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [entry["loss"] for entry in run.state.log_history if "loss" in entry] == expected


def test_streamed_evaluation_has_the_metrics_of_the_same_rows(tmp_path):
    evaluated = {"a": stream(ROWS[:5]), "b": Dataset.from_list(ROWS[:5])}
    run = trainer(tmp_path, stream(ROWS), eval_dataset=evaluated)
    metrics = run.evaluate()
    for key in ("loss", "rewards/margins", "logps/chosen"):
        assert metrics[f"eval_a_{key}"] == pytest.approx(metrics[f"eval_b_{key}"], abs=1e-6)
    later = run.evaluate(stream(ROWS[:5]))  # raw rows that come later are tokenized too
    assert later["eval_loss"] == pytest.approx(metrics["eval_b_loss"], abs=1e-6)


def test_rows_that_cannot_be_used_are_left_out_told_once_and_counted(tmp_path, caplog):
    rows = [ROWS[0], EQUAL, *ROWS[1:6], EQUAL, *ROWS[6:]]
    with caplog.at_level("WARNING"):
        run = trainer(tmp_path, stream(rows))
        assert losses(run) == losses(trainer(tmp_path, Dataset.from_list(ROWS)))
    told = [record.message for record in caplog.records if "of a stream" in record.message]
    assert told == [
        "dropped row 1 of a stream (counted from 0): chosen equals rejected; more such rows are only counted"
    ]
    report = run.data_reports["train"]
    assert (report.num_rows, report.num_kept, report.dropped) == (14, 12, {"chosen equals rejected": (1, 7)})
    assert report.lines() == [
        "a stream, tokenized as it is read; kept 12 of the first 14 pairs; dropped 2: chosen equals rejected"
        " (2: rows 1, 7)"
    ]
    with pytest.raises(ValueError, match=r"dataset row 1 .* cannot be used: chosen equals rejected"):
        losses(trainer(tmp_path, stream(rows), on_bad_row="raise"))


def test_repeated_prompts_that_meet_in_a_step_of_a_stream_are_computed_once(tmp_path):
    rows = [{**ROWS[0], "rejected": f"{word} never"} for word in ("dog", "bird", "tree", "river")]
    run = trainer(tmp_path, stream(rows))
    batch = next(iter(run.get_train_dataloader()))
    group = group_from_columns(next(iter(run.train_dataset)))
    assert batch["input_ids"].numel() < len(group.prompt_ids) * 2 + 4 * sum(map(len, group.responses))
    assert len(batch["pairs"]) == 4


def test_reference_log_probs_of_a_stream_are_used_and_missing_ones_are_not_cached(tmp_path):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in ROWS]
    assert trainer(tmp_path, stream(rows)).reference.mode == "cached"
    assert trainer(tmp_path, stream(ROWS)).reference.mode == "frozen"
    with pytest.raises(ValueError, match=r"reference must not be 'cached' .*train dataset"):
        trainer(tmp_path, stream(ROWS), reference="cached")
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs must be off .*train dataset"):
        trainer(tmp_path, stream(ROWS), precompute_ref_log_probs=True)
    ready = trainer(tmp_path, Dataset.from_list(ROWS), precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs must be off .*eval dataset"):
        ready.evaluate(stream(ROWS))


def test_a_row_of_a_stream_whose_reference_log_probs_are_of_a_longer_text_stops_the_run(tmp_path):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in ROWS]
    rows[3] = {**rows[3], "chosen": "the cat sees " * 9}
    with pytest.raises(ValueError, match=r"reference 'cached' must have .* in every row .*'frozen'"):
        losses(trainer(tmp_path, stream(rows), max_length=20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "max_steps must be > 0 .*got -1"),
        ({"regroup_dataset": True, "train_sampling_strategy": "random"}, "regroup_dataset must be off"),
        ({"length_bucketing": True, "train_sampling_strategy": "random"}, "length_bucketing must be off"),
        ({"max_tokens_per_microbatch": 64, "on_oversized_row": "raise"}, "on_oversized_row must be 'alone'"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches must not be True"),
    ],
)
def test_what_needs_all_rows_beforehand_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, stream(ROWS), **settings)


def test_rows_of_a_stream_that_the_model_cannot_read_stop_the_run(tmp_path):
    rows = [{"prompt_ids": [3, 4], "chosen_ids": [5], "rejected_ids": [6 if i < 9 else 32]} for i in range(12)]
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 32\), the train stream has 32"):
        losses(trainer(tmp_path, stream(rows)))


def test_an_unknown_format_or_an_empty_stream_stops_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"columns of a known format .* \(train dataset\)"):
        trainer(tmp_path, stream([{"question": "a", "answer": "b"}]))
    with pytest.raises(ValueError, match="got an empty stream"):
        trainer(tmp_path, generated([]))
    scores = {"correctness": 1, "coherence": 1, "complexity": 1, "verbosity": 1}
    with pytest.raises(ValueError, match=r"dataset must not be a stream .*single answers"):
        trainer(tmp_path, stream([{"prompt": "a", "response": "b", "helpfulness": 1, **scores}]))


def test_micro_batches_and_the_summary_work_on_a_stream(tmp_path):
    run = trainer(tmp_path, stream(ROWS), max_tokens_per_microbatch=40)
    assert losses(run) == pytest.approx(losses(trainer(tmp_path, stream(ROWS))), abs=1e-5)
    facts = dict(summary_lines(trainer(tmp_path, stream(ROWS))))
    assert facts["train data"].startswith("a stream, tokenized as it is read")
    assert facts["steps"].endswith("of a stream")
    assert "not estimated" not in facts["peak memory"]


@pytest.mark.parametrize("settings", [{"ld_alpha": 0.5}, {"loss_type": "plackett_luce"}])
def test_losses_that_change_rows_change_those_of_a_stream(tmp_path, settings):
    expected = losses(trainer(tmp_path, Dataset.from_list(ROWS), **settings))
    assert losses(trainer(tmp_path, stream(ROWS), **settings)) == expected


def test_supervised_fine_tuning_takes_streams(tmp_path):
    settings = {"trainer_class": SFTTrainer, "config_class": SFTConfig}
    expected = losses(trainer(tmp_path, Dataset.from_list(ROWS), **settings))
    assert losses(trainer(tmp_path, stream(ROWS), **settings)) == expected


def test_a_report_on_a_stream_counts_every_bad_row_and_holds_the_first_rows_of_each_reason():
    report = StreamReport("pairs")
    for _ in range(2):  # two epochs
        for row in range(10_000):
            report.add(row, None if row % 10 else "empty response")
    assert (report.num_rows, report.num_kept, report.num_dropped) == (10_000, 9_000, 1_000)
    assert report.dropped == {"empty response": (0, 10, 20, 30, 40, 50, 60, 70)}
    assert report.lines() == [
        "a stream, tokenized as it is read; kept 9000 of the first 10000 pairs; dropped 1000: empty response"
        " (1000: rows 0, 10, 20, 30, 40, 50, 60, 70, ...)"
    ]


def test_a_report_on_a_stream_holds_a_hundred_reasons_and_counts_the_rest():
    report = StreamReport("pairs")
    for row in range(1_000):
        report.add(row, f"unknown role '{row}'")
    assert (len(report.dropped), report.num_dropped, report.num_kept) == (101, 1_000, 0)
    assert report.dropped["other reasons"] == (100, 101, 102, 103, 104, 105, 106, 107)
    assert "dropped 1000: other reasons (900: rows 100, 101," in report.lines()[0]
