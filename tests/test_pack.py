"""pack: the same sources give the same shards; a video gives the expected frames at the expected times."""

from __future__ import annotations

import argparse
import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from framecap import pack
from framecap.errors import SettingsError
from framecap.video import Selection

FPS = 10


def drawn_frame(shade: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    picture = Image.new("RGB", size, (shade, 255 - shade, 128))
    ImageDraw.Draw(picture).rectangle((4, 4, 20, 20), fill=(255 - shade, shade, 0))
    return picture


def encode(path: Path, shades: list[int], key_every: int = 10) -> Path:
    """A clip of ``FPS`` frames a second, each of one shade, a key frame every ``key_every`` frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": str(key_every), "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for index, shade in enumerate(shades):
            frame = av.VideoFrame.from_image(drawn_frame(shade))
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rows(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(out.rglob("*.parquet"))])


def shade_of(data: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[40:, 40:, 0].mean())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    for name in ("b/2.png", "b/10.jpg", "a/1.jpg", "top.webp"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn_frame(40, (50, 30)).save(path)
    (folder / "notes.txt").write_text("not a frame")
    (folder / ".hidden.jpg").write_bytes(b"x")
    return folder


def test_a_folder_packs_in_path_order_with_its_paths_as_ids(pictures: Path, tmp_path: Path) -> None:
    result = pack.pack([str(pictures)], str(tmp_path / "out"))
    table = rows(tmp_path / "out")
    assert table["frame_id"].to_pylist() == ["a/1.jpg", "b/10.jpg", "b/2.png", "top.webp"]
    assert table["video_id"].to_pylist() == ["a", "b", "b", "archive"]
    assert table["frame_index"].to_pylist() == [0, 0, 1, 0]
    assert set(table["width"].to_pylist()) == {50}
    assert set(table["height"].to_pylist()) == {30}
    assert result.frames == 4
    assert not result.unreadable


def test_images_are_stored_as_they_are(pictures: Path, tmp_path: Path) -> None:
    pack.pack([str(pictures)], str(tmp_path / "out"))
    assert rows(tmp_path / "out")["image"][0].as_py() == (pictures / "a/1.jpg").read_bytes()


def test_packing_twice_gives_the_same_rows_and_shards(pictures: Path, tmp_path: Path) -> None:
    options = pack.PackOptions(shard_mb=0.001)
    names = []
    for out in ("one", "two"):
        result = pack.pack([str(pictures)], str(tmp_path / out), options)
        names.append([Path(uri).name for uri in result.shards])
    assert names[0] == names[1]
    assert len(names[0]) > 1
    assert rows(tmp_path / "one").equals(rows(tmp_path / "two"))


def test_what_cannot_be_read_is_listed_and_the_rest_goes_on(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(whole, "JPEG")
    (pictures / "a/0-cut.jpg").write_bytes(whole.getvalue()[:-2000])
    (pictures / "a/0-empty.png").write_bytes(b"")
    (pictures / "a/0-text.mp4").write_text("no video")
    parser = argparse.ArgumentParser()
    pack.add_arguments(parser)
    assert pack.run(parser.parse_args([str(pictures), "--out", str(tmp_path / "out")])) == 3
    assert rows(tmp_path / "out").num_rows == 4
    errors = capsys.readouterr().err
    assert "0-cut.jpg: truncated" in errors
    assert "0-empty.png: empty" in errors
    assert "0-text.mp4: not_an_image" in errors


def test_every_n_seconds_takes_the_expected_frames_and_timestamps(tmp_path: Path) -> None:
    shades = [index * 5 for index in range(50)]
    pack.pack(
        [str(encode(tmp_path / "clip.mp4", shades))],
        str(tmp_path / "out"),
        pack.PackOptions(Selection("every", 1.5)),
    )
    table = rows(tmp_path / "out")
    assert table["timestamp_ms"].to_pylist() == [0, 1500, 3000, 4500]
    assert table["frame_index"].to_pylist() == [0, 15, 30, 45]
    assert table["frame_id"].to_pylist() == [f"clip/{index:06d}" for index in (0, 15, 30, 45)]
    for data, index in zip(table["image"].to_pylist(), (0, 15, 30, 45), strict=True):
        assert shade_of(data) == pytest.approx(shades[index], abs=4)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_key_frames_are_those_the_encoder_placed(tmp_path: Path, suffix: str) -> None:
    clip = encode(tmp_path / f"clip.{suffix}", [index * 5 for index in range(40)], key_every=12)
    pack.pack([str(clip)], str(tmp_path / "out"), pack.PackOptions(Selection("key")))
    table = rows(tmp_path / "out")
    assert table["frame_index"].to_pylist() == [0, 12, 24, 36]
    assert table["timestamp_ms"].to_pylist() == [0, 1200, 2400, 3600]
    assert [round(shade_of(data) / 60) for data in table["image"].to_pylist()] == [0, 1, 2, 3]


def test_scene_changes_are_the_cuts_and_not_the_slow_fades(tmp_path: Path) -> None:
    shades = [10 + index for index in range(20)] + [220] * 15 + [90] * 15
    pack.pack(
        [str(encode(tmp_path / "clip.mp4", shades, key_every=7))],
        str(tmp_path / "out"),
        pack.PackOptions(Selection("scene", scene_threshold=0.1)),
    )
    assert rows(tmp_path / "out")["frame_index"].to_pylist() == [0, 20, 35]


def test_a_video_cut_short_gives_its_whole_frames_and_is_listed(tmp_path: Path) -> None:
    clip = encode(tmp_path / "clip.ts", [index * 5 % 250 for index in range(100)])
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    result = pack.pack([str(clip)], str(tmp_path / "out"), pack.PackOptions(Selection("every", 1)))
    assert 2 <= result.frames < 10


def test_a_video_filmed_upright_is_packed_upright(tmp_path: Path) -> None:
    clip = encode(tmp_path / "clip.mp4", [200] * 5)
    data = clip.read_bytes()
    track = data.index(b"tkhd")
    identity, clockwise = (struct.pack(">4i", *values) for values in ((1 << 16, 0, 0, 0), (0, 1 << 16, 0, -1 << 16)))
    matrix = data.index(identity, track)
    # The matrix is a b u c d v x y w; a quarter turn clockwise has b = 1, c = -1.
    clip.write_bytes(data[:matrix] + clockwise + struct.pack(">i", 0) + data[matrix + 20 :])
    pack.pack([str(clip)], str(tmp_path / "out"))
    row = rows(tmp_path / "out").to_pylist()[0]
    assert (row["width"], row["height"]) == (64, 96)
    pixels = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")).astype(int)
    assert pixels[12, 52, 0] < 100  # the square of the top left corner is now at the top right
    assert pixels[12, 12, 0] > 150


def test_two_sources_of_one_name_are_refused(pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other/1.jpg"
    other.parent.mkdir()
    drawn_frame(1).save(other)
    with pytest.raises(SettingsError, match=r"share the id '1\.jpg'"):
        pack.pack([str(pictures / "a/1.jpg"), str(other)], str(tmp_path / "out"))


def test_a_folder_that_holds_shards_is_refused_unless_overwritten(pictures: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    pack.pack([str(pictures)], out, pack.PackOptions(shard_mb=0.001))
    with pytest.raises(SettingsError, match="--overwrite"):
        pack.pack([str(pictures)], out)
    result = pack.pack([str(pictures)], out, pack.PackOptions(overwrite=True))
    assert len(result.shards) == len(list(Path(out).iterdir())) == 1
