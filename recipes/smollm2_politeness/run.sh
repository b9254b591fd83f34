#!/usr/bin/env bash
# A model of this size gains from a second thread.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sh" smollm2_politeness "$@"
