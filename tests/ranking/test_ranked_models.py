"""Models are ranked by what separate forwards over full logits say that they prefer."""

import json

import numpy as np
import pytest
import torch
from tiny import make_byte_tokenizer, make_llama, make_rows, make_tokenizer

from fastdpo import DPOConfig
from fastdpo.ranking.models import accuracy_record, rank_models
from fastdpo.ranking.runs import run_checkpoints
from fastdpo.rewards.intervals import wilson

ROWS = make_rows(24)


@pytest.fixture
def args(tmp_path):
    return DPOConfig(str(tmp_path / "out"), ref_cache_dir=str(tmp_path / "cache"), use_cpu=True, disable_tqdm=True)


def named(*seeds):
    return {f"seed {seed}": make_llama(seed=seed).eval() for seed in seeds}


def full_logits(model, prompt, response):
    """Sum over the response's tokens and EOS, from a forward of its own, and how many they are."""
    tokenizer = make_tokenizer()
    start = tokenizer(prompt)["input_ids"]
    answer = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([[*start, *answer]])
    with torch.no_grad():
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum().item(), len(answer)


def margins(model, rows, reference=None):
    """By measure, of each row."""
    found = {"sum": [], "mean": [], "reference": []}
    for row in rows:
        (chosen, of_chosen), (rejected, of_rejected) = (
            full_logits(model, row["prompt"], row[side]) for side in ("chosen", "rejected")
        )
        found["sum"].append(chosen - rejected)
        found["mean"].append(chosen / of_chosen - rejected / of_rejected)
        if reference is not None:
            theirs = [full_logits(reference, row["prompt"], row[side])[0] for side in ("chosen", "rejected")]
            found["reference"].append(chosen - rejected - theirs[0] + theirs[1])
    return {measure: np.array(values) for measure, values in found.items()}


def test_accuracies_and_wins_are_those_of_separate_forwards(args):
    models, reference = named(1, 2, 3), make_llama(seed=9).eval()
    expected = {name: margins(model, ROWS, reference) for name, model in models.items()}
    asked = []
    ranked = rank_models(
        models, args, ROWS, reference=reference, processing_class=make_tokenizer(), by="mean", on_model=asked.append
    )
    assert asked == ["reference", *models]  # one forward for each, whatever the number of pairs of models
    assert ranked.num_pairs == 24
    for measure in ("sum", "mean", "reference"):
        for index, name in enumerate(models):
            share = ranked.accuracies[measure][index]
            rate = float((expected[name][measure] > 0).mean())
            assert share.rate == rate, (measure, name)
            assert (share.lower, share.upper) == pytest.approx(wilson(rate * 24, 24))
    right = [expected[name]["mean"] > 0 for name in models]
    points = ranked.comparisons.points()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        wins, losses = (right[one] & ~right[other]).sum(), (right[other] & ~right[one]).sum()
        assert points[one, other] == wins + (24 - wins - losses) / 2
        assert points[other, one] == 24 - points[one, other]


def test_by_margin_the_larger_margin_wins(args):
    models = named(1, 2)
    one, other = (margins(model, ROWS)["sum"] for model in models.values())
    ranked = rank_models(models, args, ROWS, processing_class=make_tokenizer(), wins="margin")
    assert ranked.comparisons.counts().tolist() == [
        [(one > other).sum(), 0, (one < other).sum()],
        [(one < other).sum(), 0, (one > other).sum()],
    ]


def test_a_share_of_pairs_prefers_the_longer_response(args):
    models = named(1, 2)
    rows = [*ROWS, {"prompt": "the cat ", "chosen": "sees", "rejected": "finds"}]  # of one length: not counted
    longer = []
    for row in ROWS:
        (chosen, of_chosen), (rejected, of_rejected) = (
            full_logits(models["seed 1"], row["prompt"], row[side]) for side in ("chosen", "rejected")
        )
        if of_chosen != of_rejected:
            longer.append((chosen / of_chosen > rejected / of_rejected) == (of_chosen > of_rejected))
    ranked = rank_models(models, args, rows, processing_class=make_tokenizer(), by="mean")
    assert ranked.longer[0].num == len(longer)
    assert ranked.longer[0].rate == pytest.approx(np.mean(longer))
    record = accuracy_record(ranked, "seed 1")
    assert record["prefers_longer"] == ranked.longer[0].rate
    assert record["num_pairs"] == 25


def test_a_model_is_as_good_as_its_copy(args):
    model = make_llama(seed=1)
    ranked = rank_models({"one": model, "copy": make_llama(seed=1)}, args, ROWS, processing_class=make_tokenizer())
    assert ranked.comparisons.counts().tolist() == [[0, 24, 0], [0, 24, 0]]
    assert ranked.strengths.values == pytest.approx([0, 0], abs=1e-12)
    assert ranked.strengths.ranks() == [(1, 2), (1, 2)]


