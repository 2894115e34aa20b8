"""Methods that quantize image classifiers."""
