"""What a base model is: a digest of its config and weights, so that a changed model is noticed."""

from __future__ import annotations

from pathlib import Path

from moqe.progress import Progress, Silent
from moqe.store import canonical_hash, digest_files


def model_digest(folder: Path, progress: Progress | None = None) -> str:
    """16 hexadecimal digits over the content of config.json and all safetensors files of a model's folder.

    Cost: one read of the weights, about a second per gigabyte.
    """
    files = [path for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))) if path.exists()]
    digests = digest_files(files, "digest the base model", progress or Silent())
    return canonical_hash({path.name: digest for path, digest in zip(files, digests, strict=True)})
