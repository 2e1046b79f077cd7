"""pack: the same sources give the same shards; a video gives the expected frames at the expected times."""

from __future__ import annotations

import argparse
import io
import os
import socket
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import ENDLESS_EPS
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


def packed_every_second(clip: Path, out: Path) -> tuple[int, list[str]]:
    result = pack.pack([str(clip)], str(out), pack.PackOptions(Selection("every", 1)))
    return result.frames, [entry.error for entry in result.unreadable]


@pytest.mark.parametrize("suffix", ["mkv", "ts", "avi", "flv"])
def test_a_video_cut_short_gives_its_whole_frames_and_is_listed(tmp_path: Path, suffix: str) -> None:
    clip = encode(tmp_path / f"clip.{suffix}", [index * 5 % 250 for index in range(100)])
    assert packed_every_second(clip, tmp_path / "whole") == (10, [])
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2 + 50])
    frames, errors = packed_every_second(clip, tmp_path / "cut")
    assert 1 <= frames < 10
    assert [error.partition(":")[0] for error in errors] == ["truncated"]


@pytest.mark.parametrize("suffix", ["ts", "avi", "mp4"])  # Matroska resumes at the next cluster, at times unnoticed
def test_a_video_damaged_in_the_middle_gives_what_can_be_decoded_and_is_listed(tmp_path: Path, suffix: str) -> None:
    clip = encode(tmp_path / f"clip.{suffix}", [index * 5 % 250 for index in range(100)])
    data = clip.read_bytes()
    third, sixth = len(data) // 3, len(data) // 6
    noise = np.random.default_rng(3).integers(0, 256, sixth, np.uint8).tobytes()
    clip.write_bytes(data[:third] + noise + data[third + sixth :])
    frames, errors = packed_every_second(clip, tmp_path / "out")
    assert frames >= 3
    assert [error.partition(":")[0] for error in errors] == ["truncated"]


