"""The evaluation job end to end on small caption datasets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from framecap import Captioner
from framecap.errors import EvaluationError, SettingsError
from framecap.training.evaluate import evaluate, format_table
from framecap.training.settings import EvaluateSettings

REFERENCES = {
    "a": ["Ночью по мосту едет красный автобус.", "Красный автобус на мосту."],
    "b": ["Чёрная собака бежит по траве."],
    "c": ["Двое детей играют в мяч на пляже."],
    "d": ["Мужчина в синей куртке стоит у дома."],
}


def caption_dataset(folder: Path, captions: dict[Any, str | None], **columns: list[Any]) -> Path:
    """Two shards, as a job would write them, and a state file that is no data."""
    (folder / "day").mkdir(parents=True)
    (folder / "_framecap").mkdir()
    (folder / "_framecap" / "state.parquet").write_bytes(b"not a caption shard")
    table = pa.table({"frame_id": list(captions), "caption": list(captions.values()), **columns})
    pq.write_table(table.slice(0, 2), folder / "one.parquet")
    pq.write_table(table.slice(2), folder / "day" / "two.parquet")
    return folder


def references_jsonl(path: Path, references: dict[str, list[str]] = REFERENCES) -> Path:
    rows = [{"frame_id": i, "references": texts} for i, texts in references.items()]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def settings(**values: Any) -> EvaluateSettings:
    return EvaluateSettings(**{k: str(v) if isinstance(v, Path) else v for k, v in values.items()})


RIGHT = {i: texts[0] for i, texts in REFERENCES.items()}
WRONG = dict(zip(RIGHT, ["Кошка.", "Большой зелёный дом.", "Двое детей.", "Снег и лес зимой."], strict=True))


def test_captions_equal_to_a_reference_get_full_marks(tmp_path: Path) -> None:
    report = evaluate(
        settings(
            captions=caption_dataset(tmp_path / "out", RIGHT),
            references=references_jsonl(tmp_path / "r.jsonl"),
        )
    )
    assert report["scores"]["bleu4"] == pytest.approx(100)
    assert report["scores"]["chrf"] == pytest.approx(100)
    assert report["scores"]["rouge_l"] == pytest.approx(100)
    assert report["frames"] == 4


def test_references_may_come_one_a_row_in_parquet_with_integer_ids(tmp_path: Path) -> None:
    table = pa.table({"frame_id": [1, 1, 2], "caption": ["кот спит", "спящий кот", "дом стоит у реки"]})
    pq.write_table(table, tmp_path / "r.parquet")
    out = caption_dataset(tmp_path / "out", {"1": "спящий кот", "2": "дом у реки"})
    report = evaluate(settings(captions=out, references=tmp_path / "r.parquet"))
    assert report["frames"] == 2
    assert report["best"][0]["references"] == ["дом стоит у реки"] or len(report["best"][0]["references"]) == 2


def test_against_finds_the_better_weights_with_an_interval(tmp_path: Path) -> None:
    ids = [f"{i}-{n}" for n in range(10) for i in REFERENCES]
    references = {i: REFERENCES[i[0]] for i in ids}
    report = evaluate(
        settings(
            captions=caption_dataset(tmp_path / "new", {i: RIGHT[i[0]] for i in ids}),
            against=caption_dataset(tmp_path / "old", {i: WRONG[i[0]] for i in ids}),
            references=references_jsonl(tmp_path / "r.jsonl", references),
            bootstrap_samples=100,
        )
    )
    for name in ("bleu4", "chrf", "rouge_l", "cider_d"):
        difference = report["against"]["difference"][name]
        assert difference["verdict"] == "better", name
        assert difference["difference"] == pytest.approx(report["scores"][name] - report["against"]["scores"][name])
    assert "better" in format_table(report)


def test_a_failed_caption_counts_as_empty_and_is_reported(tmp_path: Path) -> None:
    captions = RIGHT | {"b": None}
    out = caption_dataset(tmp_path / "out", captions, caption_status=["ok", "error", "ok", "truncated"])
    report = evaluate(settings(captions=out, references=references_jsonl(tmp_path / "r.jsonl")))
    assert (report["captions_with_error"], report["captions_truncated"]) == (1, 1)
    assert report["worst"][0]["frame_id"] == "b"
    assert report["scores"]["rouge_l"] == pytest.approx(75)


def test_recorded_similarity_becomes_the_ruclip_score(tmp_path: Path) -> None:
    out = caption_dataset(tmp_path / "out", RIGHT, caption_similarity=[0.2, 0.4, -0.5, 0.6])
    report = evaluate(settings(captions=out, references=references_jsonl(tmp_path / "r.jsonl")))
    assert report["scores"]["ruclip_score"] == pytest.approx(2.5 * (0.2 + 0.4 + 0.6) / 4)
    assert report["scores"]["ref_ruclip_score"] is None


def test_the_captioner_gives_both_clip_scores_as_defined(
    tmp_path: Path, tiny_captioner_dir: Path, shared: Path
) -> None:
    photos = sorted((shared / "photos" / "public").glob("*.*g"))[:4]
    frames = {"frame_id": list(RIGHT), "image": [p.read_bytes() for p in photos]}
    pq.write_table(pa.table(frames), tmp_path / "frames.parquet")
    report = evaluate(
        settings(
            captions=caption_dataset(tmp_path / "out", RIGHT),
            references=references_jsonl(tmp_path / "r.jsonl"),
            captioner=tiny_captioner_dir,
            frames=tmp_path / "frames.parquet",
        )
    )
    captioner = Captioner.from_pretrained(tiny_captioner_dir)
    images = captioner.embed_images([p.read_bytes() for p in photos])
    texts = captioner.embed_texts(list(RIGHT.values()))
    clip = 2.5 * np.maximum((images * texts).sum(axis=1), 0)
    assert report["scores"]["ruclip_score"] == pytest.approx(clip.mean(), abs=1e-5)
    assert report["scores"]["ref_ruclip_score"] == pytest.approx((2 * clip / (clip + 1)).mean(), abs=1e-5)


def test_captions_references_and_report_may_lie_on_any_file_system(tmp_path: Path) -> None:
    here = caption_dataset(tmp_path / "out", RIGHT)
    references = references_jsonl(tmp_path / "r.jsonl")
    fs = fsspec.filesystem("memory")
    fs.put(str(here), "/night/out", recursive=True)
    fs.put(str(references), "/night/r.jsonl")
    places = {"captions": "memory://night/out", "references": "memory://night/r.jsonl"}
    evaluate(settings(**places, against="memory://night/out", output="memory://night/report.json"))
    report = json.loads(fs.cat("/night/report.json"))
    fs.rm("/night", recursive=True)
    assert report["scores"] == evaluate(settings(captions=here, references=references))["scores"]
    assert report["against"]["difference"]["bleu4"]["verdict"] == "no difference shown"


def test_a_frame_captioned_twice_is_an_error_that_names_it(tmp_path: Path) -> None:
    out = caption_dataset(tmp_path / "out", RIGHT)
    pq.write_table(pa.table({"frame_id": ["c"], "caption": ["ещё раз"]}), out / "zzz.parquet")
    with pytest.raises(EvaluationError, match="duplicate frame_id 'c'"):
        evaluate(settings(captions=out, references=references_jsonl(tmp_path / "r.jsonl")))


def test_captions_and_references_in_structs_are_refused_until_a_field_is_named(tmp_path: Path) -> None:
    both = {i: {"en": "x", "ru": texts[0]} for i, texts in REFERENCES.items()}
    out = caption_dataset(tmp_path / "out", both)
    lines = [json.dumps({"frame_id": i, "caption": value}) + "\n" for i, value in both.items()]
    (tmp_path / "r.jsonl").write_text("".join(lines))
    right = references_jsonl(tmp_path / "right.jsonl")
    with pytest.raises(SettingsError, match=r"name the field that holds the text: --caption-column caption\.ru"):
        evaluate(settings(captions=out, references=right))
    with pytest.raises(EvaluationError, match=r"r\.jsonl, line 1: .*--reference-column caption\.ru"):
        evaluate(settings(captions=out, references=tmp_path / "r.jsonl", caption_column="caption.ru"))
    with pytest.raises(SettingsError, match=r"--reference-column caption\.ru"):
        evaluate(settings(captions=out, references=out, caption_column="caption.ru"))
    for references in (tmp_path / "r.jsonl", out):
        wanted = {"caption_column": "caption.ru", "reference_column": "caption.ru"}
        report = evaluate(settings(captions=out, references=references, **wanted))
        assert report["scores"]["bleu4"] == pytest.approx(100)


@pytest.mark.parametrize("value", ["NaN", "7", "[1]", '{"ru": 1}', "true"])
def test_a_reference_that_is_no_text_is_one_line_that_names_it(tmp_path: Path, value: str) -> None:
    (tmp_path / "r.jsonl").write_text(f'{{"frame_id": "a", "reference": {value}}}\n')
    with pytest.raises(EvaluationError, match=r"r\.jsonl, line 1: reference is"):
        evaluate(settings(captions=caption_dataset(tmp_path / "out", RIGHT), references=tmp_path / "r.jsonl"))


@pytest.mark.parametrize("values", [[1, 2, 3, 4], [[["a"]], None, None, None], [True, None, None, None]])
def test_a_caption_column_of_other_types_is_one_line(tmp_path: Path, values: list[Any]) -> None:
    out = caption_dataset(tmp_path / "out", dict(zip(RIGHT, values, strict=True)))
    references = references_jsonl(tmp_path / "r.jsonl")
    if values[0] == [["a"]]:  # lists within lists are texts all the same
        assert evaluate(settings(captions=out, references=references))["frames"] == 4
        return
    with pytest.raises(SettingsError, match="must be text or a list of texts"):
        evaluate(settings(captions=out, references=references))


def test_captions_that_are_not_utf8_are_scored(tmp_path: Path) -> None:
    torn = pa.array(["кот".encode(), "дом".encode()[:-1]]).cast(pa.binary())
    caption = pa.Array.from_buffers(pa.string(), 2, torn.buffers())
    (tmp_path / "out").mkdir()
    pq.write_table(pa.table({"frame_id": ["a", "b"], "caption": caption}), tmp_path / "out" / "x.parquet")
    assert (
        evaluate(settings(captions=tmp_path / "out", references=references_jsonl(tmp_path / "r.jsonl")))["frames"] == 2
    )


def test_frames_without_an_id_match_nothing(tmp_path: Path) -> None:
    out = caption_dataset(tmp_path / "out", {"a": "кот", None: "дом"})
    assert evaluate(settings(captions=out, references=references_jsonl(tmp_path / "r.jsonl")))["frames"] == 1
    (tmp_path / "none.jsonl").write_text('{"frame_id": null, "reference": "дом"}\n')
    with pytest.raises(EvaluationError, match="line 1: frame_id is null"):
        evaluate(settings(captions=out, references=tmp_path / "none.jsonl"))


def test_no_frame_in_common_is_an_error(tmp_path: Path) -> None:
    out = caption_dataset(tmp_path / "out", {"x": "кот", "y": "дом", "z": "лес"})
    with pytest.raises(EvaluationError, match="share no frame_id"):
        evaluate(settings(captions=out, references=references_jsonl(tmp_path / "r.jsonl")))


def test_frames_without_captioner_are_refused() -> None:
    argv = ["--captions", "x", "--references", "y", "--frames", "z"]
    with pytest.raises(SettingsError, match="--captioner"):
        EvaluateSettings.from_command_line(argv)


def test_the_job_prints_a_table_writes_json_and_exits_2_on_a_missing_file(tmp_path: Path) -> None:
    out = caption_dataset(tmp_path / "out", RIGHT)
    command = [sys.executable, "jobs/evaluate_captions.py", "--captions", str(out), "--references"]
    references = str(references_jsonl(tmp_path / "r.jsonl"))
    done = subprocess.run(
        [*command, references, "--output", str(tmp_path / "report.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "CIDEr-D" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["scores"]["bleu4"] == pytest.approx(100)
    failed = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "check the path" in failed.stderr
    assert "Traceback" not in failed.stderr
