"""Commands that make the numbers in docs/results.md."""
