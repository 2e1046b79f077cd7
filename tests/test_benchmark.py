"""The benchmark's contestants do the same work, and its report says what was measured. No timings asserted."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from framecap.bench import peers
from framecap.bench.frames import PICTURES, make_frames
from framecap.bench.host import by_module, chunk_blocks, instant_captioner, profiled
from framecap.bench.measure import Ceilings, Contestant, Row, Stopwatch, Work
from framecap.bench.random_captioner import (
    DECODERS,
    ENCODERS,
    MAX_LENGTH,
    MEAN_LENGTH,
    draw_lengths,
    random_decoder,
    random_prefixes,
)
from framecap.bench.roofline import encode_work, generate_work
from framecap.bench.stages import CLIPCAP
from framecap.bench.subject import EIGHT_BITS, NO_PEERS, Bench, typical
from framecap.bench.table import DECODING, OWN_ROWS, format_sizing, format_table, sizing
from framecap.model.captioner import Caption, Captioner, bundled_captioner
from framecap.model.decode_options import DecodeOptions
from framecap.model.generate import Generator, generate
from framecap.model.images import Decode
from framecap.model.rugpt import RuGpt
from framecap.pipeline.records import ActorOptions
from framecap.pipeline.stages import CaptionActor

PROGRAM = Path(__file__).parent.parent / "jobs" / "benchmark.py"
TINY = ["--encoder", "tiny", "--decoder", "tiny", "--frames", "6", "--batches", "2,4", "--beam-frames", "2"]
FEW = [*TINY, "--slow-frames", "2", "--memory-frames", "8", "--repeats", "1", "--device", "cpu"]
CPU = torch.device("cpu")
MISSING = {"ray", "pyarrow", "pydantic", "pydantic-core", "pydantic-settings", "simplejpeg", "pandas"}


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(program: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("benchmark") / "report.json"
    stages = "decode,encode,generate,caption,captioner,memory"
    assert program.main([*FEW, "--stages", stages, "--clock", "cpu", "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_every_stage_is_measured_with_its_peers(report: dict[str, Any]) -> None:
    stages = {row["stage"] for row in report["rows"]}
    assert stages == {
        "decode exact 720p", "decode fast 720p", "decode exact 1080p", "decode fast 1080p", "encode, batch 4",
        "generate greedy, batch 2", "generate greedy, batch 4", "generate beam 5, batch 4", "caption, batch 4",
        "captioner, batch 4", "memory of generation",
    }  # fmt: skip
    with_peers = {row["stage"] for row in report["rows"] if row["peer"]}
    assert stages - with_peers == {"memory of generation"}


def test_all_contestants_give_the_same_pixels_and_tokens(report: dict[str, Any]) -> None:
    shares = {row["agreement"] for row in report["rows"] if row["agreement"] is not None}
    assert shares == {1.0}
    names = {row["contestant"] for row in report["rows"] if row["agreement"] is not None and row["peer"]}
    assert names == {
        "Pillow + torch (ruCLIP's), to float32",
        "transformers.generate, dynamic cache",
        "transformers.generate, static cache",
        "ClipCap's loop",
        "transformers CLIP + generate",
        "Pillow + transformers CLIP + generate",
        "ClipCap's script",
    }


def test_generation_is_compared_at_equal_batch_and_framecaps_own_choice_stands_once(report: dict[str, Any]) -> None:
    def names(stage: str) -> list[str]:
        return [row["contestant"] for row in report["rows"] if row["stage"] == stage]

    both = ["framecap", "transformers.generate, dynamic cache"]
    static = "transformers.generate, static cache"
    assert names("generate greedy, batch 2") == both
    assert names("generate greedy, batch 4") == [*both, static, CLIPCAP, OWN_ROWS, EIGHT_BITS]
    assert names("generate beam 5, batch 4") == [*both, OWN_ROWS, EIGHT_BITS]


def test_framecap_stands_first_with_as_many_rows_as_the_batch(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int | None] = []

    class Recorded(Generator):
        def __init__(self, decoder: RuGpt, max_rows: int | None = None) -> None:
            rows.append(max_rows)
            super().__init__(decoder, max_rows)

    monkeypatch.setattr("framecap.bench.stages.Generator", Recorded)
    assert program.main([*FEW, "--stages", "generate", "--no-static-cache"]) == 0
    assert rows == [2, 4, None, 4, 20, None, 20]  # greedy at 2, at 4 with its own choice and int8; beam 5 at 4


def test_the_report_keeps_every_round_and_sizes_a_cluster(report: dict[str, Any]) -> None:
    assert all(len(row["seconds"]) == report["settings"]["repeats"] for row in report["rows"])
    assert report["sizing"].keys() == {
        "frames_per_second", "frames_per_day", "decoded_per_second_and_core", "cores_per_device",
        "end_to_end_per_second", "end_to_end_share",
    }  # fmt: skip


def test_the_report_says_what_was_really_used_where_no_flag_was_given(program: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    shape = ["--encoder", "tiny", "--decoder", "tiny", "--device", "cpu", "--repeats", "1"]
    assert program.main([*shape, "--stages", "decode", "--json", str(file)]) == 0
    settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
    used = {
        "stages": ["decode"], "frames": 64, "batches": [8, 32], "beam_frames": 16, "slow_frames": 8,
        "memory_frames": 512, "threads": 1, "device": "cpu", "dtype": "float32", "no_static_cache": False,
    }  # fmt: skip
    assert settings.items() >= used.items()
    assert {name for name, value in settings.items() if value is None} == {"captioner", "pictures"}


def test_the_help_names_the_defaults_of_both_devices(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, flag in (("frames", "--frames"), ("beam_frames", "--beam-frames"), ("memory_frames", "--memory-frames")):
        of_flag = text.split(f"{flag} N ", 1)[1].split("--", 1)[0]
        cpu, gpu = (program.AMOUNTS[device][name] for device in ("cpu", "cuda"))
        assert f"(default: {cpu}; " in of_flag
        assert f"GPU {gpu})" in of_flag


def test_the_job_runs_on_the_random_captioner(program: ModuleType, ray_cluster: None, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert program.main([*FEW, "--stages", "job", "--json", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["contestant"] for row in rows] == [
        "framecap job, all differ",
        "framecap job, every frame twice",
        "framecap captioner, without Ray",
    ]


def bare_machine(folder: Path) -> list[str]:
    """Link torch, transformers, Pillow and what they require into ``folder``; only transformers' command line
    (by typer) asks for one of the packages that are to be missing."""
    known: dict[str, importlib.metadata.Distribution] = {}
    names = ["torch", "transformers", "pillow", "numpy", "safetensors", "tokenizers"]
    while names:
        name = canonicalize_name(names.pop())
        if name in known or name in MISSING:
            continue
        known[name] = importlib.metadata.distribution(name)
        wanted = [Requirement(text) for text in known[name].requires or []]
        names += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    for distribution in known.values():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return sorted(known)


def test_a_bare_pytorch_machine_runs_every_stage_but_the_job(tmp_path: Path) -> None:
    assert not MISSING & set(bare_machine(tmp_path))
    stages = "decode,encode,generate,caption,captioner,memory"
    arguments = ["benchmark.py", *FEW, "--stages", stages]
    code = f"import sys, runpy; sys.path.append({str(tmp_path)!r}); sys.argv[:] = {arguments!r};"
    code += f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", code]  # without this environment's own packages
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "frames per day" in done.stdout
    missing = subprocess.run([*command[:-1], code.replace(stages, "job")], capture_output=True, text=True, timeout=240)
    assert missing.returncode != 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages", "decode,encodr"], "--stages: 'encodr' is unknown; known: decode, encode, generate"),
        (["--batches", "8,none"], "--batches is '8,none'; give numbers from 1 on"),
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["--pictures", "/nowhere", "--stages", "decode"], "--pictures /nowhere holds no pictures"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
    ],
)
def test_wrong_settings_end_with_one_line(
    program: ModuleType, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert program.main([*FEW, *flags]) == 2
    assert message in capsys.readouterr().err


def test_drawn_lengths_have_the_stated_mean_and_limit() -> None:
    lengths = draw_lengths(20_000).float()
    assert abs(float(lengths.mean()) - MEAN_LENGTH) < 0.2
    assert int(lengths.max()) == MAX_LENGTH
    assert torch.equal(draw_lengths(50, seed=3), draw_lengths(50, seed=3))


def test_captions_of_the_random_decoder_have_lengths_drawn_for_it() -> None:
    decoder = random_decoder(DECODERS["tiny"], prefix_length=10)
    drawn = draw_lengths(decoder.config.vocab_size)
    found = generate(decoder, random_prefixes(decoder, 24, 10), None, DecodeOptions())
    near = [abs(len(c.tokens) - int(drawn[c.tokens[0]])) <= 1 for [c] in found]
    assert sum(near) >= 22
    assert len({len(c.tokens) for [c] in found}) > 5


@pytest.mark.parametrize("bridge", ["linear", "transformer"])
def test_frames_get_captions_of_different_lengths_whatever_the_bridge(
    program: ModuleType, bridge: str, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    assert program.main([*FEW, "--bridge", bridge, "--stages", "captioner", "--json", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert {row["agreement"] for row in rows if row["contestant"] != DECODING} == {1.0}


def test_a_captioner_with_a_memory_is_measured_without_peers_that_cannot_read_it(
    program: ModuleType, tmp_path: Path
) -> None:
    file, stages = tmp_path / "report.json", "encode,generate,caption,captioner"
    real = ["--captioner", bundled_captioner(), "--stages", stages, "--json", str(file)]
    assert program.main([*FEW, *real]) == 0
    rows = [row for row in json.loads(file.read_text(encoding="utf-8"))["rows"] if row["stage"] != "encode, batch 4"]
    assert not [row for row in rows if row["peer"]]
    firsts = [row for row in rows if row["contestant"] == "framecap"]
    assert len(firsts) == 5
    assert all(NO_PEERS in row["note"] for row in firsts)


def test_a_real_captioner_is_compared_with_its_peers(
    program: ModuleType, tiny_captioner_dir: Path, tmp_path: Path
) -> None:
    file, stages = tmp_path / "report.json", "generate,caption,captioner"
    real = ["--captioner", str(tiny_captioner_dir), "--stages", stages, "--json", str(file)]
    assert program.main([*FEW, *real]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert {row["agreement"] for row in rows if row["peer"]} == {1.0}


def test_clipcaps_loop_and_transformers_agree_with_three_beams_and_without() -> None:
    decoder = random_decoder(DECODERS["tiny"], prefix_length=4)
    prefixes, model = random_prefixes(decoder, 5, 4), peers.gpt2(decoder)
    greedy = peers.transformers_generate(model, prefixes, 2)
    assert peers.clipcap_generate(model, prefixes) == greedy
    assert [c.tokens for [c] in generate(decoder, prefixes, None, DecodeOptions())] == greedy
    beams = generate(decoder, prefixes, None, DecodeOptions(num_beams=3))
    assert [c.tokens for [c] in beams] == peers.transformers_generate(model, prefixes, 3, num_beams=3)


def test_contestants_take_turns_and_a_different_result_shows() -> None:
    turns: list[str] = []

    def run(name: str) -> list[int]:
        turns.append(name)
        return [1, 2 if name == "ours" else 3]

    contestants = [Contestant(name, 2, lambda name=name: run(name), result=list) for name in ("ours", "theirs")]
    rows = Stopwatch(2, "wall", CPU).compare("stage", contestants)
    assert turns == ["ours", "theirs", "theirs", "ours"]
    assert [row.agreement for row in rows] == [1.0, 0.5]


def test_a_peer_that_fails_gets_a_row_that_says_why_and_the_rest_goes_on() -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\n| Tried to allocate 20 GiB")

    contestants = [
        Contestant("framecap", 2, lambda: [1, 2], peer=False, result=list),
        Contestant("theirs", 2, fail, result=list),
        Contestant("others", 2, lambda: [1, 2], result=list),
    ]
    found = Stopwatch(2, "wall", CPU).compare("stage", contestants)
    ours, theirs, others = (Ceilings(1.0, 1.0).mark(row, Work(1.0)) for row in found)
    assert theirs.note == "failed: OutOfMemoryError: CUDA out of memory. / Tried to allocate 20 GiB"
    assert (theirs.frames_per_second, theirs.ratio, theirs.seconds, theirs.agreement) == (None, None, (), None)
    assert others.agreement == 1.0
    assert len(others.seconds) == len(ours.seconds) == 2
    assert "failed: OutOfMemoryError" in format_table([ours, theirs, others])


def test_on_a_gpu_memory_is_what_a_contestant_adds_its_warm_up_included(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, peak = 0, 0

    def reset(device: torch.device) -> None:
        nonlocal peak
        peak = allocated

    def take(mib: int, keep: int) -> None:
        nonlocal allocated, peak
        peak = max(peak, allocated + mib * 2**20)
        allocated += keep * 2**20

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    kept: list[int] = []

    def ours() -> None:  # 50 MiB, 40 of which stay for the rounds to come
        take(10 if kept else 50, 0 if kept else 40)
        kept.append(1)

    contestants = [Contestant("framecap", 1, ours, peer=False), Contestant("theirs", 1, lambda: take(20, 0))]
    rows = Stopwatch(2, "wall", torch.device("cuda")).compare("stage", contestants)
    assert [row.peak_mib for row in rows] == [50, 20]
    assert len(kept) == 3


@pytest.mark.parametrize("captioner", [[], ["--captioner", bundled_captioner()]])
def test_memory_is_that_of_the_captioners_own_batches(
    program: ModuleType, captioner: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioned: list[tuple[int, int]] = []
    caption = Captioner.caption

    def counted(self: Captioner, frames: list[np.ndarray], options: DecodeOptions) -> list[Caption]:
        captioned.append((id(self), len(frames)))
        return caption(self, frames, options)

    monkeypatch.setattr(Captioner, "caption", counted)
    assert program.main([*FEW, *captioner, "--stages", "memory"]) == 0
    assert [frames for _, frames in captioned] == [8, 64]


def test_what_was_measured_is_kept_when_framecap_itself_fails(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(self: Captioner, pixels: object) -> None:
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(Captioner, "features", fail)
    file = tmp_path / "report.json"
    with pytest.raises(RuntimeError, match="no kernel image"):
        program.main([*FEW, "--stages", "decode,encode", "--json", str(file)])
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert {row["stage"].split()[0] for row in rows} == {"decode"}


def test_operations_are_those_of_the_published_shapes() -> None:
    # 145 tokens through 85 million weights, twice, and attention: 25 GFLOP (b32-384).
    assert encode_work(ENCODERS["b32-384"], 32, 4).operations == pytest.approx(25.6e9, rel=0.02)
    # 24 positions through 85 million weights and 15 through the vocabulary's 39 million.
    assert generate_work(DECODERS["small"], 10, 14, 32, 1, 4).operations == pytest.approx(5.25e9, rel=0.02)


def test_sizing_counts_the_cores_that_feed_a_device() -> None:
    def row(stage: str, contestant: str, rate: float) -> Row:
        return Row(stage, contestant, rate, 1.0, (1.0,), 1, peer=False)

    rows = [
        row("decode exact 720p", "framecap, to uint8", 100.0),
        row("encode, batch 512", "framecap", 1000.0),
        row("encode, batch 512", "transformers CLIP (SDPA)", 9000.0),
        row("generate greedy, batch 512", "framecap", 800.0),
        row("generate greedy, batch 1024", OWN_ROWS, 1000.0),
    ]
    found = sizing(rows)
    assert found["frames_per_day"] == pytest.approx(500 * 86_400)
    assert found["cores_per_device"] == pytest.approx(5.0)
    assert "GPU: 500 frames/s, 43,200,000 frames per day" in format_sizing(found, "GPU")
    assert "CPU cores that feed GPU: 5" in format_sizing(found, "GPU")
    assert format_sizing(sizing(rows[:1]), "GPU") == ""
    rows += [
        row("caption, batch 512", "framecap", 800.0),
        row("captioner, batch 512", DECODING, 600.0),
        row("captioner, batch 512", "framecap", 540.0),
    ]
    found = sizing(rows)
    assert found["frames_per_second"] == 800  # measured, not computed
    assert found["end_to_end_share"] == pytest.approx(0.9)
    assert "captions out: 540 frames/s, 90% of the slower" in format_sizing(found, "GPU")
    assert len(format_table(rows).splitlines()) == len(rows) + 2


def test_drawn_frames_differ_and_weigh_as_photographs_do() -> None:
    frames = make_frames(3, (640, 360))
    assert len(set(frames)) == 3
    bits = [8 * len(frame) / (640 * 360) for frame in frames]
    assert all(0.5 < b < 4 for b in bits)


def test_many_frames_are_few_pictures_in_bytes_that_all_differ() -> None:
    frames = make_frames(2 * PICTURES + 1, (64, 48))
    assert len(set(frames)) == len(frames)
    pictures = [np.asarray(Image.open(io.BytesIO(frame))) for frame in frames]
    assert len({picture.tobytes() for picture in pictures}) == PICTURES
    assert np.array_equal(pictures[0], pictures[PICTURES])
    assert Image.open(io.BytesIO(frames[PICTURES])).info["comment"] == str(PICTURES).encode()


def test_the_peers_transform_is_the_same_on_several_threads() -> None:
    frames = make_frames(5, (64, 48))
    mean, std = ENCODERS["tiny"].mean, ENCODERS["tiny"].std
    one, three = (peers.ruclip_transform(frames, 32, mean, std, threads) for threads in (1, 3))
    assert torch.equal(one, three)


def test_the_captioner_decodes_on_as_many_threads_as_it_is_given_and_the_decode_stage_on_one(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int]] = []
    pooled, compare = Bench.crop, Stopwatch.compare

    def crop(self: Bench, frames: list[bytes], decode: Decode = "exact", threads: int = 1) -> list[np.ndarray]:
        seen.append((decode, threads))
        return pooled(self, frames, decode, threads)

    def watched(self: Stopwatch, stage: str, contestants: list[Contestant]) -> list[Row]:
        seen.append((stage, torch.get_num_threads()))
        return compare(self, stage, contestants)

    monkeypatch.setattr(Bench, "crop", crop)
    monkeypatch.setattr(Stopwatch, "compare", watched)
    before = torch.get_num_threads()
    try:
        assert program.main([*FEW, "--threads", "2", "--stages", "decode,captioner"]) == 0
    finally:
        torch.set_num_threads(before)
    assert {threads for decode, threads in seen if decode == "fast"} == {1}
    assert ("decode exact 720p", 1) in seen
    assert ("captioner, batch 4", 2) in seen
    assert ("exact", 2) in seen
    assert "2 CPU thread(s)" in capsys.readouterr().out


def test_typical_frames_have_short_and_long_captions_as_all_have() -> None:
    assert typical([9, 1, 5, 3, 7, 2, 8, 4, 6, 40], 2) == [3, 6]
    assert typical([3, 1, 2], 8) == [0, 1, 2]


def test_the_host_stage_runs_the_actor_on_captions_of_drawn_lengths(tmp_path: Path) -> None:
    options = ActorOptions("", str(tmp_path), "f" * 64, DecodeOptions(), batch_size=64)
    actor = CaptionActor(options, instant_captioner(64, 64))
    with profiled() as profiles:
        records = [pickle.loads(actor(block)["record"][0].as_py()) for block in chunk_blocks(64, 3, 64)]
    assert [record.statuses for record in records] == [{"ok": 64}] * 3
    assert sum(record.tokens for record in records) / 192 == pytest.approx(MEAN_LENGTH, abs=2)
    assert {path.name for path in tmp_path.iterdir()} == {record.fragment for record in records}
    assert {"pipeline/stages.py", "pipeline/chunk.py", "pipeline/fragments.py"} <= set(by_module(profiles))
