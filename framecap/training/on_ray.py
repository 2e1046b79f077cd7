"""The two parts of training that run on Ray: features by Ray Data, steps by Ray Train."""

from __future__ import annotations

import json
import logging
import os
import uuid
from typing import Any

import torch

from framecap.errors import FramecapError, SettingsError, TrainingError
from framecap.model.ruclip import RuClip
from framecap.ray_cluster import join_or_start
from framecap.storage import OPTIONS_VARIABLE
from framecap.training.features import encode_unit, missing_units
from framecap.training.loop import Team
from framecap.training.plan import TrainPlan
from framecap.training.settings import TrainSettings
from framecap.training.worker import train_worker

log = logging.getLogger(__name__)


def connect(settings: TrainSettings) -> str:
    """Join or start Ray and settle the workers' device: ``cpu`` or ``cuda``.

    Where the cluster lacks the CPUs or GPUs asked for, an autoscaler gets ``settings.node_timeout`` to add nodes.

    Raises SettingsError when there are not enough even then, or nobody could add any.
    """
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not ray.is_initialized():
        join_or_start(settings.ray_address, logging_level=logging.WARNING)
    device = settings.device
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU", 0) >= settings.workers else "cpu"
    bundle = {"CPU": settings.cpus_per_worker} | ({"GPU": 1.0} if device == "cuda" else {})
    if lacks := _lacks(bundle, settings):
        own = ray._private.worker._global_node
        if own is not None and own.is_head():  # started by this process: nobody adds a node
            raise SettingsError(lacks)
        _wait_for_nodes(bundle, lacks, settings)
    return device


def _lacks(bundle: dict[str, float], settings: TrainSettings) -> str | None:
    """What the cluster has too little of at present, in words."""
    import ray

    has = ray.cluster_resources()
    for name, each in bundle.items():
        if has.get(name, 0) < settings.workers * each:
            asked = f"x --cpus-per-worker {each:g} need" if name == "CPU" else "on cuda need"
            return (
                f"--workers {settings.workers} {asked} {settings.workers * each:g} {name}s; "
                f"the cluster has {has.get(name, 0):g}"
            )
    return None


def _wait_for_nodes(bundle: dict[str, float], lacks: str, settings: TrainSettings) -> None:
    """Ask the cluster for all workers' nodes and wait until they are there: Ray Train gives up after a minute.

    Raises SettingsError when they do not come within ``settings.node_timeout``.
    """
    from ray.util import placement_group, remove_placement_group

    log.warning("%s; waiting for the autoscaler, %g seconds at most (--node-timeout)", lacks, settings.node_timeout)
    group = placement_group([dict(bundle) for _ in range(settings.workers)])
    try:
        if not group.wait(settings.node_timeout):
            raise SettingsError(f"{lacks}, and no node came in {settings.node_timeout:g} seconds (--node-timeout)")
    finally:
        remove_placement_group(group)


class UnitEncoder:
    """Actor of the encoding pool: holds the encoder, writes the part of each unit it is given."""

    def __init__(self, plan: TrainPlan, device: str) -> None:
        if plan.storage:
            os.environ[OPTIONS_VARIABLE] = json.dumps(plan.storage)
        self.plan = plan
        self.encoder = RuClip.from_pretrained(plan.encode.encoder, device)
        self.by_index = {unit.index: unit for unit in plan.units}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Column ``index`` → the same and ``error``, empty where all went well."""
        errors = []
        for index in batch["index"]:
            try:
                encode_unit(self.encoder, self.by_index[int(index)], self.plan.features, self.plan.encode)
                errors.append("")
            except FramecapError as error:
                errors.append(str(error))
        return {"index": batch["index"], "error": errors}


def encode_on_ray(plan: TrainPlan, device: str) -> None:
    """Features of all units that have none yet, by a pool of actors.

    Raises TrainingError with the first unit's error.
    """
    import ray

    missing = missing_units(plan.features, plan.units)
    if not missing:
        return
    RuClip.from_pretrained(plan.encode.encoder)  # damaged weights stop here, before any actor starts
    log.info("encoding %d images in %d units", sum(unit.rows for unit in missing), len(missing))
    settings = plan.settings
    units = ray.data.from_items([{"index": u.index} for u in missing], override_num_blocks=len(missing))
    done = units.map_batches(
        UnitEncoder,
        fn_constructor_kwargs={"plan": plan, "device": device},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=settings.workers),
        num_cpus=settings.cpus_per_worker,
        num_gpus=1 if device == "cuda" else 0,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise TrainingError(row["error"])


def train_on_ray(plan: TrainPlan, device: str) -> None:
    """All steps, on ``settings.workers`` Ray Train workers; a lost worker's group resumes by itself.

    Raises TrainingError, or the error a worker raised.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    settings = plan.settings
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"plan": plan, "device": device},
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=device == "cuda",
            resources_per_worker={"CPU": settings.cpus_per_worker, "GPU": int(device == "cuda")},
        ),
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=str((plan.run_dir / "ray").absolute()),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error) from error


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("framecap").setLevel(logging.INFO)
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if config["device"] == "cuda" else torch.device("cpu")
    team = Team(device, context.get_world_rank(), context.get_world_size())
    progress = train_worker(config["plan"], team)
    ray.train.report({"step": progress.step, "train_loss": progress.train_loss})


def _cause(error: Exception) -> FramecapError:
    """The FramecapError that a worker raised, or a TrainingError around whatever it was."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for failure in failures.values():
        seen: BaseException | None = failure
        while seen is not None:
            if isinstance(seen, FramecapError):
                return seen
            seen = getattr(seen, "cause", None) or seen.__cause__
    first = next(iter(failures.values()))
    line = (str(first).strip().splitlines() or [type(first).__name__])[-1]
    return TrainingError(f"training failed: {line}; start the same command again to resume")
