"""`fastdpo debug-batch` on the file that a real run saved."""

import math

import pytest
import torch
from datasets import Dataset
from tiny import make_llama, make_tokenizer
from tiny_runs import tiny_trainer

from fastdpo import TokenizedPair, pack_pairs
from fastdpo.cli.main import main
from fastdpo.evidence.bad_batch import load_bad_batch, replay, sequence_ids
from fastdpo.modeling import prepare_model

ROWS = [
    {"prompt": "the cat sees ", "chosen": "a dog", "rejected": "a big dog"},
    {"prompt": "the tree ", "chosen": "finds a bird", "rejected": "never"},
]
BROKEN = "model.layers.0.mlp.down_proj"


def broken(model):
    """The model, whose first layer now overflows in fp32, and not in fp64."""
    with torch.no_grad():
        mlp = model.model.layers[0].mlp
        mlp.up_proj.weight.mul_(1e22)
        mlp.gate_proj.weight.mul_(1e22)  # their product is the input of down_proj
        mlp.down_proj.weight.mul_(1e-36)
    return model


@pytest.fixture(scope="module", params=["packed", "padded"])
def saved(request, tmp_path_factory):
    """A folder with the model and the file of a run that stopped."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_llama()
    make_tokenizer().save_pretrained(folder / "model")
    options = {"packing": request.param, "reference": "none", "loss_type": "simpo", "beta": 2.0}
    trainer = tiny_trainer(folder, model, train_dataset=Dataset.from_list(ROWS), **options)
    broken(model).save_pretrained(folder / "model")  # after the trainer's own check of the model
    with pytest.raises(FloatingPointError, match=r"fastdpo debug-batch .*nonfinite_batch_rank0.pt --model MODEL shows"):
        trainer.train()
    return folder


def test_the_first_bad_module_the_numbers_and_the_text_of_the_rows_are_shown(saved, capsys):
    code = main(
        ["debug-batch", str(saved / "nonfinite_batch_rank0.pt"), "--model", str(saved / "model"), "--device", "cpu"]
    )
    out = capsys.readouterr().out
    assert code == 1
    assert f"the first number that is not finite is in the output of {BROKEN}: " in out
    assert "the loss was nan at step 0; replayed in fp32" in out
    for text in ("chosen of pair 0", "rejected of pair 1", "finds a bird", "the tree"):
        assert text in " ".join(out.replace("│", " ").split())
    assert "model.layers.1" in out


def test_fp64_finds_the_log_probs_that_fp32_cannot_hold(saved):
    bad = load_bad_batch(saved / "nonfinite_batch_rank0.pt")
    tokenizer, model = make_tokenizer(), prepare_model(broken(make_llama()))
    found = replay(model, bad, tokenizer)
    plain = broken(make_llama()).double()
    by_text = {" ".join(str(row[side]).split()): row for row in ROWS for side in ("chosen", "rejected")}
    assert len(found.sequences) == 4
    for index, one in enumerate(found.sequences):
        prompt, response = sequence_ids(bad.batch, index)
        assert one.response.replace("</s>", "").strip() in by_text
        tokens = torch.tensor([[*prompt, *response]])
        logps = plain(input_ids=tokens, use_cache=False).logits[0].detach().log_softmax(-1)
        by_hand = sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(response))
        assert one.exact == pytest.approx(by_hand, rel=1e-9)
        assert math.isnan(one.replayed)
        assert math.isnan(one.of_run)
    assert found.first_bad.name == BROKEN
    assert found.first_bad.rows  # the positions of the batch
    assert found.bad_weights == []


def test_a_bad_weight_is_named(saved, capsys):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 3] = float("nan")
    found = replay(prepare_model(model), load_bad_batch(saved / "nonfinite_batch_rank0.pt"), make_tokenizer())
    assert found.bad_weights == ["model.layers.1.self_attn.q_proj.weight"]
    assert found.first_bad.name == "model.layers.1.self_attn.q_proj"


def test_a_sound_model_has_nothing_to_show(saved, tmp_path, capsys):
    make_llama().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    file = str(saved / "nonfinite_batch_rank0.pt")
    assert main(["debug-batch", file, "--model", str(tmp_path), "--device", "cpu"]) == 0
    assert "every module's output is finite with this model" in capsys.readouterr().out


def test_a_file_that_no_run_saved_is_refused_and_never_unpickled(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was run"), "w"))

    torch.save({"inputs": Evil(), "step": 0}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"step": 0}, tmp_path / "other.pt")
    for name in ("evil.pt", "text.pt", "other.pt", "missing.pt"):
        assert main(["debug-batch", str(tmp_path / name), "--model", "unused"]) == 2
        assert "file must be the nonfinite_batch_rank*.pt that a run saved" in capsys.readouterr().err
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": [1]},
        {"sums": {"policy": "x"}},
        {"inputs": {"input_ids": "x"}},
        {"inputs": {"segments": None}},
        {"inputs": {"logit_rows": torch.tensor([9, 9])}},
    ],
)
def test_a_file_with_values_that_are_of_no_batch_is_refused(tmp_path, changed):
    inputs = pack_pairs([TokenizedPair([1, 2], [4], [5])]).asdict() | changed.pop("inputs", {})
    torch.save({"inputs": inputs, "step": 0, **changed}, tmp_path / "batch.pt")
    with pytest.raises(ValueError, match=r"file must be the nonfinite_batch_rank\*\.pt that a run saved"):
        load_bad_batch(tmp_path / "batch.pt")
