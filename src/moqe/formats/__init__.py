"""Expert files others can read: compressed-tensors folders and GGUF; and foreign checkpoints, read as they are."""
