"""Settings of every test: offline, one thread, caches of its own that nothing outlives, and without a GPU the Triton
kernels in Triton's interpreter. portable.py asks for other threads and other sums by FASTDPO_TEST_THREADS and
FASTDPO_TEST_SUMS.
"""

import gc
import os
import shutil
import sys
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
if os.environ.get("FASTDPO_TEST_SUMS") == "other":
    import other_sums  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _as_many_threads_as_asked_for():
    torch.set_num_threads(int(os.environ.get("FASTDPO_TEST_THREADS", "1")))


@pytest.fixture(scope="session", autouse=True)
def _no_cache_outlives_the_tests():
    folder = os.environ["XDG_CACHE_HOME"]
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _transformers_warns_as_it_does_at_first():
    """Benchmarks silence it for their process; without warnings a run has no progress bars."""
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_warning()


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_not_searched_for_garbage():
    """accelerate collects garbage at every start of training: a second each time, among a million imported objects."""
    gc.collect()
    gc.freeze()
