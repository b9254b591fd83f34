"""Adapters for published datasets: each one reads one published schema without renamed columns.

In: an unchanged row of the dataset. Out: a `PreferenceRow`, a pair or a group of ranked answers. Two modules: `pairs`
(one comparison a row) and `groups` (several ranked answers to a prompt). Questions and answers become messages; for a
tokenizer without a chat template they become transcripts. Refused with BadRow: ties, and rows that the dataset's
users usually drop.
"""

from fastdpo.data.forms.adapters.groups import GROUPS
from fastdpo.data.forms.adapters.pairs import PAIRS

ADAPTERS = (*PAIRS, *GROUPS)
