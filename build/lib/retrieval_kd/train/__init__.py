"""Training: batches that depend on the step alone, and one loop over stages."""
