"""The experiments of the DPO paper, and others, as short scripts on fastdpo's public API; README.md lists them.

The folder is not installed with the package. Run a recipe with its `run.sh` from a checkout.
"""
