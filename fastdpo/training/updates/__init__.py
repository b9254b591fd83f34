"""How an optimizer changes weights: one at a time, rounded to bf16 without loss on average, or inside backward."""
