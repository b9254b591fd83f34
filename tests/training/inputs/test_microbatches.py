"""A batch that runs in micro-batches gives the loss, the gradient and the metrics of the whole batch."""

import copy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from closeness import relative_error, without_ties
from processes import on_processes
from tiny import make_llama, make_rows, make_tokenizer
from transformers import TrainerCallback

from fastdpo import DPOConfig, DPOTrainer, PackedBatch, SFTConfig, SFTTrainer, TokenizedGroup
from fastdpo.data.batches.microbatches import first_fit_decreasing, lay_out_batch
from fastdpo.training.callbacks.summary import summary_lines
from fastdpo.training.inputs.collator import PackingCollator, microbatches_of
from fastdpo.training.memory.estimate import largest_microbatch
from fastdpo.training.memory.token_budget import BudgetAtStart, fit_line

SETTINGS = {
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def token_row(prompt, chosen, rejected, **columns):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **columns}


# 17 tokens at most: a budget of 16 has a row that fills it alone and one that exceeds it
STRESS = [
    token_row([1, 5, 6], [7], [8]),  # one token each
    token_row([1], [9, 10, 11], [12, 13]),  # a prompt of one token
    token_row([1], [5], [6]),
    token_row([1, 8], [9, 10, 11, 12, 13, 14], [9, 10, 11, 12, 13, 15]),  # equal up to the last token
    token_row([1, 9, 9], [5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]),  # fills 16
    token_row([1, 7, 7, 7], [5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]),  # exceeds it
    token_row([1, 5, 6], [7], [9, 10]),  # the first prompt again, and its chosen response
    token_row([1, 20, 21, 22], [23, 24], [25, 26, 27]),
]


def dpo_trainer(tmp_path, rows, model=None, **settings):
    keywords = {k: settings.pop(k) for k in ("eval_dataset", "ref_model", "callbacks") if k in settings}
    settings = {"per_device_train_batch_size": len(rows), "beta": 0.5, **SETTINGS, **settings}
    return DPOTrainer(
        make_llama() if model is None else model,
        args=DPOConfig(str(tmp_path), **settings),
        train_dataset=rows,
        processing_class=make_tokenizer(),
        **keywords,
    )


def gradients(trainer, rows=None):
    """Loss and flat gradient of one training step over all rows."""
    trainer.model.zero_grad()
    if trainer.optimizer is None:
        trainer.create_optimizer()
    inputs = trainer.collator(list(trainer.train_dataset) if rows is None else rows)
    loss = trainer.training_step(trainer.model, inputs)
    return loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), len(microbatches_of(inputs))


def other_start():
    """A reference that is not the policy, so that pairs differ in weight."""
    return make_llama(seed=1)


# Bins


def test_the_largest_items_come_first_and_each_goes_where_there_is_room():
    assert first_fit_decreasing([3, 7, 2, 5, 4], 8) == [[1], [0, 3], [2, 4]]
    assert first_fit_decreasing([9, 1], 8) == [[0], [1]]  # too large for a bin, and nothing joins it
    assert first_fit_decreasing([], 8) == []


def test_bins_hold_every_item_once_within_capacity_and_are_few():
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes = rng.integers(1, 100, size=40).tolist()
        bins = first_fit_decreasing(sizes, 120)
        assert sorted(i for items in bins for i in items) == list(range(40))
        assert max(sum(sizes[i] for i in items) for items in bins) <= 120
        fewest = -(-sum(sizes) // 120)
        assert len(bins) <= 11 / 9 * max(fewest, sum(size > 60 for size in sizes)) + 2


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])
def test_micro_batches_stay_within_the_budget_and_hold_whole_rows_once(is_packed):
    inputs = PackingCollator(is_packed=is_packed, max_tokens=24)(STRESS)
    batches = [PackedBatch(**part) for part in microbatches_of(inputs)]
    assert len(batches) > 2
    assert all(batch.input_ids.numel() <= 24 for batch in batches)
    examples = [example for batch in batches for example in batch.example_ids.tolist()]
    assert sorted(examples) == [i for i in range(len(STRESS)) for _ in range(2)]
    assert inputs["pairs"].shape == (len(STRESS), 2)
    assert inputs["input_ids"].numel() == sum(batch.input_ids.numel() for batch in batches)


def test_a_batch_that_fits_is_one_micro_batch():
    collated = PackingCollator(max_tokens=10_000)(STRESS)
    assert "microbatches" not in collated
    assert torch.equal(collated["input_ids"], PackingCollator()(STRESS)["input_ids"])


