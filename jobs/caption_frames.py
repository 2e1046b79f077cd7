"""Caption frame shards on a Ray cluster: ``python jobs/caption_frames.py --input-uri IN --output-uri OUT``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under `ray job submit --working-dir .`

from framecap.pipeline.run import main

if __name__ == "__main__":
    sys.exit(main())
