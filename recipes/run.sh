#!/usr/bin/env bash
# bash recipes/run.sh RECIPE [options]: runs recipes/RECIPE/run.py. Each recipe's own run.sh calls this script.
# PYTHON chooses the interpreter. The models are so small that a second thread slows them down if other programs use the
# same cores, so the default is one thread; OMP_NUM_THREADS changes it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
name="${1:?usage: bash recipes/run.sh RECIPE [options]}"
shift
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python}" -m "recipes.$name.run" "$@"
