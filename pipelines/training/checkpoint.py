"""One bundle a checkpoint: a folder in storage that `bundle.json`, written last, makes valid.

    runs/NAME/checkpoints/000000051200-00003/    (images seen, fence of the launch that wrote it)
        networks.safetensors                     weights and buffers, "generator.conv.weight"
        ema.safetensors                          averaged weights, when the run keeps them
        optimizers.pt                            state dicts by name; loaded weights-only
        rank-00000.pt …                          a worker's own random states and buffers; loaded weights-only
        bundle.json                              spec, images seen, data cursor, data-set version, sha256 of every file

No code is stored and none is run at loading. The commit is ours and not Ray Train's checkpoint snapshot, because it
must hold under `kill -9` of worker or driver, for another number of workers, another version of Ray, and a reader
without Ray. Which bundles a run has, and which is gone on from, is `history.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
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
from pipelines.objects import exists, read_json, read_object, write_json, write_object
from pipelines.training.collectives import gather
from pipelines.training.ema import Ema

FORMAT = "figment-bundle-2"
READABLE = ("figment-bundle-1", FORMAT)  # 1 did not list the workers' files: their random states are not restored
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
    files: dict[str, str]  # file name -> sha256

    def needed_by(self, rank: int) -> list[str]:
        """The files that a worker of this rank restores from."""
        own = _rank_file(rank)
        return [name for name in self.files if not name.startswith("rank-") or name == own]


class DamagedError(FigmentError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class TrainingState:
    """The live objects that a bundle is taken from and put back into."""

    learner: Learner
    ema: Ema | None
    generator: Generator


def save_bundle(
    fs: pafs.FileSystem,
    bundle: Bundle,
    state: TrainingState,
    rank: int,
    gather: Callable[[dict[str, str]], list[dict[str, str]]] = gather,
) -> None:
    """Called by every worker. `bundle.files` is filled in here; the bundle is valid when the call returns on rank 0."""
    if rank == 0 and exists(fs, f"{bundle.path}/{BUNDLE}"):  # it was damaged, else the run would have gone on from it
        fs.delete_file(f"{bundle.path}/{BUNDLE}")
    own = {_rank_file(rank): _to_bytes(_rank_state(state))}
    if rank == 0:
        learner = state.learner
        own[NETWORKS] = save_safetensors(network_tensors(learner.networks()))
        own[OPTIMIZERS] = _to_bytes({name: o.state_dict() for name, o in learner.optimizers().items()})
        if state.ema is not None:
            own[EMA] = save_safetensors({k: t.detach().cpu().contiguous() for k, t in state.ema.state.items()})
    # The hashes arrive when every worker's files are there; only then the bundle may become valid.
    hashes = gather({name: _write(fs, f"{bundle.path}/{name}", data) for name, data in own.items()})
    files = {name: sha256 for written in hashes for name, sha256 in written.items()}
    if rank == 0:
        body = {
            "format": FORMAT,
            "spec": bundle.spec.to_dict(),
            "identity": bundle.spec.identity,
            "images_seen": bundle.images_seen,
            "step": bundle.step,
            "cursor": bundle.cursor.to_dict(),
            "dataset": bundle.dataset,
            "image_shape": list(bundle.image_shape),
            "files": files,
        }
        write_json(fs, f"{bundle.path}/{BUNDLE}", {**body, "sha256": _body_hash(body)})


def load_bundle(fs: pafs.FileSystem, path: str) -> Bundle:
    """`path` is a bundle's folder. `DamagedError` when its `bundle.json` cannot be read for what it says."""
    where = f"{path}/{BUNDLE}"
    if not exists(fs, where):
        raise FigmentError(f"{path} has no {BUNDLE}: it is not a complete checkpoint; choose another under its run")
    try:
        body = read_json(fs, where)
        if not re.fullmatch(r"figment-bundle-\d+", body["format"]):
            raise ValueError(f"its format is {body['format']!r}")
        known = body["format"] in READABLE
        if body["format"] == FORMAT and body.pop("sha256") != _body_hash(body):
            raise ValueError("it does not have the sha256 that it names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{where} cannot be read ({type(error).__name__}: {error})") from error
    if not known:
        raise FigmentError(
            f"{where} has format {body['format']!r}, this version of Figment reads {' and '.join(READABLE)}:"
            " use the version that wrote it"
        )
    try:
        return Bundle(
            path=path,
            spec=spec_from_dict(body["spec"]),
            images_seen=int(body["images_seen"]),
            step=int(body["step"]),
            cursor=Cursor.from_dict(body["cursor"]),
            dataset=body["dataset"],
            image_shape=tuple(body["image_shape"]),
            files=dict(body["files"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, FigmentError) as error:
        raise DamagedError(f"{where} does not say what a checkpoint says ({type(error).__name__}: {error})") from error


def read_payloads(fs: pafs.FileSystem, bundle: Bundle, names: list[str]) -> dict[str, bytes]:
    """File name -> its bytes, each found to have the sha256 that the bundle names; `DamagedError` else."""
    payloads = {}
    for name in names:
        path = f"{bundle.path}/{name}"
        try:
            payloads[name] = read_object(fs, path)
        except FileNotFoundError as error:
            raise DamagedError(f"{path} is missing") from error
        if hashlib.sha256(payloads[name]).hexdigest() != bundle.files[name]:
            raise DamagedError(f"{path} ({len(payloads[name]):,} bytes) does not have the sha256 that {BUNDLE} names")
    return payloads


def restore(bundle: Bundle, payloads: Mapping[str, bytes], state: TrainingState, rank: int) -> str | None:
    """Put a bundle into live objects, bit for bit. Else the reason why the random states of this rank could not be
    restored, and are as they were; everything else then is restored all the same."""
    set_network_tensors(state.learner.networks(), load_safetensors(payloads[NETWORKS]))
    optimizers = _from_bytes(payloads[OPTIMIZERS])
    for name, optimizer in state.learner.optimizers().items():
        optimizer.load_state_dict(optimizers[name])
    if state.ema is not None:
        averages = load_safetensors(payloads[EMA])
        for name, tensor in state.ema.state.items():
            tensor.copy_(averages[name])
    own = payloads.get(_rank_file(rank))
    if own is None:
        return f"the checkpoint holds no random states of worker {rank}"
    body = _from_bytes(own)
    for net, module in state.learner.networks().items():
        for name, buffer in module.named_buffers():
            buffer.copy_(body["buffers"][f"{net}.{name}"])
    torch.set_rng_state(body["torch"])
    if "cuda" in body and torch.cuda.is_available():
        torch.cuda.set_rng_state(body["cuda"])
    if body["generator"].shape != state.generator.get_state().shape:  # the kinds of device have other generators
        return f"the checkpoint's random states are of another kind of device than {state.generator.device.type!r}"
    state.generator.set_state(body["generator"])
    return None


def load_networks(fs: pafs.FileSystem, bundle: Bundle, networks: Mapping[str, nn.Module], *, averaged: bool) -> None:
    """Weights only, for sampling; `averaged` takes the moving average when the bundle has one."""
    name = EMA if averaged and EMA in bundle.files else NETWORKS
    try:
        payload = read_payloads(fs, bundle, [name])[name]
    except DamagedError as error:
        raise FigmentError(f"{error}: choose another checkpoint of its run") from error
    set_network_tensors(networks, load_safetensors(payload))


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


def refuse_shared_tensors(networks: Mapping[str, nn.Module]) -> None:
    """`FigmentError` when one tensor has two names: averaged weights would be swapped twice, and stored twice."""
    names: dict[int, str] = {}
    for net, module in networks.items():
        for name, tensor in module.state_dict().items():
            if tensor.numel() and (other := names.setdefault(tensor.data_ptr(), f"{net}.{name}")) != f"{net}.{name}":
                raise FigmentError(
                    f"{net}.{name} and {other} are one tensor under two names: networks must share none; let one of"
                    " them look the other up instead"
                )


def _body_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


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


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
