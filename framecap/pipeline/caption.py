"""The streaming part: units → readers → caption actors → records, by Ray Data."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError

from framecap.errors import FramecapError, NoProgressError, SettingsError
from framecap.pipeline.job import Job, Resources
from framecap.pipeline.plan import Chunk
from framecap.pipeline.read import ReadOptions, read_units
from framecap.pipeline.records import ActorOptions, ChunkRecord
from framecap.pipeline.settings import CaptionSettings
from framecap.pipeline.stops import Stops
from framecap.ray_cluster import RayStart
from framecap.storage import OPTIONS_VARIABLE

log = logging.getLogger(__name__)
_MOST_BLOCKS = 10_000


def start_ray(settings: CaptionSettings, start: RayStart, check: Callable[[], None]) -> Resources:
    """Join or start a cluster, and size the actor pool by what it has. ``check`` may raise meanwhile."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off: ours is on
    if not ray.is_initialized():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its notes on actors are not the operator's
        start.connect(settings.ray_address, check)
    available = ray.cluster_resources()
    cpus, gpus = available.get("CPU", 1.0), available.get("GPU", 0.0)
    num_gpus = settings.num_gpus if settings.num_gpus is not None else (1.0 if gpus else 0.0)
    if settings.device.startswith("cuda") and not num_gpus:
        raise SettingsError(f"--device {settings.device} needs --num-gpus, and a cluster with GPUs")
    if num_gpus:
        if not gpus:
            log.warning(
                "no node with a GPU yet; waiting for the autoscaler (--no-progress-timeout ends it), for %d actor(s): "
                "--max-actors says how many there may be",
                settings.max_actors or 1,
            )
        fit = max(1, int(gpus / num_gpus)) if gpus else 1
        num_cpus, reader_cpus = settings.num_cpus or 1.0, 1.0
    else:
        log.warning("captioning on %d CPU cores: the cluster has no GPU, or none was asked for", int(cpus))
        num_cpus, reader_cpus = settings.num_cpus or 0.75, 0.25
        fit = max(1, int(cpus * 0.75 / num_cpus))
    _check_fit({"CPU": num_cpus, "GPU": num_gpus}, start.own)
    most = settings.max_actors or fit
    return Resources(
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        reader_cpus=reader_cpus,
        actors=most,
        min_actors=min(settings.min_actors, most),
        batch_size=settings.batch_size or (1024 if num_gpus else 64),
    )


def _check_fit(actor: dict[str, float], own: bool) -> None:
    """Raise ``SettingsError`` where no node has what an actor needs and the cluster is this process's own; one that
    was joined may grow, so there it is a warning."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, needed in actor.items():
        largest = max(node.get(name, 0.0) for node in nodes)
        if needed <= largest or (name == "GPU" and not largest and not own):  # the latter has its own warning
            continue
        flag = f"--num-{name.lower()}s {needed:g}"
        if own:
            raise SettingsError(f"{flag}: this machine has {largest:g}; give at most that")
        log.warning("%s: the largest node has %g; waiting for a larger one (--no-progress-timeout)", flag, largest)


def caption_units(
    job: Job, units: list[tuple[Chunk, ...]], resources: Resources, stops: Stops
) -> Iterator[ChunkRecord]:
    """Records of chunks as they are finished, in any order. Raises ``StopRun`` when it is time to stop."""
    dataset = _dataset(job, units, resources)
    consumer = _Consumer(dataset)
    try:
        while True:
            stops.check()
            try:
                item = consumer.items.get(timeout=0.2)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, ExecutionTimeoutError):
                raise NoProgressError(
                    f"no progress for {job.settings.no_progress_timeout:g} s: the cluster cannot place an actor or a "
                    "reader (compare --num-gpus and --num-cpus with `ray status`), or a task hangs"
                )
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        consumer.stop()


def _dataset(job: Job, units: list[tuple[Chunk, ...]], resources: Resources) -> Any:
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    # A row is a chunk with all its pixels: every row is a block of its own, none is ever cut.
    context.target_max_block_size = 1
    # An actor works on so many chunks at once, so that frames wait for every slot that becomes free.
    calls = 3 if resources.num_gpus else 2
    # One more chunk waits at it. Ray's measure is chunks per call: where one waits at each actor, more are started;
    # where half of the actors have none, some are ended.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.1
    context.autoscaling_config.actor_pool_util_downscaling_threshold = 0.5 / calls
    context.execution_no_progress_timeout_s = job.settings.no_progress_timeout
    with ray.data.DataContext.current(context):
        items = [{"unit": pickle.dumps(unit)} for unit in units]
        storage = json.dumps(job.storage) if job.storage else ""
        return (
            ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS))
            .map_batches(
                _Reader(job.read_options(), storage),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=resources.reader_cpus,
            )
            .map_batches(
                RayCaptionActor,
                fn_constructor_args=(job.actor_options(), storage),
                batch_size=1,  # a chunk, as its block is; with num_gpus Ray refuses None
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=resources.min_actors,
                    max_size=resources.actors,
                    max_concurrent_calls_per_actor=calls,
                    enable_true_multi_threading=True,
                    max_tasks_in_flight_per_actor=calls + 1,
                ),
                num_cpus=resources.num_cpus,
                num_gpus=resources.num_gpus or None,
            )
        )


class _Reader:
    """``read_units`` with its options, as Ray Data ships it to a worker."""

    def __init__(self, options: ReadOptions, storage: str) -> None:
        self._options, self._storage = options, storage

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        _use_storage(self._storage)
        yield from read_units(block, self._options)


class RayCaptionActor:
    """``CaptionActor`` with the storage options of the driver. One that cannot start says why in place of its first
    record: of an exception in a constructor Ray passes on only the text."""

    def __init__(self, options: ActorOptions, storage: str) -> None:
        from framecap.pipeline.stages import CaptionActor  # torch and the models: not on the driver

        # The device's thread lets go of the interpreter at every launch and waits until it has it again: beside two
        # busy threads, a turn of 2.4 ms took 60 ms with Python's interval of 5 ms, and 5.3 ms with this one.
        sys.setswitchinterval(1e-4)
        _use_storage(storage)
        self._captioner: CaptionActor | FramecapError
        try:
            self._captioner = CaptionActor.from_options(options)
        except FramecapError as error:
            self._captioner = error

    def __call__(self, block: pa.Table) -> pa.Table:
        if isinstance(self._captioner, FramecapError):
            return pa.table({"record": [pickle.dumps(self._captioner)]})
        return self._captioner(block)


def _use_storage(storage: str) -> None:
    """On a cluster that was joined, the workers' environment is not ours to set beforehand."""
    if storage:
        os.environ[OPTIONS_VARIABLE] = storage


class _Consumer:
    """Iterates the dataset in a thread, so that signals and the time budget are heard at once."""

    def __init__(self, dataset: Any) -> None:
        self.items: queue.Queue[ChunkRecord | BaseException | None] = queue.Queue(maxsize=256)
        self._stopping = threading.Event()
        self._dataset = dataset
        self._thread = threading.Thread(target=self._consume, name="framecap-records", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def _consume(self) -> None:
        try:
            for batch in self._dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for record in batch.column("record"):
                    self._put(pickle.loads(record.as_py()))
                if self._stopping.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: ChunkRecord | BaseException | None) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(queue.Full):
                self.items.put(item, timeout=0.5)
                return
