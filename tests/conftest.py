"""Settings of every test: offline, one thread, and without a GPU the Triton kernels in Triton's interpreter."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when the kernels are imported


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