# Groups


RANKED = [[8 + i, 15 + i, 22 + i] for i in range(7)]  # seven ranked answers, all different


def ranked_rows():
    """Six pairs of one prompt, each answer against the next worse one."""
    return [token_row([1, 2, 3, 4], better, worse) for better, worse in pairwise(RANKED)]


def test_seven_ranked_answers_as_six_pairs_run_once():
    other = token_row([9, 9], [5], [6])
    inputs = PackingCollator()([ranked_rows()[0], other, *ranked_rows()[1:]])
    batch = PackedBatch(**inputs)
    assert batch.input_ids.numel() == 4 + 7 * 3 + 2 + 2
    assert batch.num_pairs == 7
    assert batch.num_tokens == 6 * 2 * 7 + 2 * 3  # as TRL counts them: every prompt once per response
    assert batch.example_ids.tolist() == [0, 0, *(i for i in range(2, 7) for _ in range(2)), 1, 1]


def test_groups_are_not_merged_where_that_would_cost_tokens_or_exceed_the_limit():
    shared = [list(range(5, 25)), list(range(40, 60))]  # each pair has twenty response tokens in common
    groups = [TokenizedGroup([1], [[*s, 2], [*s, 3]]) for s in shared]
    assert [layout.num_tokens for layout in lay_out_batch(groups)] == [23, 23]
    ranked = [TokenizedGroup(r["prompt_ids"], [r["chosen_ids"], r["rejected_ids"]]) for r in ranked_rows()]
    assert [layout.num_tokens for layout in lay_out_batch(ranked)] == [25]
    assert [layout.num_tokens for layout in lay_out_batch(ranked, max_tokens=16)] == [16, 16]
    assert len(lay_out_batch(ranked, prefix_sharing=False)) == 6


def test_rows_that_share_no_more_than_a_bos_stay_groups_of_their_own():
    groups = [TokenizedGroup([1], [list(range(10 * i, 10 * i + 40)), [i] * 30]) for i in range(2, 8)]
    assert len(lay_out_batch(groups)) == 6


def test_responses_without_a_common_prompt_are_left_alone():
    group = TokenizedGroup([], [[1, 2, 3], [4, 5, 6]], [[False, True, True]] * 2)
    assert len(lay_out_batch([group, group])) == 2


@pytest.mark.parametrize("brings_reference", [False, True], ids=["live", "cached"])
def test_grouped_pairs_have_the_loss_and_the_gradient_of_separate_ones(tmp_path, brings_reference):
    """With a cached reference each pair keeps its own log-probs, even where two rows disagree on one response."""
    rows = ranked_rows()
    if brings_reference:
        rows = [{**row, "ref_chosen_logps": -9.0 - i, "ref_rejected_logps": -11.0 + i} for i, row in enumerate(rows)]
    reference = {} if brings_reference else {"ref_model": other_start()}
    trainer = dpo_trainer(tmp_path, rows, **copy.deepcopy(reference))
    loss, grouped, _ = gradients(trainer)
    num_run = trainer.collator(list(trainer.train_dataset))["input_ids"].numel()
    separate = [gradients(trainer, [row]) for row in trainer.train_dataset]
    assert num_run == 25
    assert loss.item() == pytest.approx(np.mean([one.item() for one, _, _ in separate]), rel=1e-6)
    assert relative_error(grouped, torch.stack([g for _, g, _ in separate]).mean(0)) <= 2e-6


# Loss and gradient


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 16, 30, 45])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path, budget, packing):
    whole = dpo_trainer(tmp_path, STRESS, packing=packing, ref_model=other_start())
    split = dpo_trainer(tmp_path, STRESS, packing=packing, ref_model=other_start(), max_tokens_per_microbatch=budget)
    loss, exact, num_whole = gradients(whole)
    split_loss, actual, num_split = gradients(split)
    assert num_whole == 1
    assert num_split > 1
    assert split_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(actual, exact) <= 1e-6


