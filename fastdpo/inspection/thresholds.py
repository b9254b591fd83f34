"""The thresholds of all checks, each with its reason.

A share refers to the rows, pairs or prompts that the check counts. Above `look` the verdict is "look", above `bad` it
is "bad". A threshold of None is never exceeded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """Shares in [0, 1] above which a check is not ok."""

    look: float | None
    bad: float | None
    reason: str

    def verdict(self, share: float) -> str:
        if self.bad is not None and share > self.bad:
            return "bad"
        return "look" if self.look is not None and share > self.look else "ok"


LIMITS = {
    "rows": Limit(
        0.0, 0.05, "Single rows without a usable pair are slips. One in twenty means that a column is read wrongly."
    ),
    "duplicates": Limit(
        0.0,
        0.05,
        "A repeated row counts twice in the loss, and one copy may be held out for evaluation. More than one in twenty"
        " comes from a join or a file that was appended twice.",
    ),
    "near duplicates": Limit(
        0.01,
        0.20,
        "MinHash estimates similarity with an error of some hundredths, so single finds are normal. One row in five"
        " means generated or templated data, which holds less information than its size suggests.",
    ),
    "equal answers": Limit(
        0.0,
        0.05,
        "Answers that differ only in blanks or upper case teach only spelling. More than one pair in twenty is a bug.",
    ),
    "contradictions": Limit(
        0.0,
        0.05,
        "Both orders of the same two answers cancel each other in the loss. People disagree on single pairs; more than"
        " one pair in twenty means that two sources label differently, or that columns are swapped in one of them.",
    ),
    "cycles": Limit(
        0.0,
        0.20,
        "No scores can satisfy a cycle. People's pairwise judgements have some cycles. Cycles in one prompt out of five"
        " mean that labels are close to random.",
    ),
    "train and eval": Limit(
        0.0, 0.01, "Evaluation on training prompts measures memorization. One in a hundred hardly changes a mean."
    ),
    "one side cut": Limit(
        0.0,
        0.05,
        "If only one answer loses its end, the model learns from the length and the missing end-of-text token, not from"
        " the content.",
    ),
    "ends cut": Limit(
        0.01,
        0.20,
        "A cut answer has no end-of-text token, so the model sees answers that never stop. Single ones do no harm. One"
        " in five calls for a longer max_length.",
    ),
    "special tokens": Limit(
        0.0,
        0.50,
        "Special tokens in text are rare in real answers. If more than half of the rows have them, the text probably"
        " contains the chat template already, and training would apply it a second time.",
    ),
    "lost content": Limit(
        0.0,
        0.01,
        "Content that the chat template or the tokenizer leaves out is not trained. Single rows are exceptions. More"
        " than one in a hundred means that the template does not fit the data.",
    ),
    "prompt ends": Limit(
        0.0,
        None,
        "In generation, the prompt ends in something that never comes before an answer in training, such as an opened"
        " thought. The template decides this, so it is never bad.",
    ),
    "chat template": Limit(
        0.0,
        None,
        "A chat model that is asked through its template never sees prompts as in training. Plain text is right for a"
        " base model whose tokenizer brings a template, so it is never bad.",
    ),
}

# The share of pairs whose chosen answer is the longer one. Its whole 95 % interval must exceed the threshold. Good
# answers are often longer, so some distance from one half is normal. Above three quarters, length alone predicts most
# labels, and DPO is known to exploit that (Park et al. 2024, arXiv 2403.19159). The same thresholds apply if rejected
# answers are longer.
LENGTH_LOOK, LENGTH_BAD = 0.60, 0.75

# Near duplicates: both the prompt and the answers have at least this Jaccard similarity of their runs of SHINGLE
# bytes. Text corpora are deduplicated at 0.8 (Lee et al. 2022, arXiv 2107.06499, uses edit similarity 0.8).
NEAR_SIMILARITY = 0.8
SHINGLE = 8  # bytes: longer than most words, so that common words alone do not make texts similar
