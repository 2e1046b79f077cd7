"""One worker of a training run, in this process or on Ray, and the result that the leading worker leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from typing import Any

from framecap.model.captioner import BRIDGE_WEIGHTS
from framecap.model.weights import write_state_dict
from framecap.training.checkpoint import Progress
from framecap.training.disk import clear_disk_errors, replace_file
from framecap.training.loop import Team, Trainer
from framecap.training.loss import CaptionLoss
from framecap.training.plan import TrainPlan, build_model, load_data
from framecap.training.text_space import move_to_images

RESULT = "trained"  # folder with decoder, bridge.safetensors, summary.json


def train_worker(plan: TrainPlan, team: Team) -> Progress:
    """One worker's part; the leader leaves the result in the run's folder."""
    model = build_model(plan, team.device)
    data, _ = load_data(plan, model.decoder)
    trainer = Trainer(model, data, plan.settings, plan.run_dir, team, plan.identity)
    progress = trainer.train()
    if team.leads:
        if data.space is not None:
            move_to_images(model.bridge, data.space)
        leave_result(plan, model, progress, trainer.steps)
    return progress


def leave_result(plan: TrainPlan, model: CaptionLoss, progress: Progress, steps: int) -> None:
    """Write the trained parts and summary.json below the run's folder."""
    folder = plan.run_dir / RESULT
    with clear_disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if plan.settings.train == "bridge+decoder":
            model.decoder.save_pretrained(folder / "decoder")
        write_state_dict(folder / BRIDGE_WEIGHTS, model.bridge_state())
    summary: dict[str, Any] = {
        "steps": progress.step,
        "planned_steps": steps,
        "stopped_early": progress.step < steps,
        "train_loss": progress.train_loss,
        "validation_loss": progress.best_loss if progress.validated else None,
        "best_step": progress.best_step if progress.validated else progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "bridge": asdict(plan.bridge),
        "settings": plan.settings.model_dump(mode="json", exclude={"storage_options"}),
    }
    with replace_file(folder / "summary.json") as stream:
        stream.write((json.dumps(summary, ensure_ascii=False, indent=1) + "\n").encode())
