"""`fastdpo train` as a user meets it: what it prints, what it leaves, what it refuses."""

import gzip
import json
import logging
import re
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import make_byte_tokenizer, make_llama, make_rows, make_tokenizer
from transformers import TrainingArguments

from fastdpo import DPOConfig
from fastdpo.cli.main import main

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_llama(vocab_size=64).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = make_rows(20)
    rows[3]["chosen"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *arguments):
    """Exit code, and everything printed, on one line each."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def quick(model_dir, data, output_dir, *more):
    return (
        *("train", "--model", model_dir, "--dataset", data, "--output_dir", output_dir, "--use_cpu", "true"),
        *("--max-steps", 4, "--per-device-train-batch-size", 4, "--logging_steps", 1, "--disable_tqdm", "true"),
        *("--learning_rate", "1e-2", "--save_strategy", "no", "--eval_fraction", 0.2, *more),
    )


def test_a_run_says_what_it_will_do_and_what_it_did(capsys, model_dir, data, tmp_path):
    code, out, _ = run(capsys, *quick(model_dir, data, tmp_path / "out"))
    assert code == 0
    for fact in (
        "LlamaForCausalLM",
        "parameters",
        "of 16 pairs",
        "empty response",
        "tokens",
        "reference",
        "frozen",
        "tiled (chosen for cpu)",
        "sdpa, one SDPA call per branch (flash3, flash4, flash2, varlen: runs on cuda only)",
        "MiB (an estimate)",
        "4 optimizer steps of 4 rows",
        "before and after",
        "accuracy",
        f"saved in {tmp_path / 'out'}",
    ):
        assert fact in out.replace("\n", " "), fact
    loss = re.search(r"loss\s+│\s+([\d.]+) │\s+([\d.]+)", out)
    assert float(loss[1]) == pytest.approx(0.6931, abs=1e-4)
    assert float(loss[2]) != float(loss[1])
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "trainer_state.json", "fastdpo_run.json"} <= left
    assert json.loads((tmp_path / "out" / "fastdpo_run.json").read_text())["beta"] == 0.1


def test_a_streamed_run_trains_and_reports(capsys, model_dir, data, tmp_path):
    streamed = ("--dataset_streaming", "true", "--eval_dataset", data)
    code, out, _ = run(capsys, *quick(model_dir, data, tmp_path / "out", *streamed))
    assert code == 0
    text = out.replace("\n", " ")
    for fact in ("a stream, tokenized as it is read", "of a stream", "on the evaluation rows", "accuracy"):
        assert fact in text, fact
    dropped = "kept 19 of the first 20 pairs; dropped 1: empty response (1: row 3)"
    assert f"eval data: a stream, tokenized as it is read; {dropped}" in " ".join(out.split())


def test_answers_to_a_prompt_stay_together_when_rows_are_held_out(capsys, model_dir, tmp_path):
    scores = {"correctness": 1, "coherence": 1, "complexity": 1, "verbosity": 1}
    rows = [
        {"prompt": f"the {noun}", "response": text, "helpfulness": rank, **scores}
        for rank, text in enumerate(("sees", "likes", "eats"))
        for noun in ("cat", "dog", "bird", "house", "tree", "river", "big cat", "old dog")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run(capsys, *quick(model_dir, tmp_path / "rows.jsonl", tmp_path / "out"))
    assert code == 0
    text = " ".join(out.split())
    assert "kept 6 of 6 prompts with 18 pairs of answers" in text
    assert "kept 2 of 2 prompts with 6 pairs of answers" in text


def test_flags_override_a_yaml_config(capsys, model_dir, data, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {model_dir}\ndataset: {data}\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\nmax_steps: 4\n"
        "beta: 0.3\nlearning-rate: 1e-2\nsave_strategy: 'no'\nmax_length: null\npad_token: <unk>\nhub_token: secret\n"
    )
    code, _, err = run(capsys, "train", "--config", config, "--beta", "0.7", "--max_steps", "1")
    assert code == 0, err
    options = json.loads((tmp_path / "out" / "fastdpo_run.json").read_text())
    assert (options["beta"], options["max_steps"], options["learning_rate"]) == (0.7, 1, 0.01)
    assert options["max_length"] is None
    assert (options["pad_token"], options["hub_token"]) == ("<unk>", "<HUB_TOKEN>")


def test_no_secret_of_the_command_line_is_written_down(capsys, model_dir, data, tmp_path):
    secrets = ("--hub-token", "hf_first", "--push_to_hub=false", "--hub_token=hf_second", "--pad_token", "<unk>")
    assert run(capsys, *quick(model_dir, data, tmp_path / "out", "--max_steps", 1, *secrets))[0] == 0
    options = json.loads((tmp_path / "out" / "fastdpo_run.json").read_text())
    last = ["--hub-token", "<HUB_TOKEN>", "--push_to_hub=false", "--hub_token=<HUB_TOKEN>", "--pad_token", "<unk>"]
    assert options["command"][-6:] == last
    for name in ("fastdpo_run.json", "report.html", "README.md"):
        assert re.search("hf_(first|second)", (tmp_path / "out" / name).read_text()) is None, name


def test_a_finished_run_is_not_overwritten_unasked(capsys, model_dir, data, tmp_path):
    assert run(capsys, *quick(model_dir, data, tmp_path / "out", "--max_steps", 1))[0] == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    code, _, err = run(capsys, *quick(model_dir, data, tmp_path / "out", "--max_steps", 2))
    assert code == 2
    assert "output_dir must not hold another run" in err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    code, *_ = run(capsys, *quick(model_dir, data, tmp_path / "out", "--overwrite_output_dir"))
    assert code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != weights


def test_a_run_goes_on_from_its_last_checkpoint(capsys, model_dir, data, tmp_path):
    options = ("--save_strategy", "steps", "--save_steps", 2)
    assert run(capsys, *quick(model_dir, data, tmp_path / "out", *options, "--max_steps", 2))[0] == 0
    code, _, err = run(capsys, *quick(model_dir, data, tmp_path / "out", *options, "--resume_from_checkpoint", "true"))
    assert code == 0, err
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    code, _, err = run(capsys, *quick(model_dir, data, tmp_path / "new", "--resume_from_checkpoint", "true"))
    assert code == 2
    assert "found none" in err


def test_overwriting_a_run_leaves_none_of_its_checkpoints(capsys, model_dir, data, tmp_path):
    saving = ("--save_strategy", "steps", "--save_steps", 2)
    assert run(capsys, *quick(model_dir, data, tmp_path / "out", *saving))[0] == 0
    again = ("--overwrite_output_dir", "--max_steps", 2)
    assert run(capsys, *quick(model_dir, data, tmp_path / "out", *saving, *again))[0] == 0
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_lora_run_saves_its_adapter(capsys, model_dir, data, tmp_path):
    code, out, err = run(capsys, *quick(model_dir, data, tmp_path / "out", "--use_peft", "--lora_r", 4))
    assert code == 0, err
    assert "adapter: the model without its adapter" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def broken(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("broken.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": oops}\n', "line 2"),
        ("columns.jsonl", '{"question": "a", "answer": "b"}\n', "question"),
        ("empty.jsonl", "", "empty"),
        ("scalars.json", "[1, 2]", "objects"),
        ("allbad.jsonl", '{"prompt": "a", "chosen": "", "rejected": "c"}\n', "usable"),
    ],
)
def test_bad_data_is_refused_and_nothing_is_written(capsys, model_dir, tmp_path, name, text, message):
    code, _, err = run(capsys, *quick(model_dir, broken(tmp_path, name, text), tmp_path / "out"))
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--betta", "0.1"), "did you mean '--beta'"),
        (("--loss_type", "sigmod"), "did you mean 'sigmoid'"),
        (("--beta", "0"), "beta must be > 0 and finite, got 0.0"),
        (("--beta", "much"), "invalid float value"),
        (("--dataset", "missing.json"), "does not exist: missing.json"),
        (("--model", "/no/such/model"), "got /no/such/model, which does not exist"),
        (("--model", "~"), "got ~, which does not exist"),  # which shells expand, and nothing else
        (("--lora_r", "8"), "lora_r must be used together with use_peft"),
        (("--report_to", "no_such_logger"), "no_such_logger"),
        (("--config", "missing.yaml"), "config must be an existing file"),
        (("--load_in_4bit",), "load_in_4bit must be used together with use_peft"),
        (("--eval_fraction", "1.5"), "eval_fraction must be in [0, 1), got 1.5"),
        (("--per_device_train_batch_size", "0"), "per_device_train_batch_size must be an integer >= 1, got 0"),
        (("--learning_rate", "-1"), "learning_rate must be a finite number >= 0.0, got -1.0"),
        (("--model_init_kwargs", "{bad"), "model_init_kwargs must be"),
        (("--model_init_kwargs", '{"no_such_argument": 1}'), "model_init_kwargs must be"),
        (("stray",), "every value must follow an option"),
    ],
)
def test_bad_options_are_refused_in_one_line(capsys, model_dir, data, tmp_path, arguments, message):
    code, _, err = run(capsys, *quick(model_dir, data, tmp_path / "out", *arguments))
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_config_key_names_the_nearest_valid_one(capsys, tmp_path):
    config = broken(tmp_path, "run.yaml", "model: x\ndataset: y\noutput_dir: z\nlearning_rat: 1.0\n")
    code, _, err = run(capsys, "train", "--config", config)
    assert code == 2
    assert "unknown key 'learning_rat'; did you mean 'learning_rate'?" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("beta: [1]", "beta must be one value"),
        ("gradient_accumulation_steps: 1.5", "invalid int value"),
        ("loss_type: sigmod", "did you mean 'sigmoid'"),
        ("eval_strategy: sometimes", "eval_strategy must be one of"),
    ],
)
def test_a_config_value_of_the_wrong_kind_is_refused(capsys, tmp_path, line, message):
    config = broken(tmp_path, "run.yaml", f"model: x\ndataset: y\noutput_dir: {tmp_path / 'out'}\n{line}\n")
    code, _, err = run(capsys, "train", "--config", config)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_config_says_no_and_false_as_people_write_them(tmp_path):
    from fastdpo.cli.arguments import AdapterArguments, RunArguments, parse

    config = broken(
        tmp_path,
        "run.yaml",
        "model: x\ndataset: y\noutput_dir: z\nsave_strategy: no\noverwrite_output_dir: 'false'\n"
        "use_peft: true\nlora_target_modules: q_proj\nmax_length: null\nuse_cpu: true\nlearning_rate: 1e-3\n",
    )
    run_arguments, adapter, args = parse(
        "train", [RunArguments, AdapterArguments, DPOConfig], ["--config", str(config)]
    )
    assert args.save_strategy == "no"
    assert run_arguments.overwrite_output_dir is False
    assert adapter.lora_target_modules == ["q_proj"]
    assert args.max_length is None
    assert args.learning_rate == 1e-3


def test_columns_are_mapped_on_the_command_line_and_in_yaml(capsys, model_dir, tmp_path):
    rows = [
        {"instruct": row["prompt"], "chosen": row["chosen"], "worst": row["rejected"], "draft": f"a text {number}"}
        for number, row in enumerate(make_rows(4))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--model", model_dir, "--dataset", data, "--use_cpu", "true", "--max_steps", "1", "--eval_fraction", "0")
    renamed = "prompt=instruct,rejected=worst"
    code, _, err = run(capsys, "train", *given, "--output_dir", tmp_path / "a", "--columns", renamed)
    assert code == 2
    assert "'draft' (a text 0)" in err
    assert "--columns ignore=draft" in err
    config = broken(tmp_path, "run.yaml", "columns:\n  prompt: instruct\n  rejected: worst\n  ignore: [draft]\n")
    for name, option in (("b", ("--columns", f"{renamed},ignore=draft")), ("c", ("--config", config))):
        code, out, err = run(capsys, "train", *given, "--output_dir", tmp_path / name, *option)
        assert code == 0, err
        assert "columns not read: draft" in out
        assert f"prompt: {rows[0]['instruct']}" in out


def test_every_field_can_be_set_from_the_command_line():
    from fastdpo.cli.arguments import AdapterArguments, RunArguments, parse

    needed = ["--model", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu", "true"]
    ours = {f.name for f in fields(DPOConfig)} - {f.name for f in fields(TrainingArguments)}
    given = {
        "beta": ("0.7", 0.7),
        "chat_template": ("qwen3", "qwen3"),
        "chat_template_kwargs": ('{"enable_thinking": false}', {"enable_thinking": False}),
        "on_long_row": ("drop", "drop"),
        "on_lost_content": ("raise", "raise"),
        "loss_type": ("ipo, sft", ["ipo", "sft"]),
        "loss_weights": ("1,0.5", [1.0, 0.5]),
        "f_divergence_type": ("js_divergence", "js_divergence"),
        "f_alpha_divergence_coef": ("0.25", 0.25),
        "ld_alpha": ("0.5", 0.5),
        "use_weighting": ("true", True),
        "gamma_beta_ratio": ("0.5", 0.5),
        "cpo_alpha": ("0.5", 0.5),
        "sync_ref_model": ("true", True),
        "ref_model_mixup_alpha": ("0.5", 0.5),
        "ref_model_sync_steps": ("7", 7),
        "router_aux_loss_coef": ("0.01", 0.01),
        "num_eval_samples": ("3", 3),
        "eval_sample_tokens": ("9", 9),
        "eval_sample_temperature": ("0.5", 0.5),
        "training_warnings": ("false", False),
        "label_smoothing": ("0.25", 0.25),
        "discopop_tau": ("0.5", 0.5),
        "reference": ("frozen", "frozen"),
        "reference_free": ("true", True),
        "token_metrics": ("false", False),
        "max_length": ("77", 77),
        "max_prompt_length": ("33", 33),
        "truncation_mode": ("keep_end", "keep_end"),
        "on_bad_row": ("raise", "raise"),
        "dataset_format": ("shp", "shp"),
        "columns": ("prompt=question,ignore=a,b", {"prompt": "question", "ignore": ["a", "b"]}),
        "pad_token": ("<pad>", "<pad>"),
        "dataset_num_proc": ("2", 2),
        "packing": ("padded", "padded"),
        "prefix_sharing": ("false", False),
        "attention_backend": ("sdpa", "sdpa"),
        "impl": ("tiled", "tiled"),
        "skip_tolerance": ("1e-3", 1e-3),
        "workspace_bytes": ("1000000", 1_000_000),
        "tile_rows": ("auto", "auto"),
        "padding_free": ("true", True),
        "pad_to_multiple_of": ("64", 64),
        "max_tokens_per_microbatch": ("4096", 4096),
        "on_oversized_row": ("raise", "raise"),
        "on_full_disk": ("wait", "wait"),
        "regroup_dataset": ("true", True),
        "length_bucketing": ("true", True),
        "balance_ranks": ("false", False),
        "tensor_parallel_size": ("2", 2),
        "sequence_parallel_size": ("2", 2),
        "weight_rounding": ("kahan", "kahan"),
        "optimizer_in_backward": ("true", True),
        "clipping_in_backward": ("two_passes", "two_passes"),
        "ref_tokens_per_batch": ("512", 512),
        "ref_max_memory": ('{"cpu": "1KiB"}', {"cpu": 1024}),
        "ref_cache_dir": ("somewhere", "somewhere"),
        "precompute_ref_log_probs": ("true", True),
        "precompute_ref_batch_size": ("16", 16),
        "disable_dropout": ("false", False),
        "model_init_kwargs": ('{"a": 1}', {"a": 1}),
        "trust_remote_code": ("true", True),
        # of transformers.TrainingArguments, one for each kind of value
        "lr_scheduler_kwargs": ('{"num_cycles": 2}', {"num_cycles": 2}),
        "liger_kernel_config": ('{"rope": true}', {"rope": True}),
        "report_to": ("tensorboard", ["tensorboard"]),
        "include_for_metrics": ("inputs,loss", ["inputs", "loss"]),
        "eval_accumulation_steps": ("none", None),
        "eval_steps": ("0.5", 0.5),
    }
    only_on_gpus = {"activation_offloading"}
    assert given.keys() - ours <= {f.name for f in fields(TrainingArguments)}
    assert ours - given.keys() == only_on_gpus
    beside = {"loss_weights": ["--loss_type", "ipo", "sft"], "f_divergence_type": ["--loss_type", "sigmoid"]}
    for name, (text, value) in given.items():
        options = [*needed, *beside.get(name, []), f"--{name}", text]
        *_, args = parse("train", [RunArguments, AdapterArguments, DPOConfig], options)
        assert getattr(args, name) == value, name


def test_a_list_is_written_with_spaces_or_commas():
    from fastdpo.cli.arguments import AdapterArguments, RunArguments, parse

    needed = ["--model", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu", "true", "--use_peft"]
    for text in (["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj,", "v_proj"]):
        _, adapter, _ = parse(
            "train", [RunArguments, AdapterArguments, DPOConfig], [*needed, "--lora_target_modules", *text]
        )
        assert adapter.lora_target_modules == ["q_proj", "v_proj"], text


def test_a_list_in_a_config_has_the_kinds_that_its_option_has(tmp_path):
    from fastdpo.cli.arguments import AdapterArguments, RunArguments, parse

    lines = "model: x\ndataset: y\noutput_dir: z\nuse_cpu: true\nuse_peft: true\n"
    for losses, weights in (("[ipo, sft]", "[1, 0.5]"), ("ipo,sft", "1,0.5")):
        config = broken(tmp_path, "run.yaml", f"{lines}loss_type: {losses}\nloss_weights: {weights}\n")
        *_, args = parse("train", [RunArguments, AdapterArguments, DPOConfig], ["--config", str(config)])
        assert (args.loss_type, args.loss_weights) == (["ipo", "sft"], [1.0, 0.5])
    config = broken(tmp_path, "run.yaml", f"{lines}loss_weights: [much]\n")
    with pytest.raises(ValueError, match="loss_weights must be a list of float"):
        parse("train", [RunArguments, AdapterArguments, DPOConfig], ["--config", str(config)])


def test_an_option_that_trl_has_removed_is_answered_with_the_line_to_write(capsys, model_dir, data, tmp_path):
    code, _, err = run(capsys, *quick(model_dir, data, tmp_path / "out", "--max_completion_length", 7))
    assert code == 2
    assert "max_length=..., which limits prompt and response together" in err


def test_a_setting_that_is_no_json_object_is_refused(capsys, model_dir, data, tmp_path):
    code, _, err = run(capsys, *quick(model_dir, data, tmp_path / "out", "--liger_kernel_config", "[1]"))
    assert code == 2
    assert "invalid json object value: '[1]'" in err


def test_sft_trains_an_adapter_too(capsys, model_dir, data, tmp_path):
    arguments = quick(model_dir, data, tmp_path / "out", "--use_peft", "--lora_target_modules", "all-linear")
    code, _, err = run(capsys, "sft", *arguments[1:])
    assert code == 0, err
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    code, _, err = run(capsys, "sft", *quick(model_dir, data, tmp_path / "new", "--lora_r", 4)[1:])
    assert "lora_r must be used together with use_peft" in err
    assert code == 2


@pytest.mark.parametrize(
    ("evaluated", "configs"), [((), ["en"]), (("a/pairs",), ["en", "en"]), (("another/name",), ["en", None])]
)
def test_dataset_config_is_that_of_the_named_dataset(monkeypatch, model_dir, evaluated, configs):
    from fastdpo.cli.arguments import AdapterArguments, RunArguments, parse
    from fastdpo.cli.run import load_datasets

    given = []

    def load_dataset(path, name=None, *, split, streaming):
        given.append(name)
        return Dataset.from_list(make_rows(4))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    options = quick(model_dir, "a/pairs", "out", "--dataset_config", "en", "--eval_fraction", 0)[1:]
    beside = ("--eval_dataset", *evaluated) if evaluated else ()
    run_arguments, _, args = parse("train", [RunArguments, AdapterArguments, DPOConfig], [*map(str, options), *beside])
    train, evaluation = load_datasets(run_arguments, args)
    assert len(train) == 4
    assert (evaluation is not None) == bool(evaluated)
    assert given == configs


def test_an_error_while_training_has_a_line_of_its_own(capsys, model_dir, data, tmp_path):
    shown = ("--learning_rate", "1e30", "--disable_tqdm", "false", "--eval_fraction", 0)
    code, _, err = run(capsys, *quick(model_dir, data, tmp_path / "out", *shown))
    assert code == 2
    assert [line.startswith("error: the loss is nan") for line in err.split("\n") if "error: " in line] == [True]


def test_a_stream_without_evaluation_rows_is_told_the_option_that_it_has(capsys, model_dir, data, tmp_path):
    """--eval_fraction holds nothing out of a stream."""
    options = ("--dataset_streaming", "true", "--max_steps", 1, "--logging_steps", 50)
    code, out, err = run(capsys, *quick(model_dir, data, tmp_path / "out", *options))
    assert code == 0, err
    assert "no before/after table: no evaluation rows (--eval_dataset) and no logged steps" in " ".join(out.split())


def test_help_groups_the_options_and_reaches_every_field(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in ("train", "sft", "demo", "--beta", "--use_peft", "--report_to", "--resume_from_checkpoint"):
        assert word in out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for f in fields(DPOConfig):
        assert re.search(rf"--{f.name}[ ,\n]", out), f.name
    assert out.index("model and data:") < out.index("preference optimization:") < out.index("everything else")


def test_an_unknown_command_names_the_nearest(capsys):
    code, _, err = run(capsys, "trian")
    assert code == 2
    assert "did you mean 'train'" in err


@pytest.mark.skipif(not SHARED.exists(), reason="needs the preference files beside the checkout")
@pytest.mark.parametrize(
    ("name", "kept", "rows"),
    [
        ("llms-from-scratch-preference.json", 1094, 1100),
        pytest.param("llama-factory-dpo-en-demo.json", 300, 300, marks=pytest.mark.slow),
        ("llama-factory-v1-dpo-demo.jsonl", 10, 10),
        ("hh-rlhf-harmless-test-benign44.jsonl", 44, 44),
        # prompts with 754 pairs of answers
        pytest.param("open-assistant-en-100-tree.jsonl.gz", 212, 212, marks=pytest.mark.slow),
    ],
)
def test_real_files_train_as_they_are(capsys, tmp_path, name, kept, rows):
    model_dir = tmp_path / "model"
    make_llama(vocab_size=260).save_pretrained(model_dir)
    make_byte_tokenizer().save_pretrained(model_dir)
    code, out, err = run(
        capsys,
        *("train", "--model", model_dir, "--dataset", SHARED / name, "--output_dir", tmp_path / "out"),
        *("--use_cpu", "true", "--max_steps", 1, "--per_device_train_batch_size", 2, "--max_length", "none"),
        *("--save_strategy", "no", "--eval_fraction", 0, "--disable_tqdm", "true", "--logging_steps", 1),
    )
    assert code == 0, err
    counts = re.search(r"kept ([\d]+) of ([\d]+) (pairs|prompts with 754 pairs)", out)
    loss = re.search(r"'loss': '([\d.]+)'", out)
    assert float(loss[1]) == pytest.approx(0.6931, abs=1e-4)
    assert int(counts[2]) == rows
    assert int(counts[1]) == kept


def test_gzipped_lines_train_too(capsys, model_dir, tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(8))
    code, _, err = run(capsys, *quick(model_dir, path, tmp_path / "out", "--max_steps", 1))
    assert code == 0, err


def test_sft_takes_the_same_files(capsys, model_dir, data, tmp_path):
    code, out, err = run(capsys, "sft", *quick(model_dir, data, tmp_path / "out")[1:])
    assert code == 0, err
    assert "loss (nats per token)" in out


def test_what_bitsandbytes_does_without_on_this_cpu_is_not_said(caplog):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("a kernel is missing")
    assert caplog.text == ""
