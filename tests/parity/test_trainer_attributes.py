"""TRL's DPOTrainer and ours by introspection: a public attribute that a release of TRL brings is here with its meaning,
or answered with what to read instead.
"""

import inspect

import pytest
import torch
from datasets import Dataset
from peers import peer
from tiny import make_llama, make_rows, save_model
from tiny_runs import make_lora, tiny_trainer
from transformers import TrainerCallback

import fastdpo
from fastdpo.training.trl_attributes import INSTEAD

SETTINGS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
# Of TRL's values, those that say something else here, each with the reason.
OTHERWISE = {
    "args": "a config of its own class",
    "loss_is_scaled_for_ga": "the loss is divided by the pairs of the whole step, so Trainer must not divide it",
    "padding_free": "rows without padding are the default here; TRL 1.16 cannot have them",
}
CASES = {
    "full": ({}, None),
    "settings": ({"beta": 0.3, "loss_type": ["robust"], "loss_weights": [0.7], "label_smoothing": 0.1}, None),
    "two losses": ({"loss_type": ["sigmoid", "sft"]}, None),
    "more settings": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4, "ld_alpha": 0.5}, None),
    "weighted": ({"use_weighting": True}, None),
    "precomputed": ({"precompute_ref_log_probs": True}, None),
    "lora": ({}, make_lora),
    "lora, precomputed": ({"precompute_ref_log_probs": True}, make_lora),
}


class Recorder(TrainerCallback):
    """The names of what each event brings that is not None."""

    def __init__(self):
        self.seen = {}

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)

        def record(args, state, control, **kwargs):
            self.seen.setdefault(name, set()).update(key for key, value in kwargs.items() if value is not None)

        return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model: TRL loads its reference from where the policy came from."""
    return str(save_model(tmp_path_factory.mktemp("model")))


def build(package, folder, output_dir, settings, make_adapter):
    own = {"ref_cache_dir": str(output_dir / "cache")} if package is fastdpo else {}
    recorder = Recorder()
    trainer = package.DPOTrainer(
        folder,
        args=package.DPOConfig(str(output_dir), **{**SETTINGS, **settings, **own}),
        train_dataset=Dataset.from_list(make_rows(8)),
        eval_dataset=Dataset.from_list(make_rows(4, seed=1)),
        peft_config=make_adapter() if make_adapter else None,
        callbacks=[recorder],
    )
    return trainer, recorder


def public(trainer):
    found = {}
    for name in dir(trainer):
        if not name.startswith("_") and name not in OTHERWISE:
            found[name] = getattr(trainer, name)
    return found


@pytest.mark.parametrize("case", CASES)
def test_public_attributes_are_trls_before_and_after_training(folder, tmp_path, case):
    settings, make_adapter = CASES[case]
    theirs, their_events = build(peer("trl"), folder, tmp_path / "trl", settings, make_adapter)
    ours, our_events = build(fastdpo, folder, tmp_path / "ours", settings, make_adapter)
    for moment in ("built", "trained"):
        for name, value in public(theirs).items():
            if name in INSTEAD:
                assert not hasattr(ours, name)
                continue
            own = getattr(ours, name)
            assert (own is None) == (value is None), f"{name} of a trainer that is {moment}"
            if isinstance(value, bool | int | float | str | list):
                assert own == value, f"{name} of a trainer that is {moment}"
        if moment == "built":
            results = theirs.train(), ours.train()
    assert [type(result) for result in results] == [type(results[0])] * 2
    assert results[0].metrics.keys() == results[1].metrics.keys()
    assert "on_evaluate" in our_events.seen
    assert our_events.seen == their_events.seen


def test_methods_have_trls_arguments_in_trls_order():
    """Those of subclasses' interest; what ours take beyond that comes after."""
    theirs = peer("trl").DPOTrainer
    for name in ("__init__", "train", "evaluate", "predict", "compute_loss", "log", "create_model_card", "save_model"):
        expected = list(inspect.signature(getattr(theirs, name)).parameters)
        own = list(inspect.signature(getattr(fastdpo.DPOTrainer, name)).parameters)
        is_passed_on = "args" in own and "kwargs" in own
        assert own[: len(expected)] == expected or is_passed_on or name == "create_model_card", name


