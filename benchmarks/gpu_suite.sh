#!/usr/bin/env bash
# Everything that needs a GPU, in one command: bash benchmarks/gpu_suite.sh OUT [--seconds N]
# Runs from the source tree with this machine's own Python, torch and Triton: no pip install, no network.
set -eu
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_suite.py" "$@"
