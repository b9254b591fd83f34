"""TR-DPO: the reference moves towards the policy, by how much and when, and is still there after a resume."""

import copy
import math

import pytest
import torch
from tiny import make_llama, make_rows
from tiny_runs import logged, make_lora, tiny_trainer, trl_trainer

from fastdpo import DPOConfig
from fastdpo.training.callbacks.sync_reference import mix

LN2 = math.log(2)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_reference_moves_by_the_mixture_after_every_so_many_steps(tmp_path):
    """Policy after 2 steps p2, after 4 p4, start r0, alpha 0.25: r = 0.75 (0.75 r0 + 0.25 p2) + 0.25 p4."""
    seen = {}
    fast = tiny_trainer(tmp_path, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25, max_steps=5)
    start = weights_of(fast.reference.model)
    step = fast.training_step

    def recording(*args, **kwargs):
        seen[fast.state.global_step] = weights_of(fast.model)  # the policy before the step, so after as many
        return step(*args, **kwargs)

    fast.training_step = recording
    fast.train()
    for name, moved in fast.reference.model.named_parameters():
        expected = 0.75 * (0.75 * start[name] + 0.25 * seen[2][name]) + 0.25 * seen[4][name]
        torch.testing.assert_close(moved, expected, msg=name)
        assert not moved.requires_grad
    assert any(not torch.equal(start[name], moved) for name, moved in weights_of(fast.reference.model).items())


ADAPTERS = {
    "all weights": None,
    "LoRA": {},
    "LoRA on embeddings and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "DoRA": {"use_dora": True},
    "a module that is trained whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("lora", ADAPTERS.values(), ids=ADAPTERS)
def test_at_alpha_1_the_loss_starts_again_at_ln_2_after_each_move(tmp_path, lora):
    """The reference is then the policy: with LoRA too, which starts from an adapter that does nothing."""
    settings = {} if lora is None else {"peft_config": make_lora(**lora)}
    fast = tiny_trainer(
        tmp_path,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=1.0,
        max_steps=6,
        learning_rate=1e-2,
        **settings,
    )
    assert fast.reference.mode == ("frozen" if lora is None else "adapter")
    fast.train()
    losses = logged(fast)
    for step in range(6):
        if step % 2 == 0:
            assert losses[step] == pytest.approx(LN2, abs=1e-6), step
        else:
            assert abs(losses[step] - LN2) > 1e-3, step


def test_a_synced_adapter_is_frozen_and_stays_apart_from_the_policys(tmp_path):
    fast = tiny_trainer(
        tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5, peft_config=make_lora()
    )
    fast.train()
    weights = dict(fast.model.named_parameters())
    ours = {name: w for name, w in weights.items() if ".default." in name and "lora_B" in name}
    assert ours
    for name, weight in ours.items():
        theirs = weights[name.replace(".default.", ".ref.")]
        assert weight.requires_grad
        assert not theirs.requires_grad
        assert 0 < theirs.norm() < weight.norm()


@pytest.mark.parametrize("has_adapter", [False, True], ids=["all weights", "LoRA"])
def test_a_resumed_run_has_the_moved_reference(tmp_path, has_adapter):
    def build(name, **settings):
        return tiny_trainer(
            tmp_path / name,
            sync_ref_model=True,
            ref_model_sync_steps=2,
            max_steps=5,
            learning_rate=1e-2,
            **({"peft_config": make_lora()} if has_adapter else {}),
            **settings,
        )

    whole = build("whole")
    whole.train()
    build("cut", save_strategy="steps", save_steps=3).train()
    again = build("cut")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert logged(again)[-2:] == pytest.approx(logged(whole)[-2:], abs=1e-6)


@pytest.mark.parametrize("has_adapter", [False, True], ids=["all weights", "LoRA"])
def test_the_best_model_comes_back_with_its_reference(tmp_path, has_adapter):
    """The worst step counts as the best here, so that it is not the last one."""
    fast = tiny_trainer(
        tmp_path,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=0.5,
        max_steps=4,
        learning_rate=1e-2,
        eval_dataset=make_rows(5, seed=1),
        load_best_model_at_end=True,
        metric_for_best_model="rewards/chosen",
        greater_is_better=False,
        **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
        **dict.fromkeys(("eval_steps", "save_steps"), 1),
        **({"peft_config": make_lora()} if has_adapter else {}),
    )
    fast.train()
    values = logged(fast, "eval_rewards/chosen")
    assert min(values) != values[-1]
    assert fast.evaluate()["eval_rewards/chosen"] == pytest.approx(min(values), abs=1e-6)


def test_mixing_leaves_equal_weights_as_they_are():
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    reference = weight.clone()
    mix({"weight": (reference, weight)}, 0.6)
    assert torch.equal(reference, weight)


def test_a_checkpoint_without_the_reference_is_warned_of(tmp_path, caplog):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    again = tiny_trainer(tmp_path, sync_ref_model=True)
    with caplog.at_level("WARNING"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "comes from a run without sync_ref_model" in caplog.text


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"reference": "cached"}, "sync_ref_model must be off if reference is 'cached'"),
        ({"precompute_ref_log_probs": True}, "sync_ref_model must be off if reference is 'cached'"),
        ({"reference": "none"}, "sync_ref_model must be off if reference is 'none'"),
        ({"ref_model_mixup_alpha": 1.5}, r"ref_model_mixup_alpha must be in \(0, 1\], got 1.5"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be an integer >= 1, got 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_synced_is_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        DPOConfig(str(tmp_path), sync_ref_model=True, **settings)


def test_a_reference_of_another_shape_is_refused(tmp_path):
    other = make_llama(intermediate_size=48)
    with pytest.raises(ValueError, match="sync_ref_model must be off if the reference is built otherwise"):
        tiny_trainer(tmp_path, ref_model=other, sync_ref_model=True)


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_losses_are_trls(tmp_path, alpha):
    """Same model, rows and order; TRL's tokens of these rows are ours."""
    pytest.importorskip("trl")
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": alpha}
    model, other = make_llama(), make_llama(seed=1)
    fast = tiny_trainer(
        tmp_path / "ours", copy.deepcopy(model), ref_model=copy.deepcopy(other), max_steps=5, **settings
    )
    fast.train()
    theirs = trl_trainer(tmp_path / "theirs", copy.deepcopy(model), copy.deepcopy(other), max_steps=5, **settings)
    theirs.train()
    assert logged(fast) == pytest.approx(logged(theirs), abs=1e-4)
