"""Images from object storage into one training worker, through Ray Data.

Each worker runs its own Ray Data pipeline over its part of the plan (`plan.py`): one task reads one window of shards
into contiguous Arrow blocks (`windows.py`), and blocks arrive in the order of the plan. A background thread cuts them
into exact batches. Images stay uint8 (B, C, H, W) until they are on the device.

How much is held is bounded by windows and by `STORE_BYTES`, not by the data set. A pipeline covers many windows, and
the next one starts while the last windows of the one before are being consumed, so that its start is not waited for.
"""

from __future__ import annotations

import logging
import math
import pickle
import queue
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import numpy as np
import pyarrow as pa
import ray
import ray.data
from pyarrow import fs as pafs
from ray.data import ExecutionOptions, ExecutionResources, TaskPoolStrategy
from ray.exceptions import RayError

from pipelines.data.manifest import Manifest
from pipelines.data.plan import Cursor, evaluation_share, rank_segments, training_plan
from pipelines.data.windows import BLOCK_BYTES, Layout, Read, pixels_of, read_window
from pipelines.errors import FigmentError
from pipelines.ray_private import block_refs, never_wait_for_the_consumer, paced

STORE_BYTES = 256 * 2**20  # of the object store, for one pipeline: no further window is begun beyond it
TASKS = 4  # windows of one worker in the making at the same time
READ_CPUS = 0.5  # so that a small machine runs few of them beside its training workers, and any other TASKS
WINDOWS_PER_PIPELINE = 64
PATIENCE_S = 30.0  # without a batch, before the log says so

Arrays = tuple[np.ndarray, np.ndarray]
"""images uint8 (B, C, H, W), labels int64 (B,); C-contiguous, writable, owned by the receiver."""

log = logging.getLogger(__name__)
# Ray Data tells of every execution that it begins and ends, and prints errors that the consumer gets anyway.
logging.getLogger("ray.data").setLevel(logging.CRITICAL)


class BatchStream(Iterator[Arrays]):
    """Batches made ahead by a background thread. Close it, or let it go, and thread and pipeline end.

    Errors of the pipeline arrive at the consumer; after an error or the end, `next` raises `StopIteration`.
    """

    def __init__(self, batches: Generator[Arrays, None, None], prefetch_batches: int) -> None:
        self.stall_seconds = 0.0  # how long the consumer has waited for batches so far
        self._ready: queue.Queue[Arrays | _End] = queue.Queue(max(1, prefetch_batches))
        self._ended = False
        stop = threading.Event()
        # Neither the thread nor the finalizer may hold `self`, or it would never be let go.
        self._thread = threading.Thread(
            target=_produce, args=(batches, self._ready, stop), name="figment-data", daemon=True
        )
        self._finalizer = weakref.finalize(self, _stop, self._ready, stop)
        self._thread.start()

    def __next__(self) -> Arrays:
        if self._ended or not self._finalizer.alive:
            raise StopIteration
        began = time.perf_counter()
        item = self._wait()
        self.stall_seconds += time.perf_counter() - began
        if not isinstance(item, _End):
            return item
        self._ended = True
        self.close()
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Ends thread and pipeline and waits until they are gone. Harmless when repeated."""
        self._finalizer()
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            log.warning("the data stream has not ended after %.0f s: a task of it hangs; going on without", PATIENCE_S)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self) -> Arrays | _End:
        while True:
            try:
                return self._ready.get(timeout=PATIENCE_S)
            except queue.Empty:
                free = ray.available_resources().get("CPU", 0.0)
                log.warning(
                    "no batch from the data stream for %.0f s; its tasks need %.2f CPU each and %.2f CPU of the"
                    " cluster are free: give the training workers less, or look at the storage",
                    PATIENCE_S,
                    READ_CPUS,
                    free,
                )


def training_batches(
    fs: pafs.FileSystem,
    manifest: Manifest,
    split: str,
    *,
    seed: int,
    shuffle_shards: int,
    cursor: Cursor,
    rank: int,
    batch_size: int,
    batches: int | None = None,
    prefetch_batches: int = 4,
) -> BatchStream:
    """Full batches of `batch_size` rows for one rank, from `cursor` on, in the order of `training_plan`.

    As many as `batches`, so that nothing is read ahead that nobody will take; None: without end.
    Which rows come is a function of (manifest, seed, shuffle_shards, cursor, rank) alone; after n batches every rank's
    state is `cursor.advance(n * batch_size)`. Raises `FigmentError` from `next` when a shard is missing or damaged.
    """
    plan = training_plan(manifest, split, seed=seed, shuffle_shards=shuffle_shards)
    shards = manifest.shards(split)
    reads: Iterator[Read] = (
        Read(tuple(shards[s] for s in window.shards), lo, hi, (seed, segment[0], window))
        for segment in rank_segments(plan, cursor, rank)
        for window, lo, hi in plan.cover(segment)
    )
    if batches is not None:
        reads = _first_rows(reads, batches * batch_size)
    return _stream(fs, manifest, reads, batch_size, prefetch_batches)


def _first_rows(reads: Iterator[Read], rows: int) -> Iterator[Read]:
    while rows > 0:
        read = next(reads)
        read = replace(read, hi=min(read.hi, read.lo + rows))
        rows -= read.rows
        yield read


def evaluation_batches(
    fs: pafs.FileSystem,
    manifest: Manifest,
    split: str,
    *,
    world_size: int,
    rank: int,
    batch_size: int,
    prefetch_batches: int = 4,
) -> BatchStream:
    """One pass over this rank's contiguous share in stored order. The last batch may be smaller, the share empty."""
    shards = manifest.shards(split)
    share = evaluation_share(tuple(shard.rows for shard in shards), world_size, rank)
    reads = (Read((shards[s],), lo, hi) for s, lo, hi in share)
    return _stream(fs, manifest, reads, batch_size, prefetch_batches)


