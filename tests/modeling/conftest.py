"""On a GPU machine without datasets (benchmarks/gpu_suite.py) the modules that import a trainer are left out."""

import importlib.util

NEED_DATASETS = ["test_every_combination.py", "test_generation.py"]

collect_ignore = [] if importlib.util.find_spec("datasets") else NEED_DATASETS
