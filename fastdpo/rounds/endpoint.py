"""A judge: a language model behind an OpenAI-compatible endpoint that compares two responses.

It compares every pair twice, once in each order, because such judges favour a position (Zheng et al., arXiv
2306.05685). If the two verdicts differ, the comparison is a tie. A response's score is the share of comparisons that it
wins against the other responses to its prompt. An unreadable answer, or a request that fails in all attempts, is a tie
and is counted in `Counts`.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any

QUESTION = (
    "Which of the two responses answers the request better? Consider correctness first, then helpfulness. Do not let"
    " length or order decide.\n\n[Request]\n{prompt}\n\n[Response A]\n{a}\n\n[Response B]\n{b}\n\nAnswer with the"
    " letter A or B alone, or C if they are equally good."
)
_LETTER = re.compile(r"\b([ABC])\b")


@dataclass
class Counts:
    """How reliable the judge was."""

    comparisons: int = 0  # each made in both orders
    agreed: int = 0  # both orders gave the same verdict
    unread: int = 0  # requests without a verdict: they failed, or the answer had no letter

    @property
    def agreement(self) -> float:
        return self.agreed / self.comparisons if self.comparisons else 0.0


class EndpointJudge:
    """Compares all responses to a prompt with each other.

    Args:
        url: the base URL, such as http://localhost:8000/v1.
        model: the endpoint's name of the model.
        timeout: seconds for a request.
        attempts: number of attempts for each request.
    """

    def __init__(
        self, url: str, model: str, *, timeout: float = 60.0, attempts: int = 3, num_parallel: int = 8
    ) -> None:
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.timeout, self.attempts, self.num_parallel = timeout, attempts, num_parallel
        self.counts = Counts()

    def scores(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """(n,) the share of comparisons that each response wins. A tie counts half."""
        wins = [0.0] * len(responses)
        pairs = list(combinations(range(len(responses)), 2))
        asked = [(prompt, responses[a], responses[b]) for i, j in pairs for a, b in ((i, j), (j, i))]
        with ThreadPoolExecutor(self.num_parallel) as pool:
            verdicts = list(pool.map(lambda question: self._verdict(*question), asked))
        for number, (i, j) in enumerate(pairs):
            forward, backward = verdicts[2 * number : 2 * number + 2]
            backward = {"A": "B", "B": "A"}.get(backward or "", backward)
            self.counts.comparisons += 1
            self.counts.unread += (forward is None) + (backward is None)
            self.counts.agreed += forward is not None and forward == backward
            share = {"A": 1.0, "B": 0.0}.get(forward or "", 0.5) if forward == backward else 0.5
            wins[i] += share
            wins[j] += 1 - share
        others = max(len(responses) - 1, 1)
        return [won / others for won in wins]

    def _verdict(self, prompt: str, a: str, b: str) -> str | None:
        """A, B or C; None without a readable answer."""
        content = QUESTION.format(prompt=prompt, a=a, b=b)
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(self.attempts):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    said: Any = json.load(response)["choices"][0]["message"]["content"]
            except urllib.error.HTTPError as error:
                if error.code in (400, 401, 403, 404):
                    raise ValueError(f"judge endpoint {self.url} refused the request: {error}") from error
            except (OSError, ValueError, KeyError, IndexError, TypeError):  # a time-out, a reset, no JSON, another JSON
                pass
            else:
                letters = _LETTER.findall(str(said))
                return letters[-1] if letters else None
            time.sleep(min(0.5 * 2**attempt, 8.0) if attempt + 1 < self.attempts else 0)
        return None
