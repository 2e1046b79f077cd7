"""python jobs/evaluate_captions.py --captions OUT --references REF: scores of a caption dataset."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under `ray job submit --working-dir .`

from framecap.console import print_anything
from framecap.errors import FramecapError
from framecap.training.evaluate import evaluate, format_table
from framecap.training.settings import EvaluateSettings


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 done, 2 for settings or files that cannot be used."""
    print_anything()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        settings = EvaluateSettings.from_command_line(argv)
        print(format_table(evaluate(settings)))
    except FramecapError as error:
        print(f"evaluate_captions: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
