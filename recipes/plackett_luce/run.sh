#!/usr/bin/env bash
# bash recipes/plackett_luce/run.sh [--size small|full] [--output_dir DIR]: see README.md beside this script.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" plackett_luce "$@"
