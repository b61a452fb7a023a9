"""The bundle: what goes in comes out to the bit, damage is named, and half a bundle does not exist."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import fs as pafs
from torch import Generator, nn

import models
from models.contract import Batch, Metrics
from pipelines.data.plan import Cursor
from pipelines.errors import FigmentError
from pipelines.objects import exists, read_json, read_object, write_json, write_object
from pipelines.training.checkpoint import (
    Bundle,
    TrainingState,
    load_bundle,
    load_networks,
    network_tensors,
    refuse_shared_tensors,
    restore,
    save_bundle,
)
from pipelines.training.ema import Ema
from pipelines.training.history import bundle_path, newest_bundle
from tests.models.cases import CASES
from tests.pipelines.training.toys import toy_spec

RUN = "runs/test"


def _state(model: str, seed: int) -> TrainingState:
    torch.manual_seed(seed)
    learner = models.build(CASES[model].config, CASES[model].shape)
    return TrainingState(learner, Ema(learner.networks(), 50), Generator().manual_seed(seed))


def _train(state: TrainingState, steps: int, model: str = "vae") -> None:
    shape = CASES[model].shape
    for i in range(steps):
        size = (6, shape.channels, shape.height, shape.width)
        images = torch.randint(0, 256, size, generator=state.generator, dtype=torch.uint8)
        state.learner.step(Batch(images, torch.zeros(6, dtype=torch.long), 6 * i), state.generator)
        assert state.ema is not None
        state.ema.update(6, 6 * (i + 1))


def _path(images_seen: int, fence: int = 0) -> str:
    return bundle_path(RUN, images_seen, fence)


def _bundle(model: str, images_seen: int, fence: int = 0) -> Bundle:
    cursor = Cursor.start(1).advance(images_seen)
    return Bundle(_path(images_seen, fence), toy_spec(model), images_seen, 5, cursor, "toy@1", (1, 8, 8), {})


def _save(fs: pafs.FileSystem, bundle: Bundle, state: TrainingState) -> Bundle:
    save_bundle(fs, bundle, state, rank=0)
    return load_bundle(fs, bundle.path)


def _restore(fs: pafs.FileSystem, state: TrainingState, rank: int = 0) -> str | None:
    found, damaged = newest_bundle(fs, RUN, rank)
    assert found is not None and not damaged
    return restore(found.bundle, found.payloads, state, rank)


@pytest.mark.parametrize("model", CASES)
def test_everything_that_training_needs_comes_back_to_the_bit(model: str, store: pafs.FileSystem) -> None:
    ahead = _state(model, 1)
    _train(ahead, 4, model)
    bundle = _save(store, _bundle(model, 24), ahead)
    again = _state(model, 2)
    assert _restore(store, again) is None
    _train(ahead, 3, model)
    _train(again, 3, model)
    for a, b in zip(ahead.learner.networks().values(), again.learner.networks().values(), strict=True):
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name]), name
    assert ahead.ema is not None and again.ema is not None
    assert all(torch.equal(t, again.ema.state[name]) for name, t in ahead.ema.state.items())
    assert torch.equal(ahead.generator.get_state(), again.generator.get_state())
    assert (bundle.spec, bundle.cursor) == (toy_spec(model), Cursor.start(1).advance(24))


class Noisy:
    """A network whose buffers differ by worker, and a step that draws from torch's global state."""

    def __init__(self, mean: float) -> None:
        self.norm = nn.BatchNorm1d(2)
        nn.init.constant_(self.norm.running_mean, mean)  # type: ignore[arg-type]
        self.sgd = torch.optim.SGD(self.norm.parameters(), lr=0.1)

    def networks(self) -> dict[str, nn.Module]:
        return {"norm": self.norm}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"sgd": self.sgd}

    def step(self, batch: Batch, generator: Generator) -> Metrics:
        return {"noise": torch.rand(())}

    def sample(self, n: int, generator: Generator) -> torch.Tensor:
        return torch.zeros(n, 1, 8, 8, dtype=torch.uint8)


