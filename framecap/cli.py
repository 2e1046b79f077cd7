"""The `framecap` command. Each subcommand is one call; see ``COMMANDS``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from framecap import __version__
from framecap.console import print_anything
from framecap.errors import FramecapError, SettingsError, StoreUnavailableError
from framecap.manifest import manifest_files
from framecap.storage import is_local

EXIT_OK, EXIT_FAILED, EXIT_SETTINGS, EXIT_SOME_FAILED, EXIT_RUN_AGAIN, EXIT_INTERRUPTED = 0, 1, 2, 3, 75, 130
_REMOTE = "Folders may be URIs (s3://, gs://, abfs://); FRAMECAP_STORAGE_OPTIONS holds their backend's options as JSON."


class _Parser(argparse.ArgumentParser):
    """argparse, but one clear line on standard error instead of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_SETTINGS, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code is 0, 1 (`verify` found faults), 2 (settings), 3 (some inputs failed) or
    75 (a store did not answer: run again).

    ``framecap run`` has the exit codes of the caption job, see ``pipeline/run.py``.
    """
    print_anything()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    try:
        if arguments[:1] == ["run"]:  # its flags are the job's settings, which pydantic-settings parses
            return _run(arguments[1:])
        args = command_parser(command).parse_args(arguments)
        return int(args.run(args))
    except KeyboardInterrupt:
        print("framecap: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, for instance `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except (FramecapError, OSError) as error:
        print(f"framecap: {error}", file=sys.stderr)
        return EXIT_RUN_AGAIN if isinstance(error, StoreUnavailableError) else EXIT_SETTINGS


def command_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of ``framecap``, with the arguments of ``command`` (None: of all).

    What a command needs is imported only for that command, so that ``framecap --help`` answers at once.
    """
    parser = _Parser(prog="framecap", description="Russian descriptions of video frames.", epilog=_REMOTE)
    parser.add_argument("--version", action="version", version=f"framecap {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for name, (text, declare) in COMMANDS.items():
        own = commands.add_parser(name, help=text)
        if command in (None, name):
            declare(own)
    return parser


def _run(argv: list[str]) -> int:
    from framecap.pipeline.run import main as run_job

    return run_job(argv, prog="framecap run")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "The caption job, with the settings of jobs/caption_frames.py."


def _pack_arguments(parser: argparse.ArgumentParser) -> None:
    from framecap import pack

    pack.add_arguments(parser)
    parser.set_defaults(run=pack.run)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    from framecap import verify

    verify.add_arguments(parser)
    parser.set_defaults(run=verify.run)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    from framecap.report import report

    report.add_arguments(parser)
    parser.set_defaults(run=report.run)


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    from framecap import status

    status.add_arguments(parser)
    parser.set_defaults(run=status.run)


def _pairs_arguments(parser: argparse.ArgumentParser) -> None:
    from framecap import pairs

    pairs.add_arguments(parser)
    parser.set_defaults(run=pairs.run)


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    from framecap import search

    search.add_arguments(parser)
    parser.set_defaults(run=search.run)


def _describe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "One Russian sentence per image, on this machine."
    parser.epilog = "Exit code: 0 all described, 2 settings or weights are wrong, 3 an image could not be read."
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--captioner", help="captioner directory or URI (default: $FRAMECAP_CAPTIONER, else bundled)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 or int8 (default: auto)")
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beams; 1 is greedy (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="longest caption (default: 40)")
    parser.add_argument("--json", action="store_true", help="one JSON object per image, with all scores")
    parser.set_defaults(run=_describe)


def _describe(args: argparse.Namespace) -> int:
    from framecap.model.captioner import Captioner, bundled_captioner
    from framecap.model.generate import DecodeOptions

    if remote := [image for image in args.images if not is_local(image)]:
        raise SettingsError(f"{remote[0]} is not a local file; copy it here, or `framecap pack` it for the job")
    options = DecodeOptions(num_beams=args.num_beams, max_new_tokens=args.max_new_tokens)
    uri = args.captioner or os.environ.get("FRAMECAP_CAPTIONER") or bundled_captioner()
    captioner = Captioner.from_pretrained(uri, args.device, args.dtype)
    if captioner.config.notice:
        print(f"framecap: {captioner.config.notice}", file=sys.stderr)
    captions = captioner.caption([Path(image) for image in args.images], options)
    for image, caption in zip(args.images, captions, strict=True):
        if args.json:
            print(json.dumps({"image": image, **dataclasses.asdict(caption)}, ensure_ascii=False))
        elif caption.error is None:
            print(f"{image}: {caption.text}" if len(captions) > 1 else caption.text)
        if caption.error is not None:
            print(f"framecap: {image}: {caption.error}", file=sys.stderr)
    return EXIT_SOME_FAILED if any(caption.status == "error" for caption in captions) else EXIT_OK


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check every file of a captioner against its checksums, load it, and say what it is."
    parser.epilog = "Exit code: 0 it is whole, 2 it is not: the line names the file or the key."
    parser.add_argument("captioner", nargs="?", help="directory or URI (default: $FRAMECAP_CAPTIONER, else bundled)")
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    from framecap.model.captioner import Captioner, bundled_captioner

    uri = str(args.captioner or os.environ.get("FRAMECAP_CAPTIONER") or bundled_captioner())
    captioner = Captioner.from_pretrained(uri, "cpu", "float32")
    files = manifest_files(captioner.manifest, uri)
    encoder, bridge, decoder = captioner.encoder.config, captioner.config.bridge, captioner.decoder.config
    parts = (captioner.encoder, captioner.bridge, captioner.decoder)
    counts = [f"{sum(weight.numel() for weight in part.parameters()) / 1e6:.1f} M parameters" for part in parts]
    layers = ", its layers stand in the decoder" if bridge.kind == "cross_attention" else f", {counts[1]}"
    text = "with" if captioner.encoder.has_text else "without"
    size = sum(entry["size"] for entry in files.values()) / 1e6
    print(
        f"{uri}: whole, {len(files)} files, {size:,.1f} MB, manifest sha256 {captioner.fingerprint}\n"
        f"encoder  {counts[0]}, {encoder.image_resolution} pixels in patches of "
        f"{encoder.vision_patch_size}, {encoder.vision_layers} layers of {encoder.vision_width}, {text} text tower\n"
        f"bridge   {bridge.kind}{layers}\n"
        f"decoder  {counts[2]}, {decoder.n_layer} layers of {decoder.n_embd}, "
        f"{decoder.n_positions} positions"
    )
    return EXIT_OK


def _assemble_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Put an encoder, a decoder and a bridge together, check that they fit, write their checksums."
    parser.add_argument("--encoder", required=True, help="ruCLIP checkpoint directory, or OpenAI's ViT-B-32.pt")
    parser.add_argument("--decoder", required=True, help="ruGPT3 checkpoint directory (transformers layout)")
    parser.add_argument("--bridge", required=True, help="bridge.safetensors, or a ClipCap checkpoint (.pt)")
    parser.add_argument("--config", help="captioner's config.json (default: beside the bridge, or by its tensors)")
    parser.add_argument("--out", required=True, help="the captioner directory to make")
    parser.set_defaults(run=_assemble)


def _assemble(args: argparse.Namespace) -> int:
    from framecap.model.captioner_config import CaptionerConfig
    from framecap.model.convert import assemble

    if args.config and not Path(args.config).is_file():
        raise SettingsError(f"--config {args.config} does not exist; give the bridge's config.json")
    config = CaptionerConfig.from_file(Path(args.config)) if args.config else None
    out = assemble(args.encoder, args.decoder, args.bridge, args.out, config)
    print(f"{out}: a captioner; try `framecap describe IMAGE --captioner {out}`")
    return EXIT_OK


# Name → line in `framecap --help`, and what declares its arguments and the function that runs it.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "run": ("caption frame shards: the job, here or on a Ray cluster", _run_arguments),
    "describe": ("caption image files on this machine", _describe_arguments),
    "check": ("verify a captioner and say what it is made of", _check_arguments),
    "assemble": ("encoder + decoder + bridge → a captioner directory", _assemble_arguments),
    "pack": ("images, folders or video files → frame shards", _pack_arguments),
    "verify": ("prove that every frame of IN is in OUT once, in order", _verify_arguments),
    "report": ("one self-contained report.html of a run", _report_arguments),
    "status": ("how far an output is, what failed, who works on it", _status_arguments),
    "pairs": ("image-caption pairs of many forms → Parquet for training", _pairs_arguments),
    "search": ("frames of an output that fit a query in words", _search_arguments),
}


if __name__ == "__main__":
    sys.exit(main())
