"""The manifest of a mixture's folder: what is in it, whether it is whole, and what it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moqe.errors import CheckpointError
from moqe.evaluate.verdict import read_verdict
from moqe.folder import MixtureFolder
from moqe.progress import Progress, Silent
from moqe.recipe import load_recipe
from moqe.store import FileIdentity, digest_files, disk_bytes, read_json, reading

FORMAT_VERSION = 1


def read_manifest(folder: MixtureFolder) -> dict[str, Any]:
    """The manifest of a complete mixture, experts in the recipe's order. Raises CheckpointError when there is none."""
    if not folder.manifest.exists():
        state = "is half-built: run the same `moqe build` again" if folder.recipe.exists() else "holds no mixture"
        raise CheckpointError(f"{folder.path} {state}")
    manifest: dict[str, Any] = read_json(folder.manifest)
    with reading(folder.manifest):
        if manifest["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder.manifest} has format {manifest['format_version']}, and this version of MoQE reads "
                f"{FORMAT_VERSION}: build again"
            )
        _check_manifest(manifest)
    recipe = load_recipe(folder.recipe)
    if recipe.hash != manifest["recipe"]:
        raise CheckpointError(f"{folder.recipe} is not the recipe the mixture was built from: bring it back")
    names = [expert.name for expert in recipe.experts]
    if sorted(names) != sorted(manifest["experts"]):
        raise CheckpointError(f"{folder.manifest} has other experts than {folder.recipe}: build or copy it again")
    # What routers predict is in the order of the recipe; the file is in alphabetical order.
    return manifest | {"experts": {name: manifest["experts"][name] for name in names}}


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless everything that is read of a manifest is there."""
    tables = [manifest["identity"], manifest["shared"], *(entry["files"] for entry in manifest["experts"].values())]
    texts = [manifest["recipe"], manifest["task"], *manifest["protocols"]]
    texts += [text for table in tables for text in table.values()]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"{wrong[0]!r} is not text")
    if not manifest["protocols"] or not manifest["experts"]:
        raise ValueError("it names no protocol or no expert")


def verify_mixture(folder: MixtureFolder, manifest: Mapping[str, Any], progress: Progress | None = None) -> None:
    """Compare shared files and all experts' files with their digests. Raises CheckpointError naming what is damaged."""
    expected = within(folder.shared, manifest["shared"])
    for expert, entry in manifest["experts"].items():
        expected |= within(folder.expert(expert), entry["files"])
    verify_files(expected, progress or Silent())


def within(place: Path, files: Mapping[str, str]) -> dict[Path, str]:
    """Digests by path, for files named inside a folder."""
    return {place / name: digest for name, digest in files.items()}


def verify_files(
    expected: Mapping[Path, str], progress: Progress, known: dict[FileIdentity, str] | None = None
) -> None:
    """Compare files with their digests. Raises CheckpointError naming the first that is missing or damaged.

    known: see `digest_files`.
    """
    for path in expected:
        if not path.exists():
            raise CheckpointError(f"{path} is missing: build again, or copy the folder again")
    found = digest_files(list(expected), "verify files", progress, known)
    for (path, digest), actual in zip(expected.items(), found, strict=True):
        if actual != digest:
            raise CheckpointError(f"{path} is damaged (its digest is not the manifest's): build or copy it again")


@contextmanager
def verifying(
    expected: Mapping[Path, str], progress: Progress, known: dict[FileIdentity, str] | None = None
) -> Iterator[None]:
    """`verify_files` beside the block, which reads the files; damage is told before what it led to."""
    with ThreadPoolExecutor(1) as beside:
        check = beside.submit(verify_files, expected, progress, known)
        try:
            yield
        except Exception:
            check.result()
            raise
        check.result()


def _certificate(path: Path) -> dict[str, Any]:
    with reading(path):
        return dict(read_json(path).items())


def inspect(folder: Path | str, verify: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """What a mixture is made of: recipe, experts with certificates and bytes, protocols, verdict.

    verify: also compare shared files and every expert's with their digests.
    Raises CheckpointError when the folder is half-built, damaged or no mixture.
    """
    place = MixtureFolder(Path(folder))
    manifest = read_manifest(place)
    if verify:
        verify_mixture(place, manifest, progress)
    return {
        "folder": str(place.path),
        "manifest": manifest,
        "recipe": load_recipe(place.recipe).model_dump(mode="json", exclude_defaults=True),
        "certificates": {name: _certificate(place.certificate(name)) for name in manifest["experts"]},
        "bytes": {
            "folder": disk_bytes(place.path),
            "shared": disk_bytes(place.shared),
            "experts": {name: disk_bytes(place.expert(name)) for name in manifest["experts"]},
        },
        "verdict": asdict(read_verdict(place.verdict)) if place.verdict.exists() else None,
        "verified": verify,
    }
