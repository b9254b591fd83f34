"""These tests share the head op's cases and its setting for the interpreter with tests/ops."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
