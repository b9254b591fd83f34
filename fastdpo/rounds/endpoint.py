"""A judge: a language model behind an OpenAI-compatible endpoint that compares two responses.

It compares every pair twice, once in each order, because such judges favour a position (Zheng et al., arXiv
2306.05685). If the two verdicts differ, the comparison is a tie. A response's score is the share of comparisons that it
wins against the other responses to its prompt. An unreadable answer, or a request that fails in all attempts, is a tie
and is counted in `Counts`. An endpoint that gives no readable answer to GIVE_UP requests in a row is refused.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any

QUESTION = (
    "Which of the two responses answers the request better? Consider correctness first, then helpfulness. Do not let"
    " length or order decide.\n\n[Request]\n{prompt}\n\n[Response A]\n{a}\n\n[Response B]\n{b}\n\nAnswer with the"
    " letter A or B alone, or C if they are equally good."
)
TIMEOUT = 60.0  # seconds for a request
GIVE_UP = 16  # requests in a row without a readable answer
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

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.comparisons + other.comparisons, self.agreed + other.agreed, self.unread + other.unread)


class EndpointJudge:
    """Compares all responses to a prompt with each other.

    Args:
        url: the base URL, such as http://localhost:8000/v1.
        model: the endpoint's name of the model.
        timeout: seconds for a request. A request that takes longer is not repeated.
        attempts: number of attempts for each request that fails in another way.
    """

    def __init__(
        self, url: str, model: str, *, timeout: float = TIMEOUT, attempts: int = 3, num_parallel: int = 8
    ) -> None:
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.timeout, self.attempts, self.num_parallel = timeout, attempts, num_parallel
        self.counts = Counts()
        self._unread_in_a_row, self._last_failure = 0, ""

    def scores(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """(n,) the share of comparisons that each response wins. A tie counts half.

        Raises:
            ValueError: the endpoint refuses a request, or it has not answered GIVE_UP requests in a row.
        """
        return self.judged(prompt, responses)[0]

    def judged(self, prompt: str, responses: Sequence[str]) -> tuple[list[float], Counts]:
        """As `scores`, and the counts of this prompt alone."""
        wins, counts = [0.0] * len(responses), Counts()
        pairs = list(combinations(range(len(responses)), 2))
        asked = [(prompt, responses[a], responses[b]) for i, j in pairs for a, b in ((i, j), (j, i))]
        with ThreadPoolExecutor(self.num_parallel) as pool:
            verdicts = list(pool.map(lambda question: self._verdict(*question), asked))
        self._check_answers(verdicts)
        for number, (i, j) in enumerate(pairs):
            forward, backward = verdicts[2 * number : 2 * number + 2]
            backward = {"A": "B", "B": "A"}.get(backward or "", backward)
            counts.comparisons += 1
            counts.unread += (forward is None) + (backward is None)
            counts.agreed += forward is not None and forward == backward
            share = {"A": 1.0, "B": 0.0}.get(forward or "", 0.5) if forward == backward else 0.5
            wins[i] += share
            wins[j] += 1 - share
        self.counts += counts
        others = max(len(responses) - 1, 1)
        return [won / others for won in wins], counts

    def check_any(self, counts: Iterable[Counts]) -> None:
        """Raises ValueError if no request of these counts had a readable answer."""
        total = sum(counts, Counts())
        if total.unread and total.unread == 2 * total.comparisons:
            raise ValueError(
                f"judge endpoint {self.url} must answer A, B or C, got no readable answer to any of {total.unread}"
                f" requests; the last one: {self._last_failure}"
            )

    def _check_answers(self, verdicts: Sequence[str | None]) -> None:
        for verdict in verdicts:
            self._unread_in_a_row = 0 if verdict is not None else self._unread_in_a_row + 1
        if self._unread_in_a_row >= GIVE_UP:
            raise ValueError(
                f"judge endpoint {self.url} must answer A, B or C, got no readable answer to the last"
                f" {self._unread_in_a_row} requests; the last one: {self._last_failure}"
            )

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
                self._last_failure = str(error)
            except TimeoutError:
                self._last_failure = f"no answer within {self.timeout:g} seconds (--judge_timeout)"
                return None
            except (OSError, ValueError, KeyError, IndexError, TypeError, http.client.HTTPException) as error:
                if isinstance(getattr(error, "reason", None), TimeoutError):  # while connecting
                    self._last_failure = f"no connection within {self.timeout:g} seconds (--judge_timeout)"
                    return None
                self._last_failure = f"{type(error).__name__}: {error}"  # a reset, no JSON, another JSON
            else:
                letters = _LETTER.findall(str(said))
                if not letters:
                    self._last_failure = f"the answer was {str(said)[:80]!r}"
                return letters[-1] if letters else None
            time.sleep(min(0.5 * 2**attempt, 8.0) if attempt + 1 < self.attempts else 0)
        return None