@pytest.mark.parametrize("name", INSTEAD)
def test_what_has_no_meaning_here_is_answered_with_what_to_read(tmp_path, name):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(AttributeError, match=f"has no attribute '{name}', which TRL's DPOTrainer has or had; read "):
        getattr(trainer, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'no_such_thing'$"):
        _ = trainer.no_such_thing


def test_the_reference_model_is_the_one_that_is_asked(tmp_path):
    reference = make_llama(seed=1)
    trainer = tiny_trainer(tmp_path, ref_model=reference)
    assert trainer.ref_model is reference
    own_start = tiny_trainer(tmp_path)
    assert own_start.ref_model is not own_start.model
    assert torch.equal(own_start.ref_model.lm_head.weight, own_start.model.lm_head.weight)
    assert not any(p.requires_grad for p in own_start.ref_model.parameters())
    assert tiny_trainer(tmp_path, reference="none").ref_model is None


def test_the_name_of_the_reference_adapter_is_that_of_peft(tmp_path):
    from peft import get_peft_model

    assert tiny_trainer(tmp_path).ref_adapter_name is None
    assert tiny_trainer(tmp_path, peft_config=make_lora()).ref_adapter_name is None
    continued = get_peft_model(make_llama(), make_lora(init_lora_weights=False))
    assert tiny_trainer(tmp_path, model=continued).ref_adapter_name == "ref"


def test_a_beta_that_is_assigned_is_the_one_of_the_next_step(tmp_path):
    """As a callback that lets beta rise does it: rewards are beta times the same log-ratios."""
    rows = Dataset.from_list(make_rows(4, seed=1))
    trainer = tiny_trainer(tmp_path, ref_model=make_llama(seed=1), eval_dataset=rows, beta=0.5)
    before = trainer.evaluate()["eval_rewards/margins"]
    trainer.beta = 0.1
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(before / 5, rel=1e-5)
    with pytest.raises(ValueError, match="beta"):
        trainer.beta = -1.0
    assert trainer.beta == trainer.args.beta == 0.1


@pytest.mark.parametrize("make_adapter", [None, make_lora])
def test_the_model_is_tagged_and_its_card_too(tmp_path, make_adapter):
    model = make_llama()
    model.add_model_tags(["trl"])  # of an earlier stage
    trainer = tiny_trainer(tmp_path, model=model, peft_config=make_adapter() if make_adapter else None)
    assert trainer.model.model_tags == ["trl", "fastdpo", "dpo"]
    trainer.create_model_card(model_name="tiny", tags="mine")
    card = (tmp_path / "README.md").read_text()
    metadata = card.split("---")[1]
    assert all(f"- {tag}\n" in metadata for tag in ("fastdpo", "dpo", "trl", "mine"))


def test_ld_alpha_can_be_taken_off_and_put_back(tmp_path):
    rows = make_rows(4, seed=1)
    plain = tiny_trainer(tmp_path / "plain", ref_model=make_llama(seed=7)).evaluate(rows)["eval_loss"]
    trainer = tiny_trainer(tmp_path / "ld", ref_model=make_llama(seed=7), ld_alpha=0.25)
    weighed = trainer.evaluate(rows)["eval_loss"]
    assert abs(weighed - plain) > 1e-3
    trainer.ld_alpha = None
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(plain, rel=1e-5)
    trainer.ld_alpha = 0.25
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(weighed, rel=1e-5)


def test_a_setting_that_needs_other_rows_is_refused_once_they_are_prepared(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"loss_type must .* got \['plackett_luce'\] after"):
        trainer.loss_types = ["plackett_luce"]
    assert trainer.loss_types == ["sigmoid"]
    trainer.ld_alpha = 0.5
    with pytest.raises(ValueError, match="ld_alpha must be None for these rows"):
        trainer.train()