def test_a_video_with_longer_sound_or_begun_between_key_frames_is_whole(tmp_path: Path) -> None:
    clip = encode(tmp_path / "clip.ts", [index * 5 % 250 for index in range(60)], key_every=20)
    data = clip.read_bytes()
    (tmp_path / "begun.ts").write_bytes(data[len(data) // 188 // 3 * 188 :])
    frames, errors = packed_every_second(tmp_path / "begun.ts", tmp_path / "begun")
    assert frames >= 3
    assert errors == []
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        video, sound = container.add_stream("mpeg4", rate=FPS), container.add_stream("aac", rate=8000, layout="mono")
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        for _ in range(20):
            container.mux(video.encode(av.VideoFrame.from_image(drawn_frame(90))))
        container.mux(video.encode())
        for _ in range(60):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            container.mux(sound.encode(silence))
        container.mux(sound.encode())
    assert packed_every_second(tmp_path / "sound.mkv", tmp_path / "sound") == (2, [])


def test_timestamps_of_a_variable_frame_rate_are_the_frames_own(tmp_path: Path) -> None:
    times = [0, 100, 250, 1000, 1040, 2900, 3000, 3100]
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_image(drawn_frame(index * 20))
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    pack.pack([str(tmp_path / "clip.mkv")], str(tmp_path / "out"))
    table = rows(tmp_path / "out")
    assert table["timestamp_ms"].to_pylist() == [0, 1000, 2900, 3000]
    assert table["frame_index"].to_pylist() == [0, 3, 5, 6]


def test_videos_without_frames_are_listed_and_leave_no_row(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    (folder / "empty.mp4").write_bytes(b"")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with av.open(str(folder / "none.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.start_encoding()
    encode(folder / "good.mp4", [90] * 5)
    result = pack.pack([str(folder)], str(tmp_path / "out"))
    assert rows(tmp_path / "out")["frame_id"].to_pylist() == ["good/000000"]
    assert sorted(Path(entry.uri).name for entry in result.unreadable) == ["empty.mp4", "none.mp4", "sound.mp4"]
    assert next(entry.error for entry in result.unreadable if "empty.mp4" in entry.uri) == "empty: zero bytes"


def test_names_in_russian_and_equal_names_in_two_folders_stay_apart(tmp_path: Path) -> None:
    for name in ("лето/кадр 1.jpg", "зима/кадр 1.jpg"):
        path = tmp_path / "архив" / name
        path.parent.mkdir(parents=True)
        drawn_frame(40).save(path)
    for name in ("лето/ролик.mp4", "зима/ролик.mp4", "зима/ролик.mkv"):
        encode(tmp_path / "архив" / name, [40] * 3)
    pack.pack([str(tmp_path / "архив")], str(tmp_path / "out"))
    assert rows(tmp_path / "out")["frame_id"].to_pylist() == [
        "зима/кадр 1.jpg", "зима/ролик.mkv/000000", "зима/ролик.mp4/000000", "лето/кадр 1.jpg", "лето/ролик/000000",
    ]  # fmt: skip


def test_a_list_of_files_is_taken_from_a_file(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{pictures}/b/2.png\n{pictures}/top.webp\n")
    parser = argparse.ArgumentParser()
    pack.add_arguments(parser)
    assert pack.run(parser.parse_args([f"@{tmp_path}/list.txt", "--out", str(tmp_path / "out")])) == 0
    assert rows(tmp_path / "out")["frame_id"].to_pylist() == ["2.png", "top.webp"]


def test_a_pack_killed_half_way_leaves_whole_shards_only_and_can_be_run_again(tmp_path: Path) -> None:
    folder, out = tmp_path / "archive", tmp_path / "out"
    folder.mkdir()
    for index in range(400):
        Image.effect_noise((300, 300), 80).save(folder / f"{index:04d}.jpg")
    command = [sys.executable, "-m", "framecap.cli", "pack", str(folder), "--out", str(out), "--shard-mb", "0.3"]
    child = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while len(list(out.glob("frames-*.parquet"))) < 3:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    child.wait(10)
    (out / f".frames-00009.parquet.{'0' * 32}.tmp").write_bytes(b"half")
    kept = rows(out).num_rows
    assert 0 < kept < 400
    with pytest.raises(SettingsError, match=r"may have been broken off; --overwrite"):
        pack.pack([str(folder)], str(out))
    pack.pack([str(folder)], str(out), pack.PackOptions(shard_mb=0.3, overwrite=True))
    assert rows(out).num_rows == 400
    assert [path.name for path in out.iterdir() if path.suffix != ".parquet"] == []


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


def test_a_name_that_is_not_utf8_and_a_loop_of_links_cost_only_themselves(tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "дача").mkdir(parents=True)
    Image.new("RGB", (32, 24), "red").save(source / "дача" / "ok.jpg")
    (source / "дача" / "again").symlink_to("..")
    (source / "dead.jpg").symlink_to("nowhere.jpg")
    torn = os.fsencode(source) + b"/" + "снимок.jpg".encode("cp1251")
    Path(os.fsdecode(torn)).write_bytes((source / "дача" / "ok.jpg").read_bytes())
    result = pack.pack([str(source)], str(tmp_path / "out"))
    assert pq.read_table(result.shards[0])["frame_id"].to_pylist() == ["дача/ok.jpg"]
    assert sorted(Path(entry.uri).name for entry in result.unreadable) == [r"\xf1\xed\xe8\xec\xee\xea.jpg", "dead.jpg"]
    assert all(str(entry.error).encode() for entry in result.unreadable)


PLAYLISTS = {
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\nfile://{film}\n#EXT-X-ENDLIST\n",
    "hls.ts": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\n{host}/seg.ts\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile {film}\n",
    "beside.mp4": "ffconcat version 1.0\nfile private.mp4\n",
    "dash.mp4": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>{host}/dash.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5414 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
}


def test_playlists_and_session_descriptions_open_no_other_file_or_port(tmp_path: Path) -> None:
    folder, film = tmp_path / "films", tmp_path / "private.mp4"
    folder.mkdir()
    encode(film, [90] * 5)
    encode(folder / "private.mp4", [90] * 5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        for name, text in PLAYLISTS.items():
            host = f"http://127.0.0.1:{server.getsockname()[1]}"
            (folder / name).write_text(text.format(film=film, host=host))
        result = pack.pack([str(folder)], str(tmp_path / "out"))
        with pytest.raises(TimeoutError):
            server.accept()
    assert rows(tmp_path / "out")["frame_id"].to_pylist() == ["private/000000"]
    assert sorted(Path(entry.uri).name for entry in result.unreadable) == sorted(PLAYLISTS)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with a picture, a link within it, links out of it, a loop and a pipe."""
    outside, folder = tmp_path / "outside", tmp_path / "pictures"
    outside.mkdir()
    folder.mkdir()
    for path in (outside / "private.png", folder / "ok.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "again.png").symlink_to("ok.png")
    (folder / "link.png").symlink_to(outside / "private.png")
    (folder / "disk2").symlink_to(outside)
    (folder / "loop").symlink_to(".")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_links_out_of_a_folder_and_pipes_are_listed(linked: Path, tmp_path: Path) -> None:
    result = pack.pack([str(linked)], str(tmp_path / "out"))
    assert rows(tmp_path / "out")["frame_id"].to_pylist() == ["again.png", "ok.png"]
    assert [Path(entry.uri).name for entry in result.unreadable] == ["disk2", "link.png", "pipe.png"]
    assert "--follow-links" in result.unreadable[0].error


def test_links_are_followed_on_request(linked: Path, tmp_path: Path) -> None:
    result = pack.pack([str(linked)], str(tmp_path / "out"), pack.PackOptions(follow_links=True))
    ids = rows(tmp_path / "out")["frame_id"].to_pylist()
    assert ids == ["again.png", "disk2/private.png", "link.png", "ok.png"]
    assert [Path(entry.uri).name for entry in result.unreadable] == ["pipe.png"]


def test_an_eps_picture_starts_no_ghostscript(tmp_path: Path) -> None:
    (tmp_path / "eps.jpg").write_bytes(ENDLESS_EPS)
    result = pack.pack([str(tmp_path / "eps.jpg")], str(tmp_path / "out"))
    assert [entry.error.partition(":")[0] for entry in result.unreadable] == ["not_an_image"]
