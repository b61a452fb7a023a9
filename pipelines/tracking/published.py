"""Models on the tracking server: packed without it, published to it, fetched from it."""

from __future__ import annotations

import copy
import io
import re
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.errors import FigmentError
from pipelines.tracking.client import MlflowException, Tracking, is_refusal, reason_of, unreachable

# isort: split
import mlflow
import mlflow.artifacts
import mlflow.pytorch
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

CHALLENGER = "challenger"  # alias of the newest published version; `champion` is given by evaluation alone
_FILES = "figment"  # folder of a published model that holds our own files, beside MLflow's
_MODEL_KEY = "figment.model_key"


def pack_model(module: nn.Module, example: Tensor, files: Mapping[str, bytes]) -> bytes:
    """An MLflow model folder as a tar: all of publishing that needs no server."""
    z = example.detach().cpu()
    z = torch.cat([z, z]) if len(z) == 1 else z  # torch.export takes a batch of one for a constant
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        root = Path(folder, "model")
        try:
            module = copy.deepcopy(module).cpu().eval()  # the learner goes on with its own
            # No names: with them MLflow would hand the model a dictionary, which its PyTorch flavour refuses.
            inputs, outputs = (
                Schema([TensorSpec(np.dtype(t.numpy().dtype), (-1, *t.shape[1:]))]) for t in (z, module(z))
            )
            mlflow.pytorch.save_model(
                module,
                path=str(root),
                input_example=z.numpy(),
                signature=ModelSignature(inputs=inputs, outputs=outputs),
                serialization_format="pt2",
                pip_requirements=[f"mlflow=={mlflow.__version__}", f"torch=={torch.__version__.partition('+')[0]}"],
            )
            torch.export.load(root / "data" / "model.pt2").module()(torch.cat([z, z[:1]]))
        except Exception as error:
            name = type(module).__name__
            raise FigmentError(f"{name} cannot be exported for any batch size: {reason_of(error)}") from error
        for path, data in files.items():
            (root / _FILES).mkdir(exist_ok=True)
            (root / _FILES / path).write_bytes(data)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(root, arcname=".")
        return packed.getvalue()


def publish_model(
    client: Any,
    packed: bytes,
    *,
    experiment: str,
    run_id: str,
    name: str,
    key: str,
    step: int,
    registered_name: str | None,
) -> str:
    """Publish what `pack_model` packed; returns its `models:/…`. Done again with the same `key` it changes nothing."""
    made = client.search_logged_models([experiment], f"tags.`{_MODEL_KEY}` = '{key}'")
    model = made[0] if made else client.create_logged_model(experiment, name, run_id, {_MODEL_KEY: key})
    if str(model.status) != "READY":
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
                tar.extractall(folder, filter="data")
            description = Model.load(folder)
            description.artifact_path, description.run_id = model.artifact_location, run_id
            description.model_id = description.model_uuid = model.model_id
            description.save(str(Path(folder, "MLmodel")))
            client.log_model_artifacts(model.model_id, folder)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
        client.finalize_logged_model(model.model_id, "READY")
    if registered_name is None:
        return f"models:/{model.model_id}"
    return _register(client, registered_name, model.model_id, run_id)


def _register(client: Any, name: str, model_id: str, run_id: str) -> str:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model_id}"
    made = [v for v in client.search_model_versions(f"name = '{name}'") if v.source == source]
    version = made[0] if made else client.create_model_version(name, source, run_id, model_id=model_id)
    client.set_registered_model_alias(name, CHALLENGER, version.version)
    return f"models:/{name}/{version.version}"


def fetch_published(tracking: Tracking, model: str) -> dict[str, bytes]:
    """The files that were published with a model: `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a run id.

    Names -> contents, e.g. networks.safetensors and spec.json. Raises `FigmentError` when there is no such model, it
    has no such files, or the server does not answer.
    """
    client = tracking.client()
    try:
        model_id = _model_id(client, model)
        with tempfile.TemporaryDirectory() as folder:
            place = f"{client.get_logged_model(model_id).artifact_location}/{_FILES}"
            path = mlflow.artifacts.download_artifacts(place, dst_path=folder, tracking_uri=tracking.uri)
            return {file.name: file.read_bytes() for file in sorted(Path(path).iterdir())}
    except FigmentError:
        raise
    except Exception as error:
        if not is_refusal(error):
            raise FigmentError(f"{unreachable(tracking, error)}; check the URI and that the server runs") from error
        raise FigmentError(f"{model} at {tracking.uri} cannot be fetched: {reason_of(error)}") from error


def _model_id(client: Any, model: str) -> str:
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model)
    if match is None and re.fullmatch(r"[0-9a-f]{32}", model) is None:
        raise FigmentError(f"{model!r} names no model: use models:/NAME@ALIAS, models:/NAME/VERSION or a run id")
    if match is None:
        return _model_of_run(client, model)
    name, alias, number = match.groups()
    try:
        registered = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = ", ".join(sorted(m.name for m in client.search_registered_models())) or "none"
        raise FigmentError(f"there is no registered model {name!r} (found: {known})") from error
    if alias is not None:
        number = registered.aliases.get(alias)
        if number is None:
            known = ", ".join(sorted(registered.aliases)) or "none"
            raise FigmentError(f"the model {name!r} has no alias {alias!r} (found: {known})")
    versions = {v.version: v for v in client.search_model_versions(f"name = '{name}'")}
    version = versions.get(int(number), versions.get(str(number)))
    if version is None:
        known = ", ".join(sorted(map(str, versions), key=int)) or "none"
        raise FigmentError(f"the model {name!r} has no version {number} (found: {known})")
    return version.source.removeprefix("models:/")


def _model_of_run(client: Any, run_id: str) -> str:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise FigmentError(f"there is no run {run_id}") from error
    newest_first = [{"field_name": "creation_timestamp", "ascending": False}]
    of_run = f"source_run_id = '{run_id}'"
    found = client.search_logged_models([run.info.experiment_id], of_run, max_results=1, order_by=newest_first)
    if not found:
        raise FigmentError(f"the run {run_id} ({run.info.run_name}) has published no model")
    return found[0].model_id