def test_each_worker_gets_back_its_own_buffers_and_torchs_global_random_state(store: pafs.FileSystem) -> None:
    states = [TrainingState(Noisy(mean), None, Generator().manual_seed(rank)) for rank, mean in enumerate((1.5, 2.5))]
    written: list[dict[str, str]] = []
    expected = []
    for rank in (1, 0):  # the first worker last: it needs what the others wrote

        def gather(own: dict[str, str]) -> list[dict[str, str]]:
            written.append(own)
            assert len(own) == (3 if len(written) == 2 else 1), "weights and optimisers are the first worker's to write"
            return written

        torch.manual_seed(100 + rank)
        torch.rand(7)
        save_bundle(store, _bundle("vae", 24), states[rank], rank, gather)
        expected.append(states[rank].learner.step(None, None)["noise"])  # type: ignore[arg-type]
        assert exists(store, f"{_path(24)}/bundle.json") == (rank == 0), "the first worker alone makes it valid"
    for rank, mean, noise in ((1, 2.5, expected[0]), (0, 1.5, expected[1])):
        torch.manual_seed(5)
        again = TrainingState(Noisy(0.0), None, Generator())
        assert _restore(store, again, rank) is None
        assert torch.equal(again.learner.networks()["norm"].running_mean, torch.full((2,), mean))  # type: ignore[arg-type]
        assert torch.equal(again.learner.step(None, None)["noise"], noise)  # type: ignore[arg-type]
        assert torch.equal(again.generator.get_state(), states[rank].generator.get_state())


def test_a_bundle_without_its_last_file_does_not_exist(store: pafs.FileSystem) -> None:
    state = _state("vae", 1)
    _save(store, _bundle("vae", 24), state)
    _save(store, _bundle("vae", 48), state)
    store.delete_file(f"{_path(48)}/bundle.json")  # as after a kill in mid-write
    newest, damaged = newest_bundle(store, RUN)
    assert newest is not None and newest.bundle.images_seen == 24 and not damaged
    with pytest.raises(FigmentError, match="not a complete checkpoint"):
        load_bundle(store, _path(48))


def test_a_bundle_is_not_valid_before_every_worker_has_written_its_file(store: pafs.FileSystem) -> None:
    def gather(own: dict[str, str]) -> list[dict[str, str]]:
        with pytest.raises(FigmentError, match="not a complete checkpoint"):
            load_bundle(store, _path(24))
        return [own, {"rank-00001.pt": "0" * 64}]

    for _ in ("first", "again, over one that was damaged"):
        save_bundle(store, _bundle("vae", 24), _state("vae", 1), 0, gather)
    assert load_bundle(store, _path(24)).files.keys() == {
        *("networks.safetensors", "ema.safetensors", "optimizers.pt", "rank-00000.pt", "rank-00001.pt")
    }


def _cut(fs: pafs.FileSystem, path: str) -> None:
    write_object(fs, path, read_object(fs, path)[:100])


