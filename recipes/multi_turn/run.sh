#!/usr/bin/env bash
# bash recipes/multi_turn/run.sh --data DIR [--size small|full] [--output_dir DIR]: see README.md beside this script.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" multi_turn "$@"
