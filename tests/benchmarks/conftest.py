"""The benchmarks are scripts beside each other, not a package: put their folder on the path, as running one does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
