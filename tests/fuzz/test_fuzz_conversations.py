"""Any conversation, any template: tokens decode to what the row said, or the row is counted as dropped or as lossy."""

from fuzzing import assert_ours, fuzz
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, byte_level_tokenizer
from values import anything, texts

from fastdpo.data.prepare import GROUP_COLUMNS
from fastdpo.data.rows.columns import RowPreparer, group_from_columns
from fastdpo.data.tokens.settings import TokenizationSettings

WHOLE = TokenizationSettings(max_length=None)
SPECIAL = ("<|im_start|>", "<|im_end|>")
contents = st.one_of(st.text(min_size=1, max_size=12), texts.filter(lambda text: len(text) < 100))
roles = st.sampled_from(("user", "assistant", "system", "tool"))


def said(role, content):
    return {"role": role, "content": content}


@st.composite
def conversations(draw):
    """A prompt of turns, and two answers of one turn, all of them text."""
    prompt = [said(draw(roles), draw(contents)) for _ in range(draw(st.integers(0, 3)))]
    prompt.append(said("user", draw(contents)))
    answers = [[said("assistant", draw(contents))] for _ in range(2)]
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


text_rows = st.fixed_dictionaries({"prompt": contents, "chosen": contents, "rejected": contents})


def prepared(row, tokenizer):
    """The columns of one row, or None if it was refused."""
    try:
        columns = RowPreparer(tokenizer, WHOLE, False)({name: [value] for name, value in row.items()}, [0])
    except ValueError as error:
        assert_ours(error)
        return None
    return {name: values[0] for name, values in columns.items()}


def decoded(columns, tokenizer):
    """The texts of chosen and rejected, prompt included."""
    group = group_from_columns({name: columns[name] for name in GROUP_COLUMNS})
    return [tokenizer.decode([*group.prompt_ids, *response]) for response in group.responses]


def test_tokens_decode_to_what_the_row_said():
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=CHATML)

    def check(row):
        columns = prepared(row, tokenizer)
        if columns is None:
            return "refused"
        if columns["bad_row"] is not None:
            return "dropped"
        if any(isinstance(said, str) and said.lstrip().startswith(("[", "{")) for said in row.values()):
            return "text that may be messages"
        if isinstance(row["prompt"], str) and not isinstance(row["prompt"], list):
            for text, answer in zip(decoded(columns, tokenizer), (row["chosen"], row["rejected"]), strict=True):
                assert row["prompt"] + answer in text
            return "text"
        for text, answer in zip(decoded(columns, tokenizer), (row["chosen"], row["rejected"]), strict=True):
            place = 0
            for message in [*row["prompt"], *answer]:
                content = message["content"].removesuffix("</s>")  # which ends an answer as its EOS, once
                place = text.find(content, place)
                assert place >= 0, (message, text)
                place += len(content)
        return "messages"

    rows = st.one_of(conversations(), text_rows)
    outcomes = fuzz("conversations", rows, check)
    assert min(outcomes[kind] for kind in ("text", "messages")) > 20, outcomes


EXPRESSIONS = (
    *("m.content", "m['role']", "m.content[0]", "m.nothing.at_all", "messages[99].role", "1 / 0", "m.content + 1"),
    *("messages", "tools", "bos_token", "eos_token", "m.content | upper", "m | tojson", "loop.index0", "x", "1e999"),
    *("raise_exception('no')", "namespace(a=1).a", "strftime_now('%Y')", "'a' * 3", "m.content.split('\\n')[-1]"),
    *(
        "range(3) | list",
        "m.__class__",
        "''.__class__.__mro__",
        "m.content.format",
        "messages | length",
        "none",
        "-'a'",
    ),
)
pieces = st.one_of(
    st.sampled_from(EXPRESSIONS).map(lambda text: "{{ " + text + " }}"),
    st.sampled_from(EXPRESSIONS).map(lambda text: "{% if " + text + " %}y{% else %}n{% endif %}"),
    st.sampled_from(
        ("<|im_start|>", "<|im_end|>\n", "{% generation %}{{ m.content }}{% endgeneration %}", "{{", "%}", "{#")
    ),
    texts.filter(lambda text: len(text) < 20),
)
templates = st.one_of(
    st.tuples(st.lists(pieces, max_size=2), st.lists(pieces, max_size=4), st.lists(pieces, max_size=2)).map(
        lambda parts: (
            "{% for m in messages %}".join(("".join(parts[0]), "".join(parts[1]))) + "{% endfor %}" + "".join(parts[2])
        )
    ),
    st.sampled_from((CHATML, "", "{{ messages[0].content }}", CHATML.replace("messages", "messages[1:]"))),
)


def test_any_template_renders_or_refuses_any_conversation():
    tokenizers = {}

    def check(case):
        template, row, kwargs = case
        tokenizer = tokenizers.setdefault("one", byte_level_tokenizer(bos="<s>", special=SPECIAL))
        tokenizer.chat_template = template
        columns = prepared({**row, **kwargs}, tokenizer)
        if columns is None:
            return "refused"
        if columns["bad_row"] is not None:
            assert columns["bad_row"]
            return "dropped"
        lost = {note["side"] for note in columns["notes"] or () if note["kind"] == "lost"}
        for name, text in zip(("chosen", "rejected"), decoded(columns, tokenizer), strict=True):
            answer = row[name][-1]["content"].strip()
            assert name in lost or answer in text or len(answer) < 9, (answer, text)
        return "kept"

    own = st.dictionaries(st.sampled_from(("chat_template_kwargs", "tools")), anything, max_size=1)
    outcomes = fuzz("templates", st.tuples(templates, conversations(), own), check)
    assert outcomes["kept"] > 5, outcomes
