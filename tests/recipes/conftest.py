"""The recipes are a package in the root of the checkout, which is not installed: put the root on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
