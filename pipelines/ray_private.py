"""What Figment uses of Ray that Ray does not promise to keep. No other file may touch it (tests/test_import_rules.py).

Each piece says which behaviour it is needed for, and tests/pipelines/test_ray_private.py asks a real Ray for that
behaviour: a new version of Ray fails there in seconds and not in a training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.data import DataContext, Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

REST_S = 1.0
LOOK_S = 0.02


class Pace(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest while a block waits: until the consumer takes one, `REST_S` at most.

    The loop runs in a thread of the training process, and as long as finished blocks wait it turns without pause. Each
    turn takes the interpreter lock that the training thread wants back after every tensor operation: without the rest
    `dcgan-demo` trained at about 60 % of its speed on two cores, and the other core was busy with nothing else
    (docs/results.md). A fast consumer never lets a block wait, so its loop does not rest.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        waiting = _waiting_blocks(executor)
        until = time.monotonic() + REST_S
        while 0 < waiting <= _waiting_blocks(executor) and not executor._shutdown and time.monotonic() < until:
            time.sleep(LOOK_S)


def _waiting_blocks(executor: StreamingExecutor) -> int:
    _, state = executor._output_node
    return len(state.output_queue)


def paced(context: DataContext) -> None:
    """Executions of this context rest (`Pace`). Ray has callbacks of its own in that list, which stay."""
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Pace]


def never_wait_for_the_consumer(context: DataContext) -> None:
    """A task puts out all that it has, however slow its consumer is.

    One that waited would keep its CPU from other ranks, for whom that consumer may wait. (Not None, "no limit": then
    Ray does not count what running tasks will put out, and reads ahead without bound.)
    """
    context._max_num_blocks_in_streaming_gen_buffer = 2**20


def block_refs(dataset: Dataset) -> Iterator[ray.ObjectRef]:
    """References to the blocks, in order; the execution begins now, and ends when the iterator is let go.

    Not `iter_batches`: it leaves threads behind when it is not read to its end.
    """
    bundles = dataset.iter_internal_ref_bundles()
    return (entry.ref for bundle in bundles for entry in bundle.blocks)


def object_store_bytes(address: str) -> int:
    """Bytes in the object stores of the cluster at this GCS address, also of objects that are still being written."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    return get_memory_info_reply(get_state_from_address(address)).store_stats.object_store_bytes_used


def dashboard_url() -> str:
    """host:port of the job server of the cluster that this process is connected to."""
    from ray._private.worker import get_dashboard_url

    return get_dashboard_url()


def session_folder() -> Path:
    """Where the cluster on this machine that this process is connected to writes its logs."""
    return Path(ray._private.worker._global_node.get_session_dir_path())


def prepared_cluster_file(content: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a cluster file, with its defaults; `jsonschema.ValidationError` when it refuses it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(content)
    validate_config(prepared)
    return prepared


def job_package(folder: Path, package: Path) -> None:
    """The zip file that `ray job submit --working-dir` makes of a folder."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), package, include_gitignore=True, excludes=[])
