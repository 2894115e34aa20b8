"""Mixture of Quantization Experts."""
