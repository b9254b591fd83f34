"""`{% generation %}` spans with white space at their ends, for tokenizers that trim it from offsets as GPT-NeoX's does:
the mask is the one that prefixes give."""

import pytest
from covering import every_pair
from tiny_tokenizers import CHATML, byte_level_tokenizer
from tokenizers import processors

from fastdpo.data.tokens.chat.sequences import in_spans
from fastdpo.data.tokens.tokenization import encode_row
from fastdpo.types import PreferenceRow

USER = {"role": "user", "content": "the cat?"}
MORE = {"role": "user", "content": "  and a dog?"}
SPECIAL = ("<|im_start|>", "<|im_end|>")


def said(text):
    return {"role": "assistant", "content": text}


def neox_tokenizer(template, trims=True):
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    return tokenizer


def chat(header, before, after, footer):
    """A template whose assistant's turns are `before` content `after`, between a header and a footer outside of it."""
    content = f"{{{{ {before!r} + m.content + {after!r} }}}}"
    opened = header.format("assistant")
    turn = f"{opened}{{% generation %}}{content}{{% endgeneration %}}{footer}"
    others = f"{header.format('{{ m.role }}')}{content}{footer}"
    each = f"{{% if m.role == 'assistant' %}}{turn}{{% else %}}{others}{{% endif %}}"
    ending = f"{{% if add_generation_prompt %}}{opened}{{% endif %}}"
    return f"{{% for m in messages %}}{each}{{% endfor %}}{ending}"


def without_marks(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


# the prompt's end and the turn's end are where the marks are, so both ways must agree
TEMPLATES = {
    "space_first": chat("<|im_start|>{}:", " ", "<|im_end|>", ""),
    "new_line_last": chat("<|im_start|>{}:", "", "<|im_end|>\n", ""),
    "white_space_at_both_ends": chat("<|im_start|>{}:", "\n\n", " \n", ""),
    "nothing_but_the_content": chat("<|im_start|>{}:", "", "", ""),
}
CONTENTS = ["sat", " sat", "sat ", "\n\nsat\n\n", "  sat  on the mat  ", "問 sat 🎉 "]


@pytest.mark.parametrize(*every_pair(trims=[True, False], name=list(TEMPLATES), content=CONTENTS))
def test_marks_give_the_mask_of_prefixes(trims, name, content):
    row = PreferenceRow([USER], ([said(content), MORE, said(content + " ran")], [said("no")]))
    masks = []
    for template in (TEMPLATES[name], without_marks(TEMPLATES[name])):
        group, _ = encode_row(row, neox_tokenizer(template, trims))
        masks.append(group.loss_masks)
    assert masks[0] == masks[1]
    tokenizer = neox_tokenizer(TEMPLATES[name])
    pairs = zip(group.responses[0], masks[0][0], strict=True)
    counted = tokenizer.decode([token for token, counts in pairs if counts])
    assert "dog" not in counted
    assert counted.count(content.strip()) == 2


def test_a_user_turn_between_marked_turns_never_counts():
    template = CHATML.replace(
        "{{ m.content }}<|im_end|>\n",
        "{% if m.role == 'assistant' %}{% generation %} {{ m.content }} {% endgeneration %}<|im_end|>\n"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
    )
    tokenizer = neox_tokenizer(template)
    group, _ = encode_row(PreferenceRow([USER], ([said("sat"), MORE, said("ran")], [said("no")])), tokenizer)
    pairs = zip(group.responses[0], group.loss_masks[0], strict=True)
    assert tokenizer.decode([token for token, counts in pairs if counts]) == " sat  ran "


def test_tokens_that_overlap_a_span_are_in_it_and_empty_spans_hold_none():
    offsets = [(0, 3), (3, 5), (5, 6), (6, 9)]
    assert in_spans(offsets, [(4, 6)]) == [False, True, True, False]
    assert in_spans(offsets, [(0, 0), (4, 4), (6, 9)]) == [False, False, False, True]
    assert in_spans(offsets, []) == [False] * 4
