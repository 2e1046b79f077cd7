"""Rows → a table to read, JSON to keep, and what they mean for the size of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from framecap.bench.measure import Ceilings, Row

SECONDS_A_DAY = 86_400
OWN_ROWS = "framecap, its own choice of rows"
DECODING = "framecap, JPEG decoding alone"
# What the sizing reads: how the stage begins, and whose figures count.
_SIZED = {
    "core": ("decode exact 720p", ("framecap, to uint8",)),
    "encode": ("encode,", ("framecap",)),
    "generate": ("generate greedy,", ("framecap", OWN_ROWS)),
    "caption": ("caption,", ("framecap",)),
    "decoding": ("captioner,", (DECODING,)),
    "captioner": ("captioner,", ("framecap",)),
}
_HEADINGS = ("stage", "contestant", "frames/s", "framecap is", "same result", "roofline", "peak MiB", "")


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table; ``framecap is``: how many times as fast as this contestant the stage's first one is."""
    lines: list[Sequence[str]] = [_HEADINGS]
    last = None
    for row in rows:
        lines.append(("" if row.stage == last else row.stage, *_cells(row)))
        last = row.stage
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text = [f"| {' | '.join(line)} |" for line in padded]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.contestant,
        "" if row.frames_per_second is None else _number(row.frames_per_second),
        "" if row.ratio is None else f"{row.ratio:.2f}×",
        "" if row.agreement is None else f"{row.agreement:.0%}",
        "" if row.roofline is None else f"{row.roofline:.0%}",
        "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
        row.note,
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def as_json(
    rows: Sequence[Row], machine: dict[str, Any], ceilings: Ceilings, settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything measured, as plain values; ``seconds`` holds every round."""
    return {
        "machine": machine,
        "ceilings": {"operations_per_second": ceilings.operations, "bytes_per_second": ceilings.bytes},
        "settings": settings,
        "rows": [asdict(row) for row in rows],
        "sizing": sizing(rows),
    }


def sizing(rows: Sequence[Row]) -> dict[str, float]:
    """Frames per second and day of one device (encoding and greedy generation, at the best batch), and the
    CPU cores whose exact decoding of 1280×720 frames feeds it; what a captioner makes of JPEG frames, and its
    share of the slower of its two halves. Only what the measured stages tell."""
    best: dict[str, float] = {}
    for row in rows:
        kind = next((kind for kind, (stage, names) in _SIZED.items() if _is(row, stage, names)), None)
        if kind and row.frames_per_second:
            best[kind] = max(best.get(kind, 0.0), row.frames_per_second)
    found: dict[str, float] = {}
    rate = best.get("caption")
    if rate is None and {"encode", "generate"} <= best.keys():
        rate = 1 / (1 / best["encode"] + 1 / best["generate"])
    if rate is not None:
        found = {"frames_per_second": rate, "frames_per_day": rate * SECONDS_A_DAY}
    if "core" in best:
        found["decoded_per_second_and_core"] = best["core"]
        if rate is not None:
            found["cores_per_device"] = rate / best["core"]
    if "captioner" in best:
        found["end_to_end_per_second"] = best["captioner"]
        if "caption" in best:
            found["end_to_end_share"] = best["captioner"] / min(best["caption"], best["decoding"])
    return found


def _is(row: Row, stage: str, contestants: Sequence[str]) -> bool:
    return row.stage.startswith(stage) and row.contestant in contestants


def format_sizing(found: dict[str, float], device: str) -> str:
    """The last lines of the report; empty when too few stages ran."""
    lines = []
    if "frames_per_day" in found:
        lines.append(
            f"{device}: {_number(found['frames_per_second'])} frames/s, "
            f"{found['frames_per_day']:,.0f} frames per day (encoding and greedy generation)."
        )
    if "cores_per_device" in found:
        lines.append(
            f"CPU cores that feed {device}: {found['cores_per_device']:.2g}, at "
            f"{_number(found['decoded_per_second_and_core'])} JPEG frames (1280×720, exact) per second and core."
        )
    if "end_to_end_share" in found:
        lines.append(
            f"JPEG frames in, captions out: {_number(found['end_to_end_per_second'])} frames/s, "
            f"{found['end_to_end_share']:.0%} of the slower of JPEG decoding and captioning alone."
        )
    return "\n".join(lines)
