"""Log-probs are those of a live reference, follow their rows, and are computed once."""

import copy
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import make_llama, make_rows, make_tokenizer

from fastdpo import pack_pairs, packed_logps
from fastdpo.data.batches.packing import pad_pairs
from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.references import precompute
from fastdpo.references.cache import LogpsCache
from fastdpo.references.fingerprint import reference_facts
from fastdpo.references.precompute import Scorer, fill_ref_logps
from fastdpo.references.rows import read_groups

GPU_IS_FULL = torch.OutOfMemoryError("as if there were no more")
CPU_IS_FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


class Counting:
    """A model to score with, that remembers what it was asked."""

    def __init__(self, model=None, is_packed=True, tokens_per_batch=100, fail_above=None, error=GPU_IS_FULL):
        self.model = make_llama().eval() if model is None else model
        self.batches = []  # tokens, sequences
        self.fail_above, self.error = fail_above, error
        collate = pack_pairs if is_packed else pad_pairs
        self.scorer = Scorer(self.score, collate, is_packed, tokens_per_batch, show_progress=False)

    def score(self, batch):
        if self.fail_above is not None and batch.input_ids.numel() > self.fail_above:
            raise self.error
        self.batches.append((batch.input_ids.numel(), batch.num_sequences))
        with torch.no_grad():
            return packed_logps(self.model, batch).sequences.sums

    @property
    def num_sequences(self):
        return sum(sequences for _, sequences in self.batches)

    def cache(self, tmp_path):
        return LogpsCache(tmp_path / "cache", reference_facts(self.model, adapter=None, computed_in="no autocast"))


def sums_of(model, row):
    """Log-probs of the responses of one row, each by a forward of its own with full logits."""
    group = group_from_columns(row)
    sums = []
    for index, response in enumerate(group.responses):
        ids = torch.tensor([[*group.prompt_ids, *response]])
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        picked = logps.gather(-1, ids[0, 1:, None])[len(group.prompt_ids) - 1 :, 0]
        if group.loss_masks is not None:
            picked = picked[torch.tensor(group.loss_masks[index])]
        sums.append(picked.sum().item())
    return sums


def separately(model, row):
    """What `sums_of` is in fp64, to twice what it is off by in fp32 and the last bits that fp32 has."""
    plain, exact = sums_of(model, row), sums_of(copy.deepcopy(model).double(), row)
    return pytest.approx(exact, rel=1e-6, abs=2 * max(abs(p - e) for p, e in zip(plain, exact, strict=True)))


@pytest.mark.parametrize("is_packed", [True, False])
def test_filled_rows_hold_what_separate_forwards_give(dataset, tmp_path, is_packed):
    asked = Counting(is_packed=is_packed)
    filled, counts = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert filled.column_names == dataset.column_names
    for before, after in zip(dataset, filled, strict=True):
        assert {**before, "ref_logps": None} == {**after, "ref_logps": None}
        assert after["ref_logps"] == separately(asked.model, before)
    assert (counts.num_rows, counts.num_brought, counts.num_found, counts.num_computed) == (40, 0, 0, 40)
    assert len(asked.batches) > 3
    assert max(tokens for tokens, _ in asked.batches) <= 100


def test_three_responses_and_loss_masks(tmp_path):
    rows = [
        {
            "prompt_ids": [1, 4 + i],
            "responses": [[5, 6, 7], [5, 8], [9, i, 11, 2]],
            "loss_masks": [[True, False, True], [False, True], [True, True, True, i % 2 == 0]],
            "preferences": [[0, 1], [0, 2], [2, 1]],
        }
        for i in range(6)
    ]
    dataset, _ = prepare_preference_dataset(rows, make_tokenizer(), TokenizationSettings())
    asked = Counting(tokens_per_batch=30)
    filled, _ = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    for row in filled:
        assert len(row["ref_logps"]) == 3
        assert row["ref_logps"] == separately(asked.model, row)


def test_nothing_is_computed_twice_in_whatever_order_and_split_rows_come(dataset, tmp_path):
    asked = Counting()
    filled, _ = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    expected = {str(row["responses"]): row["ref_logps"] for row in filled}
    assert asked.num_sequences == 80
    parts = dataset.shuffle(seed=5).train_test_split(test_size=0.3, seed=2)
    for part in parts.values():
        again, counts = fill_ref_logps(part, asked.cache(tmp_path), None)
        assert counts.num_found == len(part)
        assert all(row["ref_logps"] == expected[str(row["responses"])] for row in again)
    assert asked.num_sequences == 80


def test_equal_rows_are_computed_once(dataset, tmp_path):
    asked = Counting()
    twice = dataset.select([0, 1, 0, 1, 1])
    filled, counts = fill_ref_logps(twice, asked.cache(tmp_path), asked.scorer)
    assert asked.num_sequences == 4
    assert counts.num_computed == 5
    assert filled["ref_logps"][0] == filled["ref_logps"][2]


