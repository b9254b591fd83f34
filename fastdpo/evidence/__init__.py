"""What a user can check on their own machine: numbers against fp64 (`verify`) and memory (`memory`)."""
