"""One bundle a checkpoint: a folder in storage that `bundle.json`, written last, makes valid.

    runs/NAME/checkpoints/000000051200/      (images seen)
        networks.safetensors                 weights and buffers, "generator.conv.weight"
        ema.safetensors                      averaged weights, when the run keeps them
        optimizers.pt                        state dicts by name; loaded weights-only
        rank-00000.pt …                      a worker's own random states and buffers; loaded weights-only
        bundle.json                          spec, images seen, data cursor, data-set version, file hashes

No code is stored and none is run at loading. The commit is ours and not Ray Train's checkpoint snapshot, because it
must hold under `kill -9` of worker or driver, for another number of workers, another version of Ray, and a reader
without Ray.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyarrow import fs as pafs
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Generator, Tensor, nn

from models.contract import Learner
from pipelines.config import RunSpec, spec_from_dict
from pipelines.data.plan import Cursor
from pipelines.errors import FigmentError
from pipelines.objects import children, exists, read_json, read_object, write_json, write_object
from pipelines.training.ema import Ema

FORMAT = "figment-bundle-1"
NETWORKS, EMA, OPTIMIZERS, BUNDLE = "networks.safetensors", "ema.safetensors", "optimizers.pt", "bundle.json"


@dataclass(frozen=True)
class Bundle:
    """What `bundle.json` says; the tensors stay in storage until asked for."""

    path: str
    spec: RunSpec
    images_seen: int
    step: int
    cursor: Cursor
    dataset: str  # NAME@VERSION
    image_shape: tuple[int, int, int]
    files: dict[str, str]  # file name -> sha256; rank files are not listed


@dataclass(frozen=True)
class TrainingState:
    """The live objects that a bundle is taken from and put back into."""

    learner: Learner
    ema: Ema | None
    generator: Generator


def save_bundle(
    fs: pafs.FileSystem, bundle: Bundle, state: TrainingState, rank: int, barrier: Callable[[], None]
) -> None:
    """Called by every worker. `bundle.files` is filled in here; the bundle is valid when the call returns on rank 0."""
    _write(fs, f"{bundle.path}/{_rank_file(rank)}", _to_bytes(_rank_state(state)))
    hashes = {}
    if rank == 0:
        learner = state.learner
        payloads = {
            NETWORKS: save_safetensors(network_tensors(learner.networks())),
            OPTIMIZERS: _to_bytes({name: o.state_dict() for name, o in learner.optimizers().items()}),
        }
        if state.ema is not None:
            payloads[EMA] = save_safetensors({k: t.detach().cpu().contiguous() for k, t in state.ema.state.items()})
        hashes = {name: _write(fs, f"{bundle.path}/{name}", data) for name, data in payloads.items()}
    barrier()  # every rank's file is there before the bundle becomes valid
    if rank == 0:
        write_json(
            fs,
            f"{bundle.path}/{BUNDLE}",
            {
                "format": FORMAT,
                "spec": bundle.spec.to_dict(),
                "identity": bundle.spec.identity,
                "images_seen": bundle.images_seen,
                "step": bundle.step,
                "cursor": bundle.cursor.to_dict(),
                "dataset": bundle.dataset,
                "image_shape": list(bundle.image_shape),
                "files": hashes,
            },
        )


def load_bundle(fs: pafs.FileSystem, path: str) -> Bundle:
    """`path` is a bundle's folder."""
    if not exists(fs, f"{path}/{BUNDLE}"):
        raise FigmentError(f"{path} has no {BUNDLE}: it is not a complete checkpoint; choose another under its run")
    body = read_json(fs, f"{path}/{BUNDLE}")
    if body.get("format") != FORMAT:
        raise FigmentError(
            f"{path}/{BUNDLE} has format {body.get('format')!r}; this version of Figment reads {FORMAT!r}"
        )
    return Bundle(
        path=path,
        spec=spec_from_dict(body["spec"]),
        images_seen=body["images_seen"],
        step=body["step"],
        cursor=Cursor.from_dict(body["cursor"]),
        dataset=body["dataset"],
        image_shape=tuple(body["image_shape"]),
        files=body["files"],
    )