def test_rows_that_truncation_or_a_mask_changes_are_computed_again_and_no_others(tmp_path):
    asked = Counting()
    whole, _ = prepare_preference_dataset(make_rows(40), make_tokenizer(), TokenizationSettings())
    fill_ref_logps(whole, asked.cache(tmp_path), asked.scorer)
    cut, _ = prepare_preference_dataset(make_rows(40), make_tokenizer(), TokenizationSettings(max_length=12))
    changed = sum(
        a["responses"] != b["responses"] or a["prompt_ids"] != b["prompt_ids"] for a, b in zip(whole, cut, strict=True)
    )
    assert 0 < changed < 40
    filled, counts = fill_ref_logps(cut, asked.cache(tmp_path), asked.scorer)
    assert counts.num_computed == changed
    masked = cut.select([0]).to_list()
    masked[0]["loss_masks"] = [[True] * (len(r) - 1) + [False] for r in masked[0]["responses"]]
    masked = Dataset.from_list(masked, features=cut.features)
    again, counts = fill_ref_logps(masked, asked.cache(tmp_path), asked.scorer)
    assert counts.num_computed == 1
    assert again["ref_logps"][0] == separately(asked.model, masked[0])
    assert again["ref_logps"][0] != pytest.approx(filled["ref_logps"][0], abs=1e-3)


@pytest.mark.parametrize("is_packed", [True, False])
def test_pairs_of_ranked_answers_run_each_answer_once_and_the_prompt_as_seldom_as_fits(tmp_path, is_packed):
    answers = [[10 + i, 20, 3 + i, 2] for i in range(7)]
    rows = [
        {"prompt_ids": [1, 5, prompt], "chosen_ids": answers[0], "rejected_ids": answers[i]}
        for prompt in (6, 7)
        for i in range(1, 7)
    ]
    dataset, _ = prepare_preference_dataset(rows, make_tokenizer(), TokenizationSettings())
    asked = Counting(tokens_per_batch=23, is_packed=is_packed)  # a prompt with five answers
    filled, counts = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert asked.num_sequences == 14
    assert counts.num_computed == 12
    if is_packed:
        assert sorted(asked.batches) == [(2 * (3 + 2 * 4), 4)] + [(3 + 5 * 4, 5)] * 2
    for row in filled:
        assert row["ref_logps"] == separately(asked.model, row)


def test_a_prompt_whose_answers_do_not_fit_together_is_halved(tmp_path):
    answers = [[10 + i, 20, 3 + i, 2] for i in range(7)]
    rows = [{"prompt_ids": [1, 5], "chosen_ids": answers[0], "rejected_ids": answers[i]} for i in range(1, 7)]
    dataset, _ = prepare_preference_dataset(rows, make_tokenizer(), TokenizationSettings())
    asked = Counting(fail_above=12)
    filled, _ = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert asked.num_sequences == 7
    for row in filled:
        assert row["ref_logps"] == separately(asked.model, row)


def test_a_changed_model_finds_nothing(dataset, tmp_path):
    asked = Counting()
    filled, _ = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    with torch.no_grad():
        asked.model.lm_head.weight[3] += 0.1
    again, counts = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert counts.num_computed == 40
    assert again["ref_logps"][0] != filled["ref_logps"][0]


def test_what_the_dataset_brings_is_kept_and_what_it_lacks_computed(tmp_path):
    rows = make_rows(6)
    rows[2] |= {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    dataset, _ = prepare_preference_dataset(rows, make_tokenizer(), TokenizationSettings())
    asked = Counting()
    filled, counts = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert filled["ref_logps"][2] == [-1.0, -2.0]
    assert (counts.num_brought, counts.num_computed, asked.num_sequences) == (1, 5, 10)


def test_a_damaged_file_is_computed_again_with_one_warning(dataset, tmp_path, caplog):
    asked = Counting()
    cache = asked.cache(tmp_path)
    filled, _ = fill_ref_logps(dataset, cache, asked.scorer)
    (shard,) = cache.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-5])
    again, counts = fill_ref_logps(dataset, cache, asked.scorer)
    assert counts.num_computed == 40
    assert again["ref_logps"] == filled["ref_logps"]
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert fill_ref_logps(dataset, cache, None)[1].num_found == 40


def test_rows_that_nobody_can_compute_any_more_are_an_error(dataset, tmp_path):
    with pytest.raises(ValueError, match="later dataset must have reference log-probs, got 40 rows"):
        fill_ref_logps(dataset, Counting().cache(tmp_path), None, name="later")