def test_a_model_that_is_its_own_reference_has_ties_only(args):
    models = named(1, 2)
    ranked = rank_models(models, args, ROWS, reference=models["seed 1"], processing_class=make_tokenizer())
    assert ranked.accuracies["reference"][0].text() == "ties only"
    assert ranked.accuracies["reference"][1].num_ties == 0


def test_pairs_of_one_prompt_and_of_one_ranking_are_one_cluster(args):
    ranking = {"prompt": "a bird ", "responses": ["eats", "finds the tree", "likes"], "scores": [1.0, 3.0, 2.0]}
    others = [{**ranking, "prompt": f"the {word} ", "scores": [3.0, 1.0, 2.0]} for word in ("cat", "dog", "cat")]
    ranked = rank_models(named(1, 2), args, [ranking, *others], processing_class=make_tokenizer())
    assert ranked.num_pairs == 12
    assert ranked.num_prompts == 3
    assert sorted(np.bincount(ranked.comparisons.clusters).tolist()) == [3, 3, 6]


def test_each_model_reads_its_own_tokens_and_only_pairs_that_all_can_read_count(args, tmp_path):
    words, letters = tmp_path / "words", tmp_path / "letters"
    make_llama(seed=1).save_pretrained(words)
    make_tokenizer().save_pretrained(words)
    make_llama(vocab_size=300, seed=2).save_pretrained(letters)
    make_byte_tokenizer().save_pretrained(letters)
    args.max_length, args.on_long_row = 40, "drop"  # no row has 40 words, but many have 40 letters
    tokenizer, kept = make_byte_tokenizer(), []
    for number, row in enumerate(ROWS):
        lengths = [len(tokenizer(row["prompt"] + row[side])["input_ids"]) + 1 for side in ("chosen", "rejected")]
        if max(lengths) <= 40:
            kept.append(number)
    assert 0 < len(kept) < 24
    ranked = rank_models([str(words), str(letters)], args, ROWS)
    assert ranked.num_pairs == len(kept)
    assert ranked.num_not_shared == 24 - len(kept)
    expected = margins(make_llama(seed=1).eval(), [ROWS[number] for number in kept])
    assert ranked.accuracies["sum"][0].rate == pytest.approx((expected["sum"] > 0).mean())
    reference = tmp_path / "reference"  # of both tokenizers' vocabularies, and asked once for each of them
    make_llama(vocab_size=300, seed=3).save_pretrained(reference)
    asked = []
    rank_models([str(words), str(letters)], args, ROWS, reference=str(reference), on_model=asked.append)
    assert asked == ["reference", "reference", str(words), str(letters)]


def test_a_model_that_wins_everything_has_an_accuracy_and_no_rating(args):
    models = named(1, 2)
    one, other = (margins(model, make_rows(60))["mean"] for model in models.values())
    rows = []
    for row, of_one, of_other in zip(make_rows(60), one, other, strict=True):
        if of_one > 0 > of_other:
            rows.append(row)
        elif of_one < 0 < of_other:
            rows.append({**row, "chosen": row["rejected"], "rejected": row["chosen"]})
    assert len(rows) > 3
    ranked = rank_models(models, args, rows, processing_class=make_tokenizer(), by="mean")
    assert [share.rate for share in ranked.accuracies["mean"]] == [1, 0]
    assert ranked.strengths is None
    assert "got seed 1 winning every comparison with seed 2" in ranked.no_strengths


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        (["a"], {}, r"at least two different ones, got \['a'\]"),
        ([], {}, r"at least two different ones, got \[\]"),
        (["a", "a"], {}, "at least two different ones"),
        (["a", "b"], {"by": "reference"}, "by must be 'sum' or 'mean' without a reference"),
        (["a", "b"], {"by": "length"}, "by must be one of .*got 'length'"),
        (["a", "b"], {"wins": "margins"}, "wins must be one of .*did you mean 'margin'"),
    ],
)
def test_what_cannot_be_ranked_is_refused_before_a_model_is_loaded(args, models, settings, message):
    with pytest.raises(ValueError, match=message):
        rank_models(models, args, ROWS, **settings)


def test_data_without_a_usable_pair_is_refused(args):
    same = [{"prompt": "the cat ", "chosen": "sees", "rejected": "sees"}]
    for rows in ([], same):
        with pytest.raises(ValueError, match="at least one"):
            rank_models(named(1, 2), args, rows, processing_class=make_tokenizer())


def test_checkpoints_of_a_run_come_in_the_order_of_their_steps(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-100"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "checkpoint-7").mkdir()  # of a run that was stopped while it saved
    (tmp_path / "checkpoint-last").mkdir()
    expected = [str(tmp_path / f"checkpoint-{step}") for step in (9, 10, 100)]
    assert run_checkpoints(tmp_path) == expected
    (tmp_path / "config.json").write_text("{}")
    assert run_checkpoints(tmp_path) == [*expected, str(tmp_path)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 100}))
    assert run_checkpoints(tmp_path) == expected  # the model at the end is checkpoint-100
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 110}))
    assert run_checkpoints(tmp_path) == [*expected, str(tmp_path)]
    assert run_checkpoints(tmp_path / "checkpoint-9") == []
