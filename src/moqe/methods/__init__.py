"""Quantization methods: closed-form functions of a weight and the statistics of its input."""
