"""Three training steps against the installed TRL: losses and every metric that it logs, for each of its settings.

No row is one that either side would drop. Where TRL takes a mean of batches' means, the batches are alike.
"""

import math
import re

import pytest
import torch
from datasets import Dataset
from peers import peer
from side_by_side import assert_same_logs, logged, mixtral, trained
from tiny import make_llama, make_rows, make_tokenizer

import fastdpo

trl = peer("trl")

CASES = {
    **{name: {"loss_type": name} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair")},
    **{name: {"loss_type": name} for name in ("sppo_hard", "apo_zero", "apo_down", "discopop")},
    "robust, smoothed": {"loss_type": "robust", "label_smoothing": 0.2},
    "exo_pair, smoothed": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "discopop, wide": {"loss_type": "discopop", "discopop_tau": 0.5},
    **{name: {"loss_type": name} for name in ("aot", "aot_unpaired", "sft", "sigmoid_norm")},
    **{f"{name}, smoothed": {"loss_type": name, "label_smoothing": 0.2} for name in ("aot", "aot_unpaired")},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "two losses, unweighted": {"loss_type": ["ipo", "sigmoid_norm"]},
    **{name: {"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")},
    "alpha_divergence, 2": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
    "alpha_divergence, 1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    **{
        f"{name}, js": {"loss_type": name, "f_divergence_type": "js_divergence"}
        for name in ("hinge", "ipo", "discopop")
    },
    "exo_pair, robust, js": {
        "loss_type": ["exo_pair", "robust"],
        "label_smoothing": 0.1,
        "f_divergence_type": "js_divergence",
    },
    "sigmoid_norm, sft, forward_kl": {"loss_type": ["sigmoid_norm", "sft"], "f_divergence_type": "forward_kl"},
    **{f"ld_alpha {alpha}": {"ld_alpha": alpha} for alpha in (0.0, 0.3, 1.0)},
    "ld_alpha, ipo": {"ld_alpha": 0.3, "loss_type": "ipo"},
    "ld_alpha, sft": {"ld_alpha": 0.3, "loss_type": ["sigmoid", "sft"]},
    "ld_alpha, precompute": {"ld_alpha": 0.3, "precompute_ref_log_probs": True},
    "WPO": {"use_weighting": True},
    "WPO, several losses": {"use_weighting": True, "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]},
    "WPO, ld_alpha": {"use_weighting": True, "ld_alpha": 0.3},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.7},
    "precompute": {"precompute_ref_log_probs": True},
    "truncated": {"max_length": 12},
    "clipped, decayed": {"max_grad_norm": 0.1, "weight_decay": 0.1, "warmup_steps": 1},
}


# means over tokens, which TRL takes in each batch and then over batches
OF_TOKENS = {
    f"{e}{k}" for e in ("", "eval_") for k in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
}


def tiny_llama(seed=0):
    return make_llama(seed=seed, hidden_size=16, intermediate_size=32)


def both(tmp_path, model, keywords=None, **settings):
    """Our trainer and TRL's, each trained from a model (or a name of one) that `model` makes."""
    own = {"ref_cache_dir": str(tmp_path / "cache"), "packing": "packed"}
    ours = trained(fastdpo, tmp_path / "ours", model(), make_tokenizer(), (keywords or dict)(), {**settings, **own})
    theirs = trained(trl, tmp_path / "trl", model(), make_tokenizer(), (keywords or dict)(), settings)
    return ours, theirs


@pytest.mark.parametrize("case", CASES)
def test_three_steps_log_what_trl_logs(case, tmp_path):
    """The reference is another model than the start, so that no difference hides in log-ratios of 0."""
    ours, theirs = both(tmp_path, tiny_llama, lambda: {"ref_model": tiny_llama(seed=1)}, **CASES[case])
    assert_same_logs(logged(ours), logged(theirs))
    assert abs(logged(ours)[0]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize("precompute", [False, True])
def test_the_start_is_the_reference_where_none_is_given(precompute, tmp_path, model_dir):
    ours, theirs = both(tmp_path, lambda: model_dir, precompute_ref_log_probs=precompute)
    assert_same_logs(logged(ours), logged(theirs))
    assert logged(ours)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_every_loss_and_divergence_of_trl_is_among_the_cases():
    """So that a new one in TRL is noticed; its help names them all."""
    for name in ("loss_type", "f_divergence_type"):
        text = trl.DPOConfig.__dataclass_fields__[name].metadata["help"].split("Possible values are:")[1].split(". ")[0]
        offered = set(re.findall(r"`'?([a-z_]+)'?`", text))
        covered = {value for case in CASES.values() for value in _listed(case.get(name, []))}
        assert len(offered) > 3
        assert offered - covered <= {"reverse_kl"}, name  # the default, in all cases that name no other


def _listed(value):
    return [value] if isinstance(value, str) else value


def lora(**more):
    from peft import LoraConfig

    return {"peft_config": LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **more})}


def trained_head():
    return lora(target_modules=["q_proj"], modules_to_save=["lm_head"])


@pytest.mark.parametrize("adapter", [lora, trained_head])
def test_lora_logs_what_trl_logs(adapter, tmp_path):
    """Adapters start from the same random numbers; the reference is the model without them."""
    ours, theirs = both(tmp_path, tiny_llama, adapter)
    assert_same_logs(logged(ours), logged(theirs))


def test_an_adapter_that_is_trained_further_is_compared_with_its_start(tmp_path):
    from peft import get_peft_model

    def with_adapter():
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), lora()["peft_config"])
        with torch.no_grad():  # as if it had been trained before
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return model

    ours, theirs = both(tmp_path, with_adapter)
    assert_same_logs(logged(ours), logged(theirs))
    assert logged(ours)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_lora_with_precomputed_log_probs_logs_what_trl_logs(tmp_path):
    ours, theirs = both(tmp_path, tiny_llama, lora, precompute_ref_log_probs=True)
    assert_same_logs(logged(ours), logged(theirs))


def test_experts_and_their_auxiliary_loss_log_what_trl_logs(tmp_path):
    ours, theirs = both(tmp_path, mixtral, lambda: {"ref_model": mixtral(seed=1)})
    assert_same_logs(logged(ours), logged(theirs))
    assert all(entry["aux_loss"] > 0 for entry in logged(ours))


def test_evaluation_logs_what_trl_logs(tmp_path, model_dir):
    """The 8 rows are two batches of four: where batches are uneven ours is the mean over pairs, TRL's over batches."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    ours, theirs = both(
        tmp_path, lambda: model_dir, lambda: {"eval_dataset": Dataset.from_list(make_rows(8, seed=5))}, **evaluation
    )
    keys = {key for key in logged(theirs, "eval_")[0] if key not in OF_TOKENS}
    assert_same_logs(logged(ours, "eval_"), logged(theirs, "eval_"), keys)


def test_accumulated_steps_have_the_losses_of_trl(tmp_path, model_dir):
    """Two micro-batches of two pairs. Metrics of tokens differ: TRL's mean of two means, ours the mean over tokens."""
    ours, theirs = both(
        tmp_path, lambda: model_dir, per_device_train_batch_size=2, gradient_accumulation_steps=2, beta=0.5
    )
    keys = {key for key in logged(theirs)[0] if key not in OF_TOKENS}
    assert_same_logs(logged(ours), logged(theirs), keys)
