"""From which share on a finding is worth a look, or bad. All of them, each with its reason.

A share is that of the rows, pairs or prompts that the check counts. Above `look` the verdict is "look", above `bad` it
is "bad". None never is.
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
        0.0, 0.05, "Single rows without a usable pair are slips; one in twenty means that a column is read wrongly."
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
        " means generated or templated data, of which there is less than it seems.",
    ),
    "equal answers": Limit(
        0.0,
        0.05,
        "Answers that differ only in blanks or upper case teach spelling; more than one pair in twenty is a bug.",
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
        "No scores can satisfy a cycle. Pairwise judgements of people have some; cycles in one prompt out of five mean"
        " that labels are close to random.",
    ),
    "train and eval": Limit(
        0.0, 0.01, "Evaluation on prompts of the training data measures memory. One in a hundred hardly moves a mean."
    ),
    "one side cut": Limit(
        0.0,
        0.05,
        "Where one answer alone loses its end, the model learns from the length and the missing end-of-text token, not"
        " from the content.",
    ),
    "ends cut": Limit(
        0.01,
        0.20,
        "A cut answer has no end-of-text token, so the model sees answers that never stop. Single ones do no harm; one"
        " in five calls for a longer max_length.",
    ),
    "special tokens": Limit(
        0.0,
        0.50,
        "Special tokens in text are rare in real answers. In more than half of the rows they are the chat template,"
        " written into the text and applied a second time.",
    ),
    "lost content": Limit(
        0.0,
        0.01,
        "What the chat template or the tokenizer leaves out is not trained on. Single rows are odd ones; more than one"
        " in a hundred means that the template does not fit the data.",
    ),
    "prompt ends": Limit(
        0.0,
        None,
        "The prompt of generation ends in something that never stood before an answer in training, such as an opened"
        " thought. It is a choice of the template, hence never bad.",
    ),
}

# The share of pairs whose chosen answer is the longer one, by its 95 % interval: the whole interval must lie beyond.
# Good answers are often longer, so some distance from one half is normal. From three quarters on, a judge of length
# alone would be right about most labels, and DPO is known to exploit that (Park et al. 2024, arXiv 2403.19159).
# Rejected answers that are longer are judged by the same distance.
LENGTH_LOOK, LENGTH_BAD = 0.60, 0.75

# Near duplicates: both the prompt and the answers have at least this Jaccard similarity of their runs of SHINGLE
# bytes. 0.8 is what text corpora are deduplicated by (Lee et al. 2022, arXiv 2107.06499, uses edit similarity 0.8).
NEAR_SIMILARITY = 0.8
SHINGLE = 8  # bytes: longer than most words, so that common words alone make nothing similar
