"""What the name of a run belongs to: its settings, the version of the data set that it began with, and its outcome.

runs/NAME/run.json       {"identity", "dataset": "NAME@VERSION", "spec"}
runs/NAME/outcome.json   once it is complete
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyarrow import fs as pafs

from pipelines.config import RunSpec, spec_from_dict
from pipelines.data.manifest import Manifest, load_manifest
from pipelines.errors import FigmentError
from pipelines.objects import exists, read_json, write_json
from pipelines.training.reporter import Outcome


def finished(fs: pafs.FileSystem, name: str, spec: RunSpec) -> Outcome | None:
    """The outcome when the run is complete. It needs neither the data set nor a cluster.

    `FigmentError` when the name belongs to a run of other settings.
    """
    known = _known(fs, name)
    if known is None:
        return None
    differences = [] if _is_of(known, spec) else _differences(known["spec"], spec.to_dict())
    _, pinned, version = spec.data.dataset.partition("@")
    if pinned and not known["dataset"].partition("@")[2].startswith(version):
        differences.append(f"data set version {known['dataset']} -> {spec.data.dataset}")
    if differences:
        raise FigmentError(
            f"run {name!r} exists with other settings ({'; '.join(differences)});"
            " repeat its command to go on with it, or choose another --name"
        )
    path = f"runs/{name}/outcome.json"
    outcome = Outcome(**read_json(fs, path)) if exists(fs, path) else None
    return outcome if outcome is not None and outcome.images_seen >= spec.training.images else None


def data_of(fs: pafs.FileSystem, name: str, spec: RunSpec, say: Callable[[str], None]) -> Manifest:
    """The data set version that the run began with, or the one that it is to begin with."""
    known = _known(fs, name)
    if known is None:
        return load_manifest(fs, spec.data.dataset)
    manifest = load_manifest(fs, known["dataset"])
    newest = load_manifest(fs, manifest.name)
    if newest.version != manifest.version:
        say(
            f"  ! data set {manifest.name!r} has a newer version ({newest.version}); this run goes on with the one that"
            f" it began with ({manifest.version}), a run under another --name begins with the newer one"
        )
    return manifest


def claim(fs: pafs.FileSystem, name: str, spec: RunSpec, manifest: Manifest) -> None:
    """The name belongs to these settings and this version from now on."""
    dataset = f"{manifest.name}@{manifest.version}"
    write_json(fs, f"runs/{name}/run.json", {"identity": spec.identity, "dataset": dataset, "spec": spec.to_dict()})


def _known(fs: pafs.FileSystem, name: str) -> dict[str, Any] | None:
    path = f"runs/{name}/run.json"
    if not exists(fs, path):
        return None
    try:
        known = read_json(fs, path)
        return {key: known[key] for key in ("identity", "dataset", "spec")}
    except (ValueError, KeyError, TypeError) as error:
        raise FigmentError(
            f"{path} cannot be read ({type(error).__name__}: {error}): restore it from a copy, or choose another --name"
        ) from error


def _is_of(known: dict[str, Any], spec: RunSpec) -> bool:
    """Whether the settings are the same; the stored hash may be one that an earlier version of Figment reckoned."""
    try:
        return spec.identity in (known["identity"], spec_from_dict(known["spec"]).identity)
    except (TypeError, KeyError, AttributeError):  # settings that this version does not know
        return False


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            d
            for key in sorted(old.keys() | new.keys())
            for d in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if old == new else [f"{prefix} {old} -> {new}"]
