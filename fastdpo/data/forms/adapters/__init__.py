"""The field's datasets by their own columns: every adapter reads one published schema as it is.

In: a row as the dataset has it. Out: a `PreferenceRow`, a pair or a group of ranked answers. Two modules: `pairs` (one
comparison a row) and `groups` (several ranked answers to a prompt). Questions and answers become messages; a tokenizer
without a chat template gets them as transcripts. Refused with BadRow: ties, and what a dataset's users leave out.
"""

from fastdpo.data.forms.adapters.groups import GROUPS
from fastdpo.data.forms.adapters.pairs import PAIRS

ADAPTERS = (*PAIRS, *GROUPS)
