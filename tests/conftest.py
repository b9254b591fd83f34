"""Settings of every test: offline, one thread, a cache of datasets that nothing outlives, and without a GPU the Triton
kernels in Triton's interpreter.
"""

import gc
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fastdpo-tests-")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when the kernels are imported


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_cache_outlives_the_tests():
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_not_searched_for_garbage():
    """accelerate collects garbage at every start of training: a second each time, among a million imported objects."""
    gc.collect()
    gc.freeze()