def without_times(log):
    return {key: value for key, value in without_ties(log).items() if not key.endswith(("runtime", "per_second"))}


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "num_rows"),
    [(12, 1, 24), (6, 2, 24), (4, 3, 10)],
    ids=["12x1", "6x2", "10 as 4+4+2"],
)
def test_a_run_in_micro_batches_logs_what_a_run_of_whole_batches_does(tmp_path, batch_size, accumulation, num_rows):
    settings = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 5,
        "eval_dataset": make_rows(5, seed=1),
        "per_device_eval_batch_size": 3,
        "include_num_input_tokens_seen": "all",
    }
    whole = dpo_trainer(tmp_path, make_rows(num_rows), **settings)
    split = dpo_trainer(tmp_path, make_rows(num_rows), **settings, max_tokens_per_microbatch=40)
    for trainer in (whole, split):
        trainer.train()
        trainer.evaluate()
    assert len(whole.state.log_history) == 7
    assert whole.state.log_history[0]["loss"] != whole.state.log_history[4]["loss"]
    for expected, actual in zip(whole.state.log_history, split.state.log_history, strict=True):
        assert without_times(actual) == pytest.approx(without_times(expected), rel=2e-4, abs=2e-5)
    assert split.state.total_flos == whole.state.total_flos > 0


def test_fine_tuning_is_split_too(tmp_path):
    rows = [{"prompt_ids": r["prompt_ids"], "responses": [r["chosen_ids"]], "preferences": []} for r in STRESS]

    def trainer(**settings):
        args = SFTConfig(str(tmp_path), per_device_train_batch_size=len(rows), **SETTINGS, **settings)
        return SFTTrainer(make_llama(), args=args, train_dataset=rows, processing_class=make_tokenizer())

    loss, exact, _ = gradients(trainer())
    split_loss, actual, num_split = gradients(trainer(max_tokens_per_microbatch=12))
    assert num_split > 2
    assert split_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(actual, exact) <= 1e-6


def test_a_micro_batch_whose_loss_is_not_finite_stops_the_run(tmp_path):
    rows = [*STRESS, token_row([1, 31], [6], [30])]
    model = make_llama()
    trainer = dpo_trainer(tmp_path, rows, model, max_tokens_per_microbatch=16)
    with torch.no_grad():
        model.model.embed_tokens.weight[31] = float("inf")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(FloatingPointError, match="nonfinite_batch"):
        trainer.train()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    saved = torch.load(tmp_path / "nonfinite_batch_rank0.pt", weights_only=True)["inputs"]
    assert 31 in saved["input_ids"]
    assert saved["input_ids"].numel() <= 16  # the one micro-batch


