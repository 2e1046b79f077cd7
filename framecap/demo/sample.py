"""The last step of `make demo`: a sample of the captions just made, where they are, and what to try next."""

from __future__ import annotations

import argparse
import sys

from framecap.errors import FramecapError
from framecap.notebook import read_captions

NEXT_STEPS = """
The captions are Parquet: {captions}
  in Python   pandas.read_parquet("{captions}")
  as a page   .venv/bin/framecap report {captions} --frames {frames} --out {folder}/report.html
  proof       .venv/bin/framecap verify {frames} {captions}
  your own    .venv/bin/framecap pack FOLDER_OR_VIDEO --out my-frames
              .venv/bin/python jobs/caption_frames.py --input-uri my-frames --output-uri my-captions
The bundled captioner knows only its drawn world; README.md, "Real weights", says how to put in ruCLIP and ruGPT3."""


def main(argv: list[str] | None = None) -> int:
    """Print every ``--every``-th caption below ``--out``/captions; 2 when there is nothing to show."""
    parser = argparse.ArgumentParser(description="Show a sample of the demo's captions.")
    parser.add_argument("--out", default="demo-output", help="the demo's folder (default: demo-output)")
    parser.add_argument("--every", type=int, default=6, help="show each n-th frame (default: 6)")
    args = parser.parse_args(argv)
    frames, captions = f"{args.out}/frames", f"{args.out}/captions"
    try:
        rows = read_captions(captions, columns=["frame_id", "caption", "caption_similarity"]).to_pylist()
    except FramecapError as error:
        sys.stderr.write(f"{error}; run `make demo`\n")
        return 2
    sys.stdout.write("\n")
    for row in rows[:: args.every]:
        similarity = row["caption_similarity"]
        score = "" if similarity is None else f"  (similarity {similarity:.2f})"
        sys.stdout.write(f"{row['frame_id']:<24} {row['caption']}{score}\n")
    sys.stdout.write(NEXT_STEPS.format(captions=captions, frames=frames, folder=args.out) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
