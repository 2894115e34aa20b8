"""How to walk a model: its blocks one at a time, and what in a block belongs together."""
