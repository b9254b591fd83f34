"""A judge for the sentiment task that errs like a person: `--judge recipes.judges:bradley_terry`."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from typing import Any

from fastdpo.data.synthetic import true_reward


def bradley_terry(prompts: Sequence[Any], completions: Sequence[str], **kwargs: Any) -> list[float]:
    """The true reward plus Gumbel noise: of two responses the first scores higher with probability sigmoid(r1 - r2),
    and the order of several is a draw from Plackett-Luce (Luce 1959; Yellott 1977).

    The noise depends on all texts of the call and on the place of the response: the same call gives the same scores, so
    that a stopped run continues as it was, and a text that comes again is judged anew.
    """
    digest = hashlib.blake2b(json.dumps([list(prompts), list(completions)]).encode()).hexdigest()
    rng = random.Random(digest)
    return [true_reward(text) - math.log(-math.log(rng.random() or 0.5)) for text in completions]
