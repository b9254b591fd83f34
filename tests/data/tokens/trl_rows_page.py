"""What TRL makes of rows as people write them, beside what becomes of them here: both tried, row by row. The table
between the marks in docs/migrating.md is printed by `python tests/data/tokens/trl_rows_page.py`.
"""

import json
from types import SimpleNamespace

from datasets import Dataset
from peers import peer
from tiny_tokenizers import byte_level_tokenizer

from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings

TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }} {% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SYSTEM, USER = {"role": "system", "content": "S"}, {"role": "user", "content": "Q"}
GOOD, BAD = {"role": "assistant", "content": "G"}, {"role": "assistant", "content": "B"}
TEXTS = {"chosen": "G", "rejected": "B"}
LISTS = {"chosen": [GOOD], "rejected": [BAD]}
TOOL = {"name": "f", "default": None}


def _call(arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}


ROWS = [
    {"messages": [USER], **TEXTS},
    {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    {"question": "Q", **TEXTS},
    {"history": [["Q0", "A0"]], "prompt": "Q", **TEXTS},
    {"system": "S", "prompt": [USER], **LISTS},
    {"prompt": "Q", "notes_of_mine": "read the Q twice", **TEXTS},
    {"prompt": [{"role": "Human", "content": "Q"}], "chosen": [{"role": "GPT", "content": "G"}], "rejected": [BAD]},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "user", "content": "B"}]},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "narrator", "content": "B"}]},
    {"prompt": "Q", "chosen": ["G"], "rejected": ["B", "C"]},
    {"prompt": "Q", "response_a": "B", "response_b": "G", "winner": "b"},
    {"prompt": "Q", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    {"prompt": [USER], "tools": [json.dumps(TOOL)], **LISTS},
    {"prompt": [USER], "tools": [TOOL], **LISTS},
    {"prompt": [USER], "chosen": [_call({"x": None})], "rejected": [_call({"y": 1})]},
    {"prompt": [USER, {"role": "assistant", "content": None}, USER], **LISTS},
    {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [USER], "chosen": "G", "rejected": "B"},
    {"chosen": [USER, GOOD], "rejected": "B"},
    {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    {"messages": [USER, GOOD], "rejected_response": "B"},
    {"context": [USER], "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}]},
    {"instruction": "Q", "input": "I", **TEXTS},
]


def page():
    """The lines of the table."""
    lines = ["| a row | in TRL 1.16 | here |", "|---|---|---|"]
    return [*lines, *(f"| {_code(json.dumps(row))} | {theirs(row)} | {ours(row)} |" for row in ROWS)]


def theirs(row):
    """What TRL's own preparation and collator make of a row."""
    dpo_trainer = peer("trl.trainer.dpo_trainer")
    tokenizer = _tokenizer()
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    try:
        dataset = Dataset.from_list([row])
        prepare = dpo_trainer.DPOTrainer._prepare_dataset
        dataset = prepare(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, args, "train")
        batch = dpo_trainer.DataCollatorForPreference(tokenizer.pad_token_id)(list(dataset))
    except Exception as error:  # whatever it is, that is what a user gets
        if len({type(row[side]) for side in ("prompt", "chosen", "rejected") if side in row}) > 1:
            return "an error that varies from run to run, because TRL reads the columns in the order of a set"
        return _code(f"{type(error).__name__}: {str(error).splitlines()[0][:60]}")
    keep, mask = batch["attention_mask"].bool(), batch["completion_mask"].bool()
    prompt = tokenizer.decode(batch["input_ids"][0][keep[0] & ~mask[0]])
    return _said(prompt, [tokenizer.decode(ids[mask[i]]) for i, ids in enumerate(batch["input_ids"])])


def ours(row):
    """What becomes of it here, in a list, as files give rows."""
    tokenizer = _tokenizer()
    try:
        prepared, _ = prepare_preference_dataset([row], tokenizer, TokenizationSettings(max_length=None))
    except ValueError as error:
        text = str(error)
        for start, end in (("dropped 1: ", " (1: row 0)"), ("", ": map them")):
            if start in text and end in text:
                text = text.partition(start)[2].partition(end)[0] if start else text.partition(end)[0]
        return f"refused: {text}"
    group = group_from_columns(prepared[0])
    return _said(tokenizer.decode(group.prompt_ids), [tokenizer.decode(ids) for ids in group.responses])


def _tokenizer():
    return byte_level_tokenizer(chat_template=TEMPLATE)


def _said(prompt, responses):
    # without the EOS, which TRL puts behind text or not, as the order of a set of columns has it
    return f"{_code(prompt)} then {', '.join(_code(response.removesuffix('</s>')) for response in responses)}"


def _code(text):
    line = text.replace("\n", "\\n")
    return f"`{line}`" if text else "nothing"


if __name__ == "__main__":
    print("\n".join(page()))