def test_losses_are_read_back_once_a_step_and_before_weights_change(tmp_path, monkeypatch):
    """Reading one waits for the device; a step has 2 batches of several micro-batches here."""
    looks, steps = [], []
    trainer = dpo_trainer(
        tmp_path,
        STRESS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        max_tokens_per_microbatch=16,
    )
    look = trainer._losses.check
    monkeypatch.setattr(trainer._losses, "check", lambda of: looks.append(len(trainer._losses.unchecked)) or look(of))

    class Steps(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            steps.append(len(looks))

    trainer.add_callback(Steps())
    trainer.train()
    assert steps == [1, 2, 3]
    assert min(looks) > 4
    assert not trainer._losses.unchecked


def test_an_optimizer_that_steps_in_backward_has_its_losses_read_before(tmp_path, monkeypatch):
    trainer = dpo_trainer(tmp_path, STRESS)
    monkeypatch.setattr("fastdpo.training.stepping.steps_in_backward", lambda trainer: True)
    with torch.no_grad():
        trainer.model.lm_head.weight[7] = float("nan")
    with pytest.raises(FloatingPointError):
        trainer.compute_loss(trainer.model.train(), trainer.collator(list(trainer.train_dataset)))


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_input_tokens_without_padding_can_be_counted(tmp_path, packing):
    seen = {}
    for budget in (None, 45):
        trainer = dpo_trainer(
            tmp_path,
            STRESS,
            packing=packing,
            max_steps=1,
            max_tokens_per_microbatch=budget,
            include_num_input_tokens_seen="non_padding",
        )
        trainer.train()
        seen[budget] = trainer.state.num_input_tokens_seen
    whole = [len(r["prompt_ids"]) + len(r[side]) for r in STRESS for side in ("chosen_ids", "rejected_ids")]
    packed = PackingCollator()(STRESS)["input_ids"].numel()
    assert seen == dict.fromkeys((None, 45), packed if packing == "packed" else sum(whole))


# Rows that exceed the budget


class Warnings:
    """What a module's logger warned of; transformers' loggers do not reach pytest's handler."""

    def __init__(self, monkeypatch):
        self.texts = []
        monkeypatch.setattr("fastdpo.training.memory.token_budget.logger.warning", self.texts.append)


def test_a_row_above_the_budget_has_a_micro_batch_of_its_own_and_one_warning(tmp_path, monkeypatch):
    warned = Warnings(monkeypatch)
    trainer = dpo_trainer(tmp_path, STRESS, max_tokens_per_microbatch=16, max_steps=3)
    sizes = [part["input_ids"].numel() for part in microbatches_of(trainer.collator(list(trainer.train_dataset)))]
    assert max(sizes) == 17
    assert sizes.count(16) >= 1
    trainer.train()
    assert len(warned.texts) == 1
    assert "1 of 8 rows of the train dataset" in warned.texts[0]
    assert "row 5 (counted from 0) has 17" in warned.texts[0]


@pytest.mark.parametrize(("packing", "size"), [("packed", 17), ("padded", 22)])
def test_a_row_above_the_budget_is_refused_where_that_was_asked_for(tmp_path, packing, size):
    settings = {"on_oversized_row": "raise", "packing": packing}
    with pytest.raises(ValueError, match=f"row 5 .* has {size}"):
        dpo_trainer(tmp_path, STRESS, max_tokens_per_microbatch=size - 1, **settings)
    dpo_trainer(tmp_path, STRESS, max_tokens_per_microbatch=size, **settings)


def test_the_summary_says_the_limit_and_estimates_with_it(tmp_path):
    whole = dpo_trainer(tmp_path, make_rows(40))
    split = dpo_trainer(tmp_path, make_rows(40), max_tokens_per_microbatch=100)
    assert "in micro-batches of at most 100 tokens" in dict(summary_lines(split))["batches"]
    assert 90 < largest_microbatch(split).num_tokens <= 100 < largest_microbatch(whole).num_tokens


@pytest.mark.parametrize(("text", "value"), [("4096", 4096), ("none", None), ("auto", "auto"), (7, 7)])
def test_a_budget_may_come_as_text(tmp_path, text, value):
    assert DPOConfig(str(tmp_path), use_cpu=True, max_tokens_per_microbatch=text).max_tokens_per_microbatch == value


@pytest.mark.parametrize("value", [0, -5, "many", 1.5, True])
def test_a_budget_that_is_none_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="max_tokens_per_microbatch must be"):
        DPOConfig(str(tmp_path), use_cpu=True, max_tokens_per_microbatch=value)


def test_settings_that_cannot_go_with_a_budget_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data_collator must be None"):
        DPOTrainer(
            make_llama(),
            args=DPOConfig(str(tmp_path), use_cpu=True, max_tokens_per_microbatch=100),
            data_collator=PackingCollator(),
            train_dataset=make_rows(4),
            processing_class=make_tokenizer(),
        )
    with pytest.raises(ValueError, match="lomo"):
        dpo_trainer(tmp_path, STRESS, max_tokens_per_microbatch=100, optim="lomo")


# "auto"


class SavedTensors:
    """A meter that runs on a CPU: bytes that autograd saves, of a memory of a given size."""

    def __init__(self, num_bytes):
        self.num_bytes = num_bytes

    def free(self):
        return self.num_bytes

    def peak_of(self, run):
        storages = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
            return tensor

        kept = []
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run()
        return sum(storages.values())


def test_auto_is_found_once_from_memory_and_leaves_no_trace(tmp_path, monkeypatch):
    rows = make_rows(400)
    found = {}
    for num_bytes in (40e6, 80e6):
        monkeypatch.setattr(BudgetAtStart, "meter", lambda self, device, n=num_bytes: SavedTensors(n))
        auto = dpo_trainer(
            tmp_path, rows, per_device_train_batch_size=40, max_tokens_per_microbatch="auto", max_steps=3
        )
        assert auto.collator.max_tokens is None
        auto.train()
        found[num_bytes] = auto.collator.max_tokens
    plain = dpo_trainer(tmp_path, rows, per_device_train_batch_size=40, max_steps=3)
    plain.train()
    losses_of = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (auto, plain)]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-5)
    assert auto.state.log_history[0]["num_tokens"] == plain.state.log_history[0]["num_tokens"]
    # what more memory holds is what it costs, measured again on batches of other sizes
    meter, budget = SavedTensors(0), BudgetAtStart(auto, auto._loss_of)
    auto.collator.max_tokens = None
    batches = [list(auto.train_dataset)[:num_rows] for num_rows in (40, 400)]
    sizes = [auto.collator(batch)["input_ids"].numel() for batch in batches]
    run_rows = partial(budget.run_rows, auto.model, auto.args.device)
    peaks = [meter.peak_of(partial(run_rows, batch)) for batch in batches]
    per_token = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    assert (found[80e6] - found[40e6]) * per_token == pytest.approx(0.85 * 40e6, rel=0.1)


