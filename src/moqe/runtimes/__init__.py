"""Running an expert: `runtime` is the seam, one file an engine."""
