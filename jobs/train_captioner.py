"""Train a captioner: python jobs/train_captioner.py --encoder E --decoder D --pairs P --out O."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under `ray job submit --working-dir .`

from framecap.console import print_anything
from framecap.errors import FramecapError
from framecap.training.run import train_captioner
from framecap.training.settings import TrainSettings


def main(argv: list[str] | None = None) -> int:
    """Train and print where the captioner is; 0 done, 2 for settings, data or disk that do not allow it,
    130 after Ctrl-C.
    """
    print_anything()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = TrainSettings.from_command_line(argv)
        train_captioner(settings)
        print(settings.out)
    except FramecapError as error:
        print(f"train_captioner: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_captioner: interrupted; start the same command again to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
