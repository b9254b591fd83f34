"""What a run is asked to do: the configs, their checks, and the names that other trainers use for their fields."""
