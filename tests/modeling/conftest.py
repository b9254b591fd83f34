"""On a GPU machine without datasets (benchmarks/gpu_suite.py) the modules that train are left out."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("datasets") else ["test_every_combination.py"]