@pytest.mark.parametrize("error", [GPU_IS_FULL, CPU_IS_FULL], ids=["GPU", "CPU"])
def test_a_batch_that_does_not_fit_is_halved(dataset, tmp_path, caplog, error):
    asked = Counting(tokens_per_batch=400, fail_above=150, error=error)
    filled, counts = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert counts.num_computed == 40
    assert asked.num_sequences == 80
    assert max(tokens for tokens, _ in asked.batches) <= 150
    assert "Out of memory" in caplog.text
    assert filled["ref_logps"][7] == separately(asked.model, dataset[7])


def test_a_row_that_does_not_fit_alone_stops_the_run_with_its_number_and_length(dataset, tmp_path):
    asked = Counting(fail_above=10)
    with pytest.raises(
        ValueError, match=r"row \d+ of the prepared train dataset .* has a sequence of \d+ tokens, which"
    ):
        fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)


def test_another_error_in_a_batch_is_not_taken_for_memory(dataset, tmp_path):
    asked = Counting(fail_above=10, error=RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)


def test_log_probs_that_are_not_finite_are_refused_and_not_kept(dataset, tmp_path):
    asked = Counting()
    with torch.no_grad():
        asked.model.lm_head.weight[2] = float("nan")
    with pytest.raises(ValueError, match="finite log-probs, got nan"):
        fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert not list(asked.cache(tmp_path).folder.glob("*.safetensors"))


def test_an_interrupted_run_keeps_what_it_had(dataset, tmp_path):
    asked = Counting()
    score = asked.score

    def interrupted(batch):
        if len(asked.batches) == 3:
            raise KeyboardInterrupt
        return score(batch)

    with pytest.raises(KeyboardInterrupt):
        fill_ref_logps(dataset, asked.cache(tmp_path), Scorer(interrupted, pack_pairs, True, 100, False))
    before = asked.num_sequences
    assert 0 < before < 80
    fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert asked.num_sequences == 80


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import test_precompute
from pathlib import Path
from tiny import make_rows, make_tokenizer
from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.references import precompute

dataset, _ = prepare_preference_dataset(make_rows(40), make_tokenizer(), TokenizationSettings())
precompute._SECONDS_PER_SHARD = 0.0
asked = test_precompute.Counting()
score = asked.score

def killed(batch):
    if len(asked.batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    sums = score(batch)
    print(batch.num_sequences, flush=True)
    return sums

scorer = precompute.Scorer(killed, test_precompute.pack_pairs, True, 100, False)
precompute.fill_ref_logps(dataset, asked.cache(Path(sys.argv[1])), scorer)
"""


def test_a_killed_run_resumes_without_computing_again_what_it_had(dataset, tmp_path):
    here = Path(__file__).parent
    script = KILLED.format(paths=[str(here), str(here.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    before = sum(map(int, result.stdout.split()))
    assert 0 < before < 80
    asked = Counting()
    filled, counts = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert asked.num_sequences == 80 - before
    assert counts.num_found == before // 2
    assert filled["ref_logps"][5] == separately(asked.model, dataset[5])


def test_each_of_two_processes_computes_its_share(dataset, tmp_path, monkeypatch):
    """Without process groups: the two take turns, and the first finds that the folder lacks the other's rows."""
    monkeypatch.setattr(precompute, "_wait_for_all", lambda: None)
    monkeypatch.setattr(precompute, "_gathered", lambda key: [key, key])
    both = []
    for index in (0, 1):
        monkeypatch.setattr(precompute, "_process", lambda index=index: (index, 2))
        asked = Counting()
        both.append(asked)
        if index == 0:
            with pytest.raises(ValueError, match=r"ref_cache_dir must .*processes share, got"):
                fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
        else:
            filled, _ = fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert both[0].num_sequences + both[1].num_sequences == 80
    assert 20 < both[0].num_sequences < 60
    assert filled["ref_logps"][5] == separately(asked.model, dataset[5])


def test_processes_that_hold_different_references_are_refused(dataset, tmp_path, monkeypatch):
    asked = Counting()
    monkeypatch.setattr(precompute, "_gathered", lambda key: [key, "another"])
    with pytest.raises(ValueError, match="the reference must have the same weights"):
        fill_ref_logps(dataset, asked.cache(tmp_path), asked.scorer)
    assert not asked.batches


def test_groups_read_from_arrow_are_those_of_the_rows(dataset):
    part = dataset.shuffle(seed=1).select(range(3, 20))
    for group, row in zip(read_groups(part, [4, 2, 9]), part.select([4, 2, 9]), strict=True):
        expected = group_from_columns(row)
        assert list(group.prompt_ids) == expected.prompt_ids
        assert [list(response) for response in group.responses] == expected.responses
        assert tuple(group.preferences) == expected.preferences
