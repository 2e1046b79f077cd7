"""Train a captioner: plan → encode once → train → assemble, on a Ray cluster or in this process."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from framecap.errors import TrainingError
from framecap.model.captioner import BRIDGE_WEIGHTS
from framecap.model.captioner_config import CaptionerConfig
from framecap.model.convert import assemble
from framecap.model.devices import choose_device
from framecap.model.rugpt import RuGpt
from framecap.storage import is_local
from framecap.training.curve import draw
from framecap.training.disk import clear_disk_errors, replace_file
from framecap.training.loop import Team
from framecap.training.places import CAPTIONER, upload
from framecap.training.plan import TrainPlan, encode_here, load_data, make_plan, prepare_text_space
from framecap.training.settings import TrainSettings
from framecap.training.worker import RESULT, train_worker

log = logging.getLogger(__name__)


def train_locally(settings: TrainSettings) -> Path:
    """Train in this process, one worker, no Ray; return the captioner directory (see ``publish``).

    Raises SettingsError, StorageError, TrainingError and the errors of loading checkpoints.
    """
    device = choose_device(settings.device)
    plan = make_plan(settings, str(device))
    encode_here(plan)
    prepare_text_space(plan)
    check_data(plan)
    train_worker(plan, Team(device=device))
    return publish(plan)


def train_captioner(settings: TrainSettings) -> Path:
    """Train on the Ray cluster we are in (or a local one) with ``settings.workers``; return the directory.

    Raises SettingsError, StorageError, TrainingError and the errors of loading checkpoints.
    """
    from framecap.training.on_ray import connect, encode_on_ray, train_on_ray

    plan = make_plan(settings, device="auto")
    device = connect(settings)
    encode_on_ray(plan, device)
    prepare_text_space(plan)
    check_data(plan)
    train_on_ray(plan, device)
    return publish(plan)


def check_data(plan: TrainPlan) -> None:
    """Say what will be trained on, and stop here rather than on the workers if that cannot be."""
    decoder = RuGpt.from_pretrained(plan.settings.decoder)
    data, cut = load_data(plan, decoder)
    bad = data.pairs.bad
    log.info(
        "%d captions for training, %d for validation, of %d images; %d pairs left out, %d captions cut",
        len(data.training),
        len(data.validation),
        len(set(data.pairs.images)),
        len(bad),
        cut,
    )
    if bad:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad)
        with replace_file(plan.run_dir / "bad_pairs.jsonl") as stream:
            stream.write(lines.encode())


def publish(plan: TrainPlan) -> Path:
    """Assemble the captioner directory from the encoder and the result, and draw the curve; return its path.

    For an ``out`` that is no folder here the captioner is assembled in the work folder and uploaded.
    Raises TrainingError when training left no result, StorageError when ``out`` cannot be written.
    """
    result = plan.run_dir / RESULT
    if not (result / "summary.json").is_file():
        raise TrainingError(f"{result} holds no finished result; start the same command again to resume")
    decoder = result / "decoder" if plan.settings.train == "bridge+decoder" else Path(plan.settings.decoder)
    local = is_local(plan.settings.out)
    folder = Path(plan.settings.out) if local else plan.run_dir / CAPTIONER
    with clear_disk_errors(folder):
        if not local:
            shutil.rmtree(folder, ignore_errors=True)  # of a run whose upload failed
        assemble(plan.settings.encoder, decoder, result / BRIDGE_WEIGHTS, folder, CaptionerConfig(plan.bridge))
    if not local:
        upload(folder, plan.settings.out)
    draw(plan.run_dir)  # last: a finished captioner does not depend on a picture
    return folder
