"""A tiny chat model and rows like those of LLMs-from-scratch, for the recipes on a real model."""

import json

from tiny import make_byte_tokenizer, make_llama

POLITE, BLUNT = "I would suggest {}, please.", "Obviously {}, duh."


def save_chat_model(folder):
    tokenizer = make_byte_tokenizer()
    make_llama(len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tasks(path, num_rows):
    rows = [
        {
            "instruction": f"Add {number} and 1.",
            "input": "" if number % 2 else "Now.",
            "output": f"{number + 1}",
            "chosen": POLITE.format(number + 1),
            "rejected": BLUNT.format(number + 1),
        }
        for number in range(num_rows)
    ]
    rows.append({**rows[0], "instruction": "Same.", "rejected": rows[0]["chosen"]})
    path.write_text(json.dumps(rows))
    return path
