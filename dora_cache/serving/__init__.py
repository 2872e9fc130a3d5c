"""Many adapters in one batch, under one cap."""
