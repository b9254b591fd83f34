"""Settings of every test: offline, one thread, caches of its own that nothing outlives, and without a GPU the Triton
kernels in Triton's interpreter.
"""

import gc
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# of this process alone: log-probs of references, unless a test names a folder, and datasets
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fastdpo-tests-")
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["XDG_CACHE_HOME"], "datasets")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when the kernels are imported


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_cache_outlives_the_tests():
    folder = os.environ["XDG_CACHE_HOME"]
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_not_searched_for_garbage():
    """accelerate collects garbage at every start of training: a second each time, among a million imported objects."""
    gc.collect()
    gc.freeze()
