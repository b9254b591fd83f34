"""Models that cannot be packed train on padded batches, with the losses of separate unpadded forwards."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hybrids import tiny_config
from tiny import make_rows, make_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.training.callbacks.summary import summary_lines

MODELS = {
    "falcon": (
        {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        "row numbers as positions",
    ),
    "blt": (None, "BltCrossAttention"),  # its sizes are those of benchmarks/shared/tiny_models.py
}
BETA = 0.3


def build(model_type, seed):
    torch.manual_seed(seed)
    sizes = MODELS[model_type][0]
    config = tiny_config(model_type) if sizes is None else CONFIG_MAPPING[model_type](**sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def separate_logp(model, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def separate_loss(policy, reference, rows):
    losses = []
    for row in rows:
        logratios = [
            separate_logp(policy, row["prompt_ids"], response) - separate_logp(reference, row["prompt_ids"], response)
            for response in row["responses"]
        ]
        losses.append(-F.logsigmoid(BETA * (logratios[0] - logratios[1])))
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("model_type", MODELS)
def test_padded_fallback_trains_with_the_losses_of_separate_forwards(model_type, tmp_path, caplog):
    model, reference = build(model_type, 0), build(model_type, 1)
    stock, stock_reference = copy.deepcopy(model), copy.deepcopy(reference)
    settings = {"beta": BETA, "logging_steps": 1, "learning_rate": 1e-2, "max_steps": 2, "report_to": "none"}
    args = DPOConfig(str(tmp_path), per_device_train_batch_size=6, use_cpu=True, save_strategy="no", **settings)
    trainer = DPOTrainer(
        model,
        reference,
        args,
        train_dataset=make_rows(6),
        eval_dataset=make_rows(5, seed=3),
        processing_class=make_tokenizer(),
    )
    assert not trainer.is_packed
    assert "Falling back to padded batches" in caplog.text
    why = MODELS[model_type][1] or trainer.packing_check.reason
    assert why
    assert why in dict(summary_lines(trainer))["attention"]

    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(separate_loss(stock, stock_reference, trainer.train_dataset), rel=1e-4)
    assert losses[1] < losses[0]
    stock.load_state_dict(model.state_dict())
    expected = separate_loss(stock.eval(), stock_reference, trainer.eval_dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