def newest_bundle(fs: pafs.FileSystem, run_folder: str) -> Bundle | None:
    """The valid bundle with the most images seen, or None."""
    root = f"{run_folder}/checkpoints"
    for name in reversed(children(fs, root)):
        if exists(fs, f"{root}/{name}/{BUNDLE}"):
            return load_bundle(fs, f"{root}/{name}")
    return None


def bundle_path(run_folder: str, images_seen: int) -> str:
    return f"{run_folder}/checkpoints/{images_seen:012d}"


def restore(fs: pafs.FileSystem, bundle: Bundle, state: TrainingState, rank: int) -> bool:
    """Put a bundle into live objects, bit for bit. False when this rank had no file of its own (more workers than
    before): its random states are then as freshly seeded."""
    load_networks(fs, bundle, state.learner.networks(), averaged=False)
    optimizers = _from_bytes(_read(fs, bundle, OPTIMIZERS))
    for name, optimizer in state.learner.optimizers().items():
        optimizer.load_state_dict(optimizers[name])
    if state.ema is not None:
        averages = load_safetensors(_read(fs, bundle, EMA))
        for name, tensor in state.ema.state.items():
            tensor.copy_(averages[name])
    own = f"{bundle.path}/{_rank_file(rank)}"
    if rank >= bundle.cursor.world_size or not exists(fs, own):
        return False
    body = _from_bytes(read_object(fs, own))
    state.generator.set_state(body["generator"])
    torch.set_rng_state(body["torch"])
    if "cuda" in body and torch.cuda.is_available():
        torch.cuda.set_rng_state(body["cuda"])
    for net, module in state.learner.networks().items():
        for name, buffer in module.named_buffers():
            buffer.copy_(body["buffers"][f"{net}.{name}"])
    return True


def load_networks(fs: pafs.FileSystem, bundle: Bundle, networks: Mapping[str, nn.Module], *, averaged: bool) -> None:
    """Weights only, for sampling; `averaged` takes the moving average when the bundle has one."""
    name = EMA if averaged and EMA in bundle.files else NETWORKS
    set_network_tensors(networks, load_safetensors(_read(fs, bundle, name)))


def prune_bundles(fs: pafs.FileSystem, run_folder: str, keep: int) -> None:
    """Delete all but the `keep` newest valid bundles, and half-written ones older than the newest valid one.
    A bundle loses `bundle.json` first, so that it is never valid and incomplete."""
    root = f"{run_folder}/checkpoints"
    names = children(fs, root)
    valid = [name for name in names if exists(fs, f"{root}/{name}/{BUNDLE}")]
    for name in names:
        if valid and name < valid[-1] and name not in valid[-keep:]:
            if name in valid:
                fs.delete_file(f"{root}/{name}/{BUNDLE}")
            fs.delete_dir(f"{root}/{name}")


def network_tensors(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """ "NETWORK.TENSOR" -> tensor on the CPU."""
    return {
        f"{net}.{name}": tensor.detach().cpu().contiguous()
        for net, module in networks.items()
        for name, tensor in module.state_dict().items()
    }


def set_network_tensors(networks: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `network_tensors`; every network must find exactly its own tensors."""
    for net, module in networks.items():
        own = {name.removeprefix(f"{net}."): t for name, t in tensors.items() if name.startswith(f"{net}.")}
        module.load_state_dict(own)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _rank_state(state: TrainingState) -> dict[str, Any]:
    own: dict[str, Any] = {
        "generator": state.generator.get_state(),
        "torch": torch.get_rng_state(),
        "buffers": {
            f"{net}.{name}": buffer.detach().cpu()
            for net, module in state.learner.networks().items()
            for name, buffer in module.named_buffers()
        },
    }
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    return own


def _write(fs: pafs.FileSystem, path: str, data: bytes) -> str:
    write_object(fs, path, data)
    return hashlib.sha256(data).hexdigest()


def _read(fs: pafs.FileSystem, bundle: Bundle, name: str) -> bytes:
    data = read_object(fs, f"{bundle.path}/{name}")
    if hashlib.sha256(data).hexdigest() != bundle.files[name]:
        raise FigmentError(
            f"{bundle.path}/{name} does not have the sha256 that {BUNDLE} names: the checkpoint is damaged;"
            " delete its folder and the run goes on from the one before"
        )
    return data


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
