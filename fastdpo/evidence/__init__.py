"""Checks that users can run on their own machine: numbers against fp64 (`verify`) and memory (`memory`)."""