def test_auto_measures_the_rows_that_are_trained_on_with_their_cached_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(BudgetAtStart, "meter", lambda self, device: SavedTensors(80e6))
    cached = {"reference": "cached", "ref_cache_dir": str(tmp_path / "cache")}
    trainer = dpo_trainer(
        tmp_path, STRESS, per_device_train_batch_size=4, max_tokens_per_microbatch="auto", max_steps=1, **cached
    )
    trainer.train()
    assert trainer.collator.max_tokens > 17


def test_auto_sets_no_limit_on_a_cpu(tmp_path):
    trainer = dpo_trainer(tmp_path, STRESS, max_tokens_per_microbatch="auto", max_steps=1)
    trainer.train()
    assert trainer.collator.max_tokens is None


def test_the_line_through_two_measurements_is_followed_to_the_free_memory():
    assert fit_line([1000, 3000], [1_500_000, 3_500_000], 5_700_000) == 5120  # 1,000 a token, 500,000 once
    with pytest.raises(ValueError, match=r"max_tokens_per_microbatch must .*got 'auto'"):
        fit_line([1000, 3000], [1_500_000, 3_500_000], 600_000)
    with pytest.raises(ValueError, match=r"max_tokens_per_microbatch must .*got 'auto'"):
        fit_line([1000, 3000], [1_500_000, 1_500_000], 6e9)


# Two processes

TWO = {  # of each of two processes
    "replicated": {"batch_size": 2, "accumulation": 2, "budget": 16},
    "sharded": {"batch_size": 4, "budget": 16, "shards_weights": True},
}


def train(folder, batch_size, accumulation=1, budget=None, shards_weights=False):
    """What a process has seen of a run; `shards_weights`: with as many forwards on every process, as sharding needs."""
    trainer = dpo_trainer(
        folder,
        STRESS,
        ref_model=other_start(),
        per_device_train_batch_size=batch_size,
        max_steps=3,
        eval_dataset=STRESS[:5],
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_tokens_per_microbatch=budget,
        balance_ranks=False,  # which gives these processes equally many
    )
    if shards_weights:
        trainer._shards_weights = lambda: True
    counts, forwards = [], []
    collate, loss_sum = trainer.collator.__call__, trainer._loss_sum
    trainer.data_collator = lambda rows: counts.append(len(microbatches_of(inputs := collate(rows)))) or inputs
    trainer._loss_sum = lambda *args: forwards.append(1) or loss_sum(*args)
    trainer.train()
    in_training = len(forwards)
    evaluated = trainer.evaluate()
    weights = {name: p.double().sum().item() for name, p in trainer.model.named_parameters()}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"logs": logs, "weights": weights, "eval": evaluated, "counts": counts, "forwards": in_training}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """By case, what each of two processes has seen."""
    found = on_processes(train, list(TWO.values()), tmp_path_factory.mktemp("two"))
    return dict(zip(TWO, found, strict=True))


@pytest.mark.parametrize("mode", TWO)
def test_two_processes_with_different_numbers_of_micro_batches_train_like_one(tmp_path, of_two, mode):
    """`sharded` runs on replicated weights: it shows that forwards are made equal in number and change nothing."""
    one, two = train(tmp_path, 8), of_two[mode]
    accumulation = TWO[mode].get("accumulation", 1)
    counts = [process["counts"][: 3 * accumulation] for process in two]
    assert len(one["logs"]) == 3
    assert any(a != b for a, b in zip(*counts, strict=True)), counts
    if mode == "sharded":
        assert two[0]["forwards"] == two[1]["forwards"] == sum(map(max, zip(*counts, strict=True)))
    for single, double in zip(one["logs"], two[0]["logs"], strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy", "num_tokens"):
            assert double[key] == pytest.approx(single[key], rel=1e-4, abs=1e-5), key
    assert one["logs"][0]["loss"] != one["logs"][-1]["loss"]
    for process in two:
        assert process["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-4)
        # 5 rows on two processes: rows are repeated, in micro-batches too, and must not count twice
        for key in ("eval_loss", "eval_rewards/margins", "eval_logps/rejected"):
            assert process["eval"][key] == pytest.approx(one["eval"][key], abs=1e-5), key
