"""What a run does with its chat template: settings, what is said at the start, what is saved."""

import json

import pytest
from tiny import make_byte_tokenizer, make_llama
from transformers import AutoTokenizer

from fastdpo import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from fastdpo.cli.main import main

USER = {"role": "user", "content": "the cat?"}
CUTS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content.split('</think>')[-1] }}{{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def rows(num_rows=4):
    def said(thought, text):
        return [{"role": "assistant", "content": f"<think>{thought}</think>{text}"}]

    return [{"prompt": [USER], "chosen": said("hm", f"yes {i}"), "rejected": said("ah", "no")} for i in range(num_rows)]


def trainer(tmp_path, config=DPOConfig, trainer_class=DPOTrainer, tokenizer=None, **settings):
    args = config(
        str(tmp_path / "out"), use_cpu=True, report_to=[], max_steps=1, per_device_train_batch_size=2, **settings
    )
    tokenizer = tokenizer or make_byte_tokenizer(CUTS)
    return trainer_class(make_llama(260), args=args, train_dataset=rows(), processing_class=tokenizer)


@pytest.mark.parametrize(
    ("config", "trainer_class", "sides"),
    [(DPOConfig, DPOTrainer, "4 of 4 chosen, 4 of 4 rejected"), (SFTConfig, SFTTrainer, "4 of 4 responses")],
)
def test_what_is_lost_stands_in_the_start_summary_with_an_example(tmp_path, caplog, config, trainer_class, sides):
    with caplog.at_level("WARNING"):
        run = trainer(tmp_path, config, trainer_class)
    line = f"the chat template leaves out thoughts: {sides}; row 0: 'hm'"
    assert line in run.summary()
    assert line in [record.message for record in caplog.records]
    with pytest.raises(ValueError, match=r"leaves out thoughts \(hm\)"):
        trainer(tmp_path, config, trainer_class, on_lost_content="raise")


def test_a_training_template_keeps_thoughts_and_the_tokenizer_is_saved_as_it_was(tmp_path):
    run = trainer(tmp_path, chat_template="qwen3", chat_template_kwargs='{"enable_thinking": true}')
    assert "leaves out" not in run.summary()
    decoded = run.processing_class.decode(run.train_dataset[0]["responses"][0])
    assert decoded == "<think>\nhm\n</think>\n\nyes 0<|im_end|>\n</s>"
    run.train()
    run.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CUTS


def test_a_template_from_a_file_is_saved_with_the_model(tmp_path):
    keeps = CUTS.replace(".split('</think>')[-1]", "")
    (tmp_path / "mine.jinja").write_text(keeps)
    run = trainer(tmp_path, chat_template=str(tmp_path / "mine.jinja"))
    assert run.processing_class.decode(run.train_dataset[0]["responses"][0]) == "<think>hm</think>yes 0</s> "
    run.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == keeps


def test_arguments_of_the_run_reach_the_template(tmp_path):
    template = "{{ mood }}" + CUTS
    run = trainer(tmp_path, tokenizer=make_byte_tokenizer(template), chat_template_kwargs={"mood": "kind "})
    assert run.processing_class.decode(run.train_dataset[0]["prompt_ids"]) == "kind <user> the cat?</s> <assistant> "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_lost_content": "keep"}, "on_lost_content must be one of"),
        ({"on_long_row": "cut"}, "on_long_row must be one of"),
        ({"chat_template": "nothere.jinja"}, "chat_template must be an existing file .*got 'nothere.jinja'"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs must be a JSON object"),
        ({"chat_template_kwargs": {"tokenize": True}}, r"chat_template_kwargs must not hold \['tokenize'\]"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(str(tmp_path), **settings)


def test_the_commands_take_the_same_settings(tmp_path, capsys):
    make_llama(260).save_pretrained(tmp_path / "model")
    make_byte_tokenizer(CUTS).save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    words = ["--model", tmp_path / "model", "--dataset", tmp_path / "rows.jsonl", "--use_cpu", "true"]
    words += ["--max_steps", "1", "--max_length", "256", "--on_long_row", "drop"]
    for command in ("train", "sft"):
        run = [command, *map(str, words), "--output_dir", str(tmp_path / command)]
        assert main([*run, "--on_lost_content", "warn"]) == 0
        assert "the chat template leaves out thoughts" in " ".join(capsys.readouterr().out.split())
        run[-1] += "-kept"
        kept = ["--chat_template", "qwen3", "--chat_template_kwargs", '{"enable_thinking": true}']
        assert main([*run, *kept, "--on_lost_content", "raise"]) == 0
        assert AutoTokenizer.from_pretrained(run[-1]).chat_template == CUTS