def _flip(fs: pafs.FileSystem, path: str) -> None:
    data = bytearray(read_object(fs, path))
    data[len(data) // 2] ^= 1
    write_object(fs, path, bytes(data))


def _swap(fs: pafs.FileSystem, path: str) -> None:
    """The file of the same name of another checkpoint: whole, and foreign."""
    write_object(fs, path, read_object(fs, path.replace(_path(48), _path(24))))


DAMAGES: dict[str, tuple[str, Callable[[pafs.FileSystem, str], None]]] = {
    "no rank file": ("rank-00000.pt", lambda fs, path: fs.delete_file(path)),
    "foreign rank file": ("rank-00000.pt", _swap),
    "flipped rank file": ("rank-00000.pt", _flip),
    "no payload": ("networks.safetensors", lambda fs, path: fs.delete_file(path)),
    "flipped payload": ("networks.safetensors", _flip),
    "foreign average": ("ema.safetensors", _swap),
    "flipped optimisers": ("optimizers.pt", _flip),
    "empty bundle.json": ("bundle.json", lambda fs, path: write_object(fs, path, b"")),
    "cut bundle.json": ("bundle.json", _cut),
    "a list for a bundle.json": ("bundle.json", lambda fs, path: write_object(fs, path, b"[]")),
    "no cursor": ("bundle.json", lambda fs, path: write_json(fs, path, {**read_json(fs, path), "cursor": {}})),
    "fewer files": ("bundle.json", lambda fs, path: write_json(fs, path, {**read_json(fs, path), "files": {}})),
    "other clock": ("bundle.json", lambda fs, path: write_json(fs, path, {**read_json(fs, path), "images_seen": 9})),
    "other format": ("bundle.json", lambda fs, path: write_json(fs, path, {**read_json(fs, path), "format": ["x"]})),
    "deep json": ("bundle.json", lambda fs, path: write_object(fs, path, b"[" * 10**5)),
    "no spec": ("bundle.json", lambda fs, path: write_json(fs, path, {**read_json(fs, path), "spec": None})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_named_and_the_newest_whole_one_is_taken(damage: str, store: pafs.FileSystem) -> None:
    name, do = DAMAGES[damage]
    state = _state("vae", 1)
    for images in (24, 48):
        _train(state, 1)
        _save(store, _bundle("vae", images), state)
    do(store, f"{_path(48)}/{name}")
    found, damaged = newest_bundle(store, RUN)
    assert found is not None and found.bundle.images_seen == 24
    (sentence,) = damaged
    assert _path(48) in sentence and name in sentence

    do(store, f"{_path(24)}/{name}") if do is not _swap else _flip(store, f"{_path(24)}/{name}")
    with pytest.raises(FigmentError, match=rf"no checkpoint of {RUN} is whole .*{_path(48)}.*{_path(24)}.*delete"):
        newest_bundle(store, RUN)


def test_a_bundle_of_a_later_version_is_refused_and_not_passed_over(store: pafs.FileSystem) -> None:
    _save(store, _bundle("vae", 24), _state("vae", 1))
    _save(store, _bundle("vae", 48), _state("vae", 1))
    path = f"{_path(48)}/bundle.json"
    write_json(store, path, {**read_json(store, path), "format": "figment-bundle-9"})
    with pytest.raises(FigmentError, match=r"figment-bundle-9.*use the version that wrote it"):
        newest_bundle(store, RUN)


def test_a_bundle_of_the_first_version_still_gives_its_weights(store: pafs.FileSystem) -> None:
    saved = _state("vae", 1)
    _save(store, _bundle("vae", 24), saved)
    body = read_json(store, f"{_path(24)}/bundle.json")
    del body["files"]["rank-00000.pt"]
    write_json(store, f"{_path(24)}/bundle.json", {**body, "format": "figment-bundle-1"})
    store.move(_path(24), f"{RUN}/checkpoints/{24:012d}")  # names had no fence
    _save(store, _bundle("vae", 12, fence=1), saved)
    newest, _ = newest_bundle(store, RUN)
    assert newest is not None and newest.bundle.path == _path(12, 1), "any launch that owned the run is later"
    store.delete_dir(_path(12, 1))
    again = _state("vae", 2)
    reason = _restore(store, again)
    assert reason is not None and "no random states of worker 0" in reason
    _same_weights(saved, again)


def _same_weights(a: TrainingState, b: TrainingState) -> None:
    for x, y in zip(a.learner.networks().values(), b.learner.networks().values(), strict=True):
        assert all(torch.equal(tensor, y.state_dict()[name]) for name, tensor in x.state_dict().items())


def test_code_in_a_state_file_is_not_run(store: pafs.FileSystem, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path, "ran"),))  # type: ignore[return-value]

    _save(store, _bundle("vae", 24), _state("vae", 1))
    found, _ = newest_bundle(store, RUN)
    assert found is not None
    buffer = io.BytesIO()
    torch.save({"generator": Attack()}, buffer)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        restore(found.bundle, {**found.payloads, "rank-00000.pt": buffer.getvalue()}, _state("vae", 2), rank=0)
    assert not (tmp_path / "ran").exists()


def test_a_worker_beyond_the_saved_ones_gets_weights_but_keeps_its_own_randomness(store: pafs.FileSystem) -> None:
    saved = _state("dcgan", 1)
    _save(store, _bundle("dcgan", 24), saved)
    other = _state("dcgan", 2)
    randomness = other.generator.get_state()
    reason = _restore(store, other, rank=1)
    assert reason is not None and "worker 1" in reason
    assert torch.equal(other.generator.get_state(), randomness)
    _same_weights(saved, other)


def test_a_run_begun_on_another_kind_of_device_goes_on_with_new_noise(store: pafs.FileSystem) -> None:
    saved = _state("vae", 1)
    _train(saved, 2)
    _save(store, _bundle("vae", 24), saved)
    found, _ = newest_bundle(store, RUN)
    assert found is not None
    own = torch.load(io.BytesIO(found.payloads["rank-00000.pt"]), weights_only=True)
    buffer = io.BytesIO()
    torch.save({**own, "generator": torch.zeros(16, dtype=torch.uint8)}, buffer)  # the size of a GPU's
    again = _state("vae", 2)
    reason = restore(found.bundle, {**found.payloads, "rank-00000.pt": buffer.getvalue()}, again, rank=0)
    assert reason is not None and "another kind of device than 'cpu'" in reason
    _same_weights(saved, again)
    _train(again, 1)


def test_one_tensor_under_two_names_is_refused_in_words() -> None:
    """Averaged weights would be swapped twice, and the two names stored as two tensors."""
    norm, tied = nn.BatchNorm1d(2), nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    refuse_shared_tensors({"a": nn.ModuleDict({"x": norm}), "b": tied, "c": other})
    with pytest.raises(FigmentError, match=r"a\.y\.\w+ and a\.x\.\w+ are one tensor under two names"):
        refuse_shared_tensors({"a": nn.ModuleDict({"x": norm, "y": norm})})
    other.weight = tied.weight
    with pytest.raises(FigmentError, match=r"c\.weight and b\.weight are one tensor"):
        refuse_shared_tensors({"b": tied, "c": other})


def test_identity_changes_with_what_decides_the_numbers_and_only_with_that() -> None:
    spec = toy_spec("dcgan")
    longer = replace(spec, training=replace(spec.training, images=10**6, checkpoint_every=5, deterministic=False))
    wider = replace(spec, cluster=replace(spec.cluster, workers=4))
    pinned = replace(spec, data=replace(spec.data, dataset=f"{spec.data.dataset}@123456789abc"))
    assert spec.identity == longer.identity == wider.identity == pinned.identity
    reseeded = replace(spec, training=replace(spec.training, seed=9))
    faster = replace(spec, model=replace(spec.model, learning_rate=0.1))
    assert len({spec.identity, reseeded.identity, faster.identity, toy_spec("vae").identity}) == 4


def test_a_bundle_says_in_json_what_it_is(store: pafs.FileSystem) -> None:
    _save(store, _bundle("vae", 24, fence=3), _state("vae", 1))
    body = json.loads(read_object(store, f"{RUN}/checkpoints/000000000024-00003/bundle.json"))
    assert (body["images_seen"], body["dataset"], body["format"]) == (24, "toy@1", "figment-bundle-2")


def test_samples_are_drawn_from_the_average_where_there_is_one_and_damage_is_named(store: pafs.FileSystem) -> None:
    state = _state("vae", 1)
    _train(state, 3)
    bundle = _save(store, _bundle("vae", 24), state)
    plain = _save(store, _bundle("vae", 48), replace(state, ema=None))
    assert state.ema is not None
    weights, average = network_tensors(state.learner.networks()), state.ema.state
    for taken, averaged, expected in ((bundle, True, average), (bundle, False, weights), (plain, True, weights)):
        networks = _state("vae", 2).learner.networks()
        load_networks(store, taken, networks, averaged=averaged)
        assert all(torch.equal(t, expected[name]) for name, t in network_tensors(networks).items())
    assert any(not torch.equal(t, weights[name]) for name, t in average.items())
    _flip(store, f"{_path(24)}/ema.safetensors")
    with pytest.raises(FigmentError, match=r"ema.safetensors .*sha256.*choose another checkpoint"):
        load_networks(store, bundle, networks, averaged=True)
