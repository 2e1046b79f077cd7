"""The last step of `make demo`: a sample of the captions just made, where they are, and what to try next."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyarrow.compute as pc

from framecap.errors import FramecapError
from framecap.notebook import read_captions

NEXT_STEPS = """
{rows} captions are in {captions}, one Parquet file beside each of {frames}. What to try next:

  look      .venv/bin/framecap report {captions} --frames {frames} --out {folder}/report.html
            and open {folder}/report.html in a browser
  prove     .venv/bin/framecap verify {frames} {captions}
  one       .venv/bin/framecap describe {folder}/frame.jpg
  table     .venv/bin/python -c 'import pandas; print(pandas.read_parquet("{captions}")[["frame_id", "caption"]])'
  yours     .venv/bin/framecap pack FOLDER_OR_VIDEO --out my-frames
            .venv/bin/python jobs/caption_frames.py --input-uri my-frames --output-uri my-captions

The bundled captioner knows only its drawn world. For photographs, put ruCLIP and ruGPT3 in: README.md, "Real weights".
"""


def main(argv: list[str] | None = None) -> int:
    """Print every ``--every``-th caption below ``--out``/captions, and keep one frame as frame.jpg.

    2 when there is nothing to show.
    """
    parser = argparse.ArgumentParser(description="Show a sample of the demo's captions.")
    parser.add_argument("--out", default="demo-output", help="the demo's folder (default: demo-output)")
    parser.add_argument("--every", type=int, default=6, help="show each n-th frame (default: 6)")
    args = parser.parse_args(argv)
    frames, captions = f"{args.out}/frames", f"{args.out}/captions"
    try:
        shown = ["frame_id", "caption", "caption_status", "caption_similarity"]
        rows = read_captions(captions, columns=shown).to_pylist()
        first = read_captions(frames, columns=["image"], filter=pc.field("frame_id") == rows[0]["frame_id"])
    except FramecapError as error:
        sys.stderr.write(f"{error}; run `make demo`\n")
        return 2
    Path(args.out, "frame.jpg").write_bytes(first["image"][0].as_py())
    sys.stdout.write(f"\nEach {args.every}th frame, how similar ruCLIP finds its caption to it, and the caption:\n\n")
    for row in rows[:: args.every]:
        similarity = row["caption_similarity"]
        score = "" if similarity is None else f"{similarity:.2f}"
        sys.stdout.write(f"  {row['frame_id']:<15} {score:>4}  {row['caption'] or row['caption_status']}\n")
    sys.stdout.write(NEXT_STEPS.format(rows=len(rows), captions=captions, frames=frames, folder=args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
