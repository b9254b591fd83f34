"""torch_compile=True trains as without: the same losses, gradients and metrics, with an adapter too."""

import pytest
from tiny import make_llama, make_rows
from tiny_runs import logged, make_lora, tiny_trainer

KEYS = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy", "mean_token_accuracy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "has_adapter"),
    [("inductor", False), ("eager", True)],
    ids=["inductor, all weights", "LoRA"],
)
def test_a_compiled_policy_gives_the_same_losses(tmp_path, backend, has_adapter):
    def run(**settings):
        fast = tiny_trainer(
            tmp_path,
            make_llama(num_hidden_layers=1),
            max_steps=3,
            learning_rate=1e-2,
            eval_dataset=make_rows(3, seed=1),
            **({"peft_config": make_lora()} if has_adapter else {}),
            **settings,
        )
        fast.train()
        return fast, fast.evaluate()

    plain, compiled = run(), run(torch_compile=True, torch_compile_backend=backend)
    for key in KEYS:
        assert logged(compiled[0], key) == pytest.approx(logged(plain[0], key), rel=1e-4, abs=1e-5), key
    assert compiled[1]["eval_loss"] == pytest.approx(plain[1]["eval_loss"], abs=1e-5)
    assert logged(plain[0])[0] != logged(plain[0])[-1]
