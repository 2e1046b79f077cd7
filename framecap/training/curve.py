"""The learning curve as a table (curve.csv) and a picture (curve.png), and the progress line."""

from __future__ import annotations

import csv
import io
import logging
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from framecap.training.disk import clear_disk_errors, replace_file

log = logging.getLogger(__name__)

TABLE = "curve.csv"
PICTURE = "curve.png"


@dataclass(frozen=True)
class CurveRow:
    """One row: losses in nats a token (None where not measured at this step), rates, seconds trained."""

    step: int
    epoch: float
    train_loss: float | None
    validation_loss: float | None
    learning_rate: float
    tokens_per_second: float
    seconds: float


class Curve:
    """Rows of ``curve.csv`` below ``folder``; on resuming, rows past ``step`` are forgotten."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / TABLE
        self.rows = [row for row in _read(self.path) if row.step <= step]

    def add(self, row: CurveRow) -> None:
        """Add a row and write the table anew; a second row of the same step takes the first one's place."""
        self.rows = [old for old in self.rows if old.step != row.step] + [row]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in fields(CurveRow))
        for one in self.rows:
            values = asdict(one).values()
            writer.writerow("" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values)
        with replace_file(self.path) as stream:
            stream.write(text.getvalue().encode())


def _read(path: Path) -> list[CurveRow]:
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return [_row(record) for record in csv.DictReader(stream)]


def _row(record: dict[str, str]) -> CurveRow:
    def optional(name: str) -> float | None:
        return float(record[name]) if record[name] else None

    return CurveRow(
        step=int(record["step"]),
        epoch=float(record["epoch"]),
        train_loss=optional("train_loss"),
        validation_loss=optional("validation_loss"),
        learning_rate=float(record["learning_rate"]),
        tokens_per_second=float(record["tokens_per_second"]),
        seconds=float(record["seconds"]),
    )


def draw(folder: Path) -> Path | None:
    """Draw curve.png from curve.csv; None, and a warning, without matplotlib (extra ``report``)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("matplotlib is not installed, so %s is left out; pip install matplotlib", PICTURE)
        return None
    rows = _read(folder / TABLE)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for name, label in (("train_loss", "training"), ("validation_loss", "validation")):
        points = [(row.step, value) for row in rows if (value := getattr(row, name)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
    axes.set(xlabel="step", ylabel="loss, nats per token", title="framecap training")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    target = folder / PICTURE
    with clear_disk_errors(target):
        figure.savefig(target, dpi=120)
    return target


def progress_line(row: CurveRow, total: int, seconds_left: float) -> str:
    """``step 120/1000 (epoch 3.2)  loss 1.234  12,345 tokens/s  3m12s left``."""
    parts = [f"step {row.step}/{total} (epoch {row.epoch:.1f})"]
    if row.train_loss is not None:
        parts.append(f"loss {row.train_loss:.4f}")
    if row.validation_loss is not None:
        parts.append(f"validation {row.validation_loss:.4f}")
    parts += [f"{row.tokens_per_second:,.0f} tokens/s", f"{duration(seconds_left)} left"]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``3m12s``, ``2h05m``."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s"
