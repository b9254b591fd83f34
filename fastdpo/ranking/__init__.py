"""Rankings of models: Bradley-Terry strengths of comparisons, and models compared by the responses that they prefer."""
