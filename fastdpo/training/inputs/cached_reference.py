"""CachedReference: reference log-probs of every row, computed before training, and of rows that come later.

In: prepared datasets, the policy before its first step, and the reference that the user gave, if any. Out: the datasets
with reference log-probs in every row. The reference is freed when that is done. Datasets that come later are read from
the cache; what it lacks is computed where the reference can still be had: a model given by name or as an adapter, or,
before the first step, the policy itself, unless the trainer's model has been replaced by another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from fastdpo.modeling.backbone import bare_model
from fastdpo.references import AdapterReference
from fastdpo.references.cache import LogpsCache
from fastdpo.references.precompute import Scorer, fill_ref_logps, lacks_ref_logps
from fastdpo.training.inputs.streams import check_not_streamed
from fastdpo.training.settings.config import DPOConfig
from fastdpo.training.setup.reference import AskedOnce, asked_once, give_memory_back


class CachedReference(TrainerCallback):
    """A reference that is asked before training.

    Args:
        policy_of: returns the trainer's model, which may be replaced.
        ref_model: by default the policy as it is now. A model is held until training starts.
    """

    def __init__(
        self, args: DPOConfig, policy_of: Callable[[], nn.Module], ref_model: str | nn.Module | None, tokenizer: Any
    ) -> None:
        self.args, self.policy_of, self.ref_model, self.tokenizer = args, policy_of, ref_model, tokenizer
        self._own: AskedOnce | None = None  # where it is the policy itself
        self._cache: LogpsCache | None = None

    def fill(
        self, datasets: Mapping[str, Dataset], check_packing: Callable[[nn.Module], bool]
    ) -> tuple[dict[str, Dataset], str]:
        """The datasets with reference log-probs, by the same names, and what was done in words.

        Args:
            check_packing: whether a model that is given runs packed batches.
        """
        check_not_streamed(datasets, self.args)
        policy = self.policy_of()
        with asked_once(self.args, policy, self.ref_model, self.tokenizer) as asked:
            self.is_packed = check_packing(policy if self.ref_model is None else asked.model)
            self._cache = asked.cache(self.args)
            scorer = asked.scorer(self.args, is_packed=self.is_packed, tokenizer=self.tokenizer)
            filled, counts = {}, []
            for name, dataset in datasets.items():
                filled[name], count = fill_ref_logps(dataset, self._cache, scorer, name=name)
                counts.append(f"{name} {count}")
            if self.ref_model is None:
                self._own = asked
        del asked, scorer
        give_memory_back()
        return filled, f"{'; '.join(counts)}; in {self._cache.folder}"

    def fill_late(self, dataset: Dataset, name: str) -> Dataset:
        """A dataset that came after the others, with reference log-probs.

        Raises:
            ValueError: rows are neither in the cache nor can they be computed any more.
        """
        assert self._cache is not None
        check_not_streamed({name: dataset}, self.args)
        with self._scorer(dataset, self._cache) as scorer:
            return fill_ref_logps(dataset, self._cache, scorer, name=name)[0]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A model that was given is not held beside the policy."""
        if isinstance(self.ref_model, nn.Module):
            self.ref_model = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A policy whose weights are all trained is its own reference until its first step."""
        if self._own is not None and not isinstance(self._own.reference, AdapterReference):
            self._own = None

    @contextmanager
    def _scorer(self, dataset: Dataset, cache: LogpsCache) -> Iterator[Scorer | None]:
        """How missing rows are scored; None where nothing is missing, or the reference is gone."""
        policy = self.policy_of()
        if self._own is not None and bare_model(self._own.model) is not bare_model(policy):
            self._own = None
        if (self._own is None and self.ref_model is None) or not lacks_ref_logps(dataset, cache):
            yield None
            return
        again = asked_once(self.args, policy, self.ref_model, self.tokenizer)
        with again if self._own is None else nullcontext(self._own) as asked:
            scorer = asked.scorer(self.args, is_packed=self.is_packed, tokenizer=self.tokenizer)
            yield scorer if asked.cache(self.args).key == cache.key else None
