#!/usr/bin/env bash
# bash recipes/iterated_rounds/run.sh [--size small|full] [--output_dir DIR]: see README.md beside this script.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" iterated_rounds "$@"
