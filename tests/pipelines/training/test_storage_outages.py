"""A run on an object storage that fails and comes back ends with the same bytes; on one that stays away, in a sentence.

The loop and its stream run in this process, through a proxy in front of the real S3 server.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pyarrow import fs as pafs

from infra.storage import open_storage
from pipelines.errors import FigmentError
from pipelines.objects import children, exists, read_object
from pipelines.training.history import newest_bundle
from pipelines.training.launch import Launch, Place
from pipelines.training.reporter import Outcome, TrackedReporter
from pipelines.training.worker import TrainingLoop
from tests.faults import Fault, FaultProxy
from tests.pipelines.training.toys import toy_dataset, toy_spec

HERE = Place(rank=0, world_size=1, device=torch.device("cpu"))
SPEC = toy_spec("vae", images=240, checkpoint_every=60)

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def behind_proxy(
    s3_store: tuple[str, pafs.FileSystem], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> pafs.FileSystem:
    """The same prefix as `s3_store`, by way of the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    return open_storage(s3_store[0], patience_s=120.0)


@pytest.fixture(scope="module")
def undisturbed(in_process: None, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    fs = open_storage(str(tmp_path_factory.mktemp("undisturbed")))
    _run(fs)
    return _weights(fs)


def _run(fs: pafs.FileSystem, before_step: Callable[[int], None] = lambda images_seen: None) -> Outcome:
    launch = Launch("n", SPEC, fs, toy_dataset(fs))
    reporter = TrackedReporter(launch, HERE.device, None, {}, lambda line: None)
    loop = TrainingLoop(launch, HERE, reporter)
    train_on = loop._train_on

    def step(*arrays: Any) -> dict[str, torch.Tensor]:
        before_step(loop.images_seen)
        return train_on(*arrays)

    loop._train_on = step  # type: ignore[method-assign]
    outcome = reporter.finish(loop, loop.run())
    assert outcome is not None
    return outcome


def _weights(fs: pafs.FileSystem) -> bytes:
    found, damaged = newest_bundle(fs, "runs/n")
    assert found is not None and found.bundle.images_seen == 240 and not damaged
    return read_object(fs, f"{found.bundle.path}/networks.safetensors")


def _back_later(proxy: FaultProxy, what: Callable[[], None]) -> None:
    threading.Timer(1.0, what).start()


FAULTS = {
    "refused": None,
    "500": Fault("error", status=500),
    "cut": Fault("cut body"),
    "no answer": Fault("drop"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_an_outage_in_mid_epoch_at_a_checkpoint_and_at_the_end_changes_no_byte(
    kind: str,
    s3_store: tuple[str, pafs.FileSystem],
    behind_proxy: pafs.FileSystem,
    proxy: FaultProxy,
    undisturbed: bytes,
) -> None:
    direct = s3_store[1]
    broken: list[int] = []

    def breaks(images_seen: int) -> None:
        # 100: between two checkpoints. 160: the step after which one is written. 220: the last step, before the end.
        if images_seen not in (100, 160, 220):
            return
        broken.append(images_seen)
        fault = FAULTS[kind]
        if fault is None:
            proxy.refuse()
            _back_later(proxy, proxy.accept)
        else:
            proxy.set(fault)
            _back_later(proxy, proxy.clear)

    outcome = _run(behind_proxy, breaks)
    assert broken == [100, 160, 220]
    assert outcome.images_seen == 240
    assert _weights(direct) == undisturbed
    root = "runs/n/checkpoints"
    assert all(exists(direct, f"{root}/{name}/bundle.json") for name in children(direct, root)), "none is half"
    assert all(exists(direct, f"runs/n/{name}") for name in outcome.pictures)


def test_a_storage_that_stays_away_ends_the_run_in_one_sentence_and_the_same_command_resumes_it(
    s3_store: tuple[str, pafs.FileSystem], behind_proxy: pafs.FileSystem, proxy: FaultProxy, undisturbed: bytes
) -> None:
    impatient = open_storage(s3_store[0], patience_s=1.0)

    def breaks(images_seen: int) -> None:
        if images_seen == 100:
            proxy.refuse()

    with pytest.raises((FigmentError, OSError)) as ended:
        _run(impatient, breaks)
    assert re.search(r"waited \d+ s for it", str(ended.value)), str(ended.value)
    proxy.accept()
    found, _ = newest_bundle(behind_proxy, "runs/n")
    assert found is not None and 60 <= found.bundle.images_seen < 240
    _run(behind_proxy)
    assert _weights(s3_store[1]) == undisturbed


def test_a_checkpoint_that_was_cut_off_by_the_end_of_patience_is_not_one(
    s3_store: tuple[str, pafs.FileSystem], behind_proxy: pafs.FileSystem, proxy: FaultProxy, undisturbed: bytes
) -> None:
    impatient = open_storage(s3_store[0], patience_s=1.0)

    def breaks(images_seen: int) -> None:
        if images_seen == 100:
            proxy.set(Fault("error", only=r"PUT .*/checkpoints/.*optimizers", status=500))

    with pytest.raises(OSError, match=r"waited \d+ s for it"):
        _run(impatient, breaks)
    proxy.clear()
    cut = children(s3_store[1], "runs/n/checkpoints")[-1]
    assert not exists(s3_store[1], f"runs/n/checkpoints/{cut}/bundle.json")
    assert exists(s3_store[1], f"runs/n/checkpoints/{cut}/networks.safetensors"), "it was cut in the middle"
    _run(behind_proxy)
    assert _weights(s3_store[1]) == undisturbed
