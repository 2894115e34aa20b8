"""What a base model is: a digest of its config and weights, so that a changed model is noticed."""

from __future__ import annotations

from pathlib import Path

from moqe.store import canonical_hash, digest_file


def model_digest(folder: Path) -> str:
    """16 hexadecimal digits over the content of config.json and all safetensors files of a model's folder.

    Cost: one read of the weights, about a second per gigabyte.
    """
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return canonical_hash({path.name: digest_file(path) for path in files if path.exists()})