def _stream(
    fs: pafs.FileSystem, manifest: Manifest, reads: Iterator[Read], batch_size: int, prefetch_batches: int
) -> BatchStream:
    if batch_size < 1:
        raise FigmentError(f"the batch size of a worker must be 1 or more, not {batch_size}")
    layout = Layout.of(manifest)
    blocks = _blocks(fs, layout, reads)
    return BatchStream(_batches(blocks, batch_size, manifest.image_shape), prefetch_batches)


# --- the consumer's side: batches from blocks -------------------------------------------------------------------------


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


def _produce(batches: Generator[Arrays, None, None], ready: queue.Queue[Arrays | _End], stop: threading.Event) -> None:
    end = _End()
    try:
        for batch in batches:
            ready.put(batch)
            if stop.is_set():
                break
    except BaseException as error:  # noqa: BLE001 - handed to the consumer, whose thread it is meant for
        end = _End(_user_error(error))
    finally:
        batches.close()
    if not stop.is_set():
        ready.put(end)


def _stop(ready: queue.Queue[Arrays | _End], stop: threading.Event) -> None:
    stop.set()
    with suppress(queue.Empty):  # emptied, so that a producer that waits for a free place goes on and sees `stop`
        while True:
            ready.get_nowait()


def _user_error(error: BaseException) -> BaseException:
    """The sentence of the `FigmentError` that Ray wrapped, if there is one inside."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, FigmentError) and not isinstance(inner, RayError):
            return FigmentError(str(inner).partition("\n")[0])  # Ray writes advice of its own below
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error


def _batches(
    blocks: Generator[pa.Table, None, None], batch_size: int, shape: tuple[int, int, int]
) -> Generator[Arrays, None, None]:
    images, labels, filled = np.empty((batch_size, *shape), np.uint8), np.empty(batch_size, np.int64), 0
    try:
        for block in blocks:
            rows, ids = pixels_of(block["image"], math.prod(shape)).reshape(-1, *shape), block["label"].to_numpy()
            taken = 0
            while taken < len(rows):
                n = min(batch_size - filled, len(rows) - taken)
                images[filled : filled + n] = rows[taken : taken + n]
                labels[filled : filled + n] = ids[taken : taken + n]
                taken, filled = taken + n, filled + n
                if filled == batch_size:
                    yield images, labels
                    images, labels, filled = np.empty_like(images), np.empty_like(labels), 0
        if filled:
            yield images[:filled], labels[:filled]
    finally:
        blocks.close()


# --- Ray Data: blocks from reads --------------------------------------------------------------------------------------


class _Pipeline:
    """One Ray Data execution, begun: its blocks in the order of its reads."""

    def __init__(self, source: ray.ObjectRef, layout: Layout, reads: list[Read]) -> None:
        # Ray publishes the arguments of its operators, and a filesystem has secrets: `source` is but a reference to it.
        dataset = ray.data.from_items(
            [pickle.dumps(read) for read in reads], override_num_blocks=len(reads)
        ).map_batches(
            _read_blocks,
            fn_args=(source,),
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=min(TASKS, len(reads))),
            num_cpus=READ_CPUS,
        )
        context = dataset.context
        context.enable_progress_bars = False
        context.enable_auto_log_stats = False
        context.print_on_execution_start = False
        context.target_max_block_size = BLOCK_BYTES
        never_wait_for_the_consumer(context)
        paced(context)
        context.raise_original_map_exception = True  # the wrapper that Ray has for them loses them on its way here
        # Training may stand still for an hour, to evaluate or to debug.
        context.execution_no_progress_timeout_s = -1
        # As many finished windows as are in the making are enough: more would only make a run on a small data set begin
        # with reading a hundred epochs ahead.
        window_bytes = max(read.rows for read in reads) * layout.width
        memory = min(STORE_BYTES, 2 * TASKS * window_bytes)
        context.execution_options = ExecutionOptions(
            preserve_order=True, resource_limits=ExecutionResources.for_limits(object_store_memory=memory)
        )
        self._blocks: Iterator[ray.ObjectRef] | None = block_refs(dataset)

    def __iter__(self) -> Iterator[pa.Table]:
        while self._blocks is not None:
            block = next(self._blocks, None)
            if block is None:
                return
            yield ray.get(block)

    def close(self) -> None:
        self._blocks = None  # Ray ends the execution when its iterator is let go


def _blocks(fs: pafs.FileSystem, layout: Layout, reads: Iterator[Read]) -> Generator[pa.Table, None, None]:
    """The blocks of all reads, in order, from one Ray Data execution after the other."""
    source = ray.put((fs, layout))
    work = list(islice(reads, WINDOWS_PER_PIPELINE))
    running: _Pipeline | None = None
    upcoming: Future[_Pipeline] | None = None
    with ThreadPoolExecutor(1, "figment-data-next") as pool:
        try:
            running = _Pipeline(source, layout, work) if work else None
            while running is not None:
                left, last = sum(read.rows for read in work), sum(read.rows for read in work[-TASKS:])
                work = []
                for block in running:
                    yield block
                    left -= block.num_rows
                    if left <= last and not work:
                        work = list(islice(reads, WINDOWS_PER_PIPELINE))
                        upcoming = pool.submit(_Pipeline, source, layout, work) if work else None
                running.close()
                running, upcoming = upcoming.result() if upcoming is not None else None, None
        finally:
            if running is not None:
                running.close()
            if upcoming is not None and upcoming.exception() is None:
                upcoming.result().close()


@lru_cache(maxsize=2)
def _open(source: ray.ObjectRef) -> tuple[pafs.FileSystem, Layout]:
    """Kept from task to task, and with it the connections to the storage."""
    return ray.get(source)


def _read_blocks(items: pa.Table, source: ray.ObjectRef) -> Iterator[pa.Table]:
    fs, layout = _open(source)
    for item in items["item"]:
        yield from read_window(fs, layout, pickle.loads(item.as_py()))
