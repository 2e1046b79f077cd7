"""The captioner end to end: bytes in, captions out, whatever stands beside a frame."""

from __future__ import annotations

import io
import json
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import framecap
from framecap import Captioner, DecodeOptions, describe_image
from framecap.errors import (
    BridgeMismatchError,
    CaptionerError,
    ChecksumError,
    FrameError,
    MissingFileError,
    PositionLimitError,
    SettingsError,
    StateDictError,
    UnsafePickleError,
    WeightsError,
)
from framecap.model.captioner import CAPTION_BATCH
from framecap.model.captioner_config import check_options
from framecap.model.convert import write_manifest
from framecap.model.devices import choose_device, choose_dtype
from framecap.model.generate import Generator
from framecap.model.ruclip import ImageFeatures

STRATEGIES = {
    "greedy": DecodeOptions(max_new_tokens=12),
    "beam": DecodeOptions(num_beams=3, max_new_tokens=10, length_penalty=0.7),
    "sampling": DecodeOptions(do_sample=True, temperature=1.3, top_k=50, top_p=0.9, max_new_tokens=12, seed=7),
    "penalties": DecodeOptions(repetition_penalty=1.4, no_repeat_ngram_size=2, max_new_tokens=12),
}


def jpeg(seed: int, size: tuple[int, int] = (120, 90)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def captioner(tiny_captioner_dir: Path) -> Captioner:
    return Captioner.from_pretrained(tiny_captioner_dir, device="cpu")


@pytest.fixture(scope="module")
def crossing(tiny_cross_captioner_dir: Path) -> Captioner:
    return Captioner.from_pretrained(tiny_cross_captioner_dir, device="cpu")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["captioner", "crossing"])
def test_a_caption_is_the_same_alone_in_seven_and_in_sixty_four(
    kind: str, strategy: str, request: pytest.FixtureRequest
) -> None:
    captioner, options = request.getfixturevalue(kind), STRATEGIES[strategy]
    frames = [jpeg(seed) for seed in range(64)]
    together = [c.text for c in captioner.caption(frames, options)]
    assert [c.text for c in captioner.caption(frames[20:27], options)] == together[20:27]
    alone = [captioner.caption([frames[i]], options)[0].text for i in (0, 20, 26, 63)]
    assert alone == [together[i] for i in (0, 20, 26, 63)]


def test_a_bad_frame_gets_its_error_and_the_others_their_captions(captioner: Captioner, tmp_path: Path) -> None:
    good = jpeg(1)
    frames = [good, b"", good[: len(good) // 2], b"not an image at all", tmp_path / "absent.jpg", good]
    captions = captioner.caption(frames)
    assert [c.status == "error" for c in captions] == [False, True, True, True, True, False]
    assert [c.error.split(":")[0] for c in captions if c.error] == [
        "empty",
        "truncated",
        "not_an_image",
        "missing",
    ]
    assert captions[0] == captions[5] == captioner.caption([good])[0]


def test_every_form_of_a_frame_gives_the_same_caption(captioner: Captioner, tmp_path: Path) -> None:
    data = jpeg(3)
    (tmp_path / "frame.jpg").write_bytes(data)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    forms = [data, tmp_path / "frame.jpg", str(tmp_path / "frame.jpg"), image, np.asarray(image)]
    assert len(set(captioner.caption(forms))) == 1


def test_a_caption_carries_its_figures(captioner: Captioner) -> None:
    caption = captioner.caption([jpeg(4)], DecodeOptions(max_new_tokens=5))[0]
    assert caption.logprob is not None
    assert caption.min_logprob is not None
    assert caption.min_logprob <= caption.logprob < 0
    assert caption.similarity is not None
    assert -1 <= caption.similarity <= 1
    assert 0 < caption.tokens <= 5
    assert caption.status == ("truncated" if caption.tokens == 5 else "ok")


def test_similarity_is_the_cosine_of_the_embeddings(captioner: Captioner) -> None:
    frames = [jpeg(5), jpeg(6)]
    captions = captioner.caption(frames)
    cosine = (captioner.embed_images(frames) * captioner.embed_texts([c.text for c in captions])).sum(axis=1)
    np.testing.assert_allclose([c.similarity for c in captions], cosine, atol=1e-5)


def test_embeddings_are_unit_rows_of_float32(captioner: Captioner) -> None:
    for rows in (captioner.embed_images([jpeg(1), jpeg(2)]), captioner.embed_texts(["кот", "собака"])):
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    with pytest.raises(FrameError, match="empty"):
        captioner.embed_images([b""])


def test_reranking_puts_the_most_similar_candidate_first(captioner: Captioner) -> None:
    options = DecodeOptions(num_beams=4, num_return_sequences=4, max_new_tokens=8, rerank=True)
    caption = captioner.caption([jpeg(8)], options)[0]
    scores = captioner.embed_texts(list(caption.candidates)) @ captioner.embed_images([jpeg(8)])[0]
    assert caption.text == caption.candidates[0]
    assert list(scores) == sorted(scores, reverse=True)
    assert caption.similarity == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parametrize("one", [jpeg(1), "frame.jpg", Path("frame.jpg"), np.zeros((8, 8, 3), np.uint8)], ids=type)
def test_one_frame_instead_of_a_list_is_an_error_that_says_so(captioner: Captioner, one: object) -> None:
    for read in (captioner.caption, captioner.embed_images, captioner.encoder.preprocess):
        with pytest.raises(SettingsError, match=r"frames is one .* put it in brackets: \[frame\]"):
            read(one)  # type: ignore[operator]


def test_one_text_instead_of_a_list_is_an_error_and_not_an_embedding_per_letter(captioner: Captioner) -> None:
    for read in (captioner.embed_texts, captioner.encoder.tokenize):
        with pytest.raises(SettingsError, match=r"texts is one str.*brackets: \[text\]"):
            read("строка")  # type: ignore[operator]


def test_no_frames_give_no_captions(captioner: Captioner) -> None:
    assert captioner.caption([]) == []
    assert captioner.embed_images([]).shape == (0, captioner.encoder.config.embed_dim)


def test_saving_and_loading_keeps_the_fingerprint(captioner: Captioner, tmp_path: Path) -> None:
    captioner.save_pretrained(tmp_path / "copy")
    assert Captioner.from_pretrained(tmp_path / "copy").fingerprint == captioner.fingerprint
    with pytest.raises(SettingsError, match="not empty"):
        captioner.save_pretrained(tmp_path / "copy")


def test_offline_with_sockets_blocked_a_captioner_loads_and_captions(
    tiny_captioner_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Captioner.from_pretrained(tiny_captioner_dir).caption([jpeg(1)])[0].status != "error"


def test_a_remote_captioner_is_copied_once_by_many_threads(
    tiny_captioner_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    from framecap.storage import local_copy

    fsspec.filesystem("memory").put(str(tiny_captioner_dir), "/bucket/captioner", recursive=True)
    monkeypatch.setenv("FRAMECAP_CACHE", str(tmp_path / "cache"))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(local_copy("memory://bucket/captioner"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert len(set(found)) == 1
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [found[0]]
    assert Captioner.from_pretrained("memory://bucket/captioner").caption([jpeg(1)])[0].status != "error"


# What can be wrong with a captioner directory: how to break it, the error, and what its message must name.
DAMAGE = {
    "missing file": ("remove", MissingFileError, "merges.txt"),
    "changed byte": ("flip", ChecksumError, "bridge.safetensors"),
    "truncated weights": ("cut", WeightsError, "model.safetensors"),
    "missing key": ("drop key", StateDictError, "visual.proj"),
    "unexpected key": ("add key", StateDictError, "visual.surprise"),
    "mis-shaped key": ("reshape key", StateDictError, "visual.class_embedding"),
    "pickle that runs code": ("pickle", UnsafePickleError, "pytorch_model.bin"),
    "bridge of other sizes": ("bridge", BridgeMismatchError, "999"),
    "unknown config key": ("config", CaptionerError, "brigde"),
}


class RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code ran",))


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "encoder" / "pytorch_model.bin", folder / "config.json"
    state, settings = torch.load(weights, weights_only=True), json.loads(config.read_text())
    if how == "remove":
        (folder / "decoder" / "merges.txt").unlink()
    elif how == "flip":
        content = bytearray((folder / "bridge.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "bridge.safetensors").write_bytes(content)
        return  # the manifest stays: this is what it is for
    elif how == "cut":
        path = folder / "decoder" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "drop key":
        torch.save({k: v for k, v in state.items() if k != "visual.proj"}, weights)
    elif how == "add key":
        torch.save({**state, "visual.surprise": torch.zeros(1)}, weights)
    elif how == "reshape key":
        torch.save({**state, "visual.class_embedding": torch.zeros(3)}, weights)
    elif how == "pickle":
        torch.save({**state, "visual.proj": RunsCode()}, weights)
    elif how == "bridge":
        settings["bridge"]["feature_size"] = 999
        config.write_text(json.dumps(settings))
    else:
        config.write_text(json.dumps({**settings, "brigde": {}}))
    write_manifest(folder)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_captioner_is_refused_with_its_own_error(
    name: str, tiny_captioner_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how, error, named = DAMAGE[name]
    folder = tmp_path / "captioner"
    shutil.copytree(tiny_captioner_dir, folder)
    damage(folder, how)
    with pytest.raises(error, match=named):
        Captioner.from_pretrained(folder)
    assert "code ran" not in capsys.readouterr().out


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="num_beams"):
        DecodeOptions.from_dict({"num_beam": 3})


def test_describe_image_uses_the_captioner_of_the_environment(
    tiny_captioner_dir: Path, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAMECAP_CAPTIONER", str(tiny_captioner_dir))
    assert describe_image(jpeg(9)) == captioner.caption([jpeg(9)])[0].text
    with pytest.raises(FrameError, match="not_an_image"):
        describe_image(b"no picture")


def test_the_public_names_are_all_there() -> None:
    assert all(hasattr(framecap, name) for name in framecap.__all__)


def test_options_that_a_captioner_cannot_serve_are_refused_before_its_weights_are_read(
    tiny_captioner_dir: Path,
) -> None:
    check_options(tiny_captioner_dir, DecodeOptions(max_new_tokens=200, rerank=True))
    with pytest.raises(PositionLimitError, match="250"):
        check_options(tiny_captioner_dir, DecodeOptions(max_new_tokens=250))


def test_batches_of_many_frames_run_into_each_other(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[bytes] = [jpeg(seed) for seed in range(40)]
    frames[3] = frames[16] = b"no picture"
    options = DecodeOptions(stop=("а", "о"))  # so that they end at different lengths
    expected = captioner.caption(frames, options)
    assert len({caption.tokens for caption in expected}) > 2
    steps = []
    decode = captioner.decoder.decode_one_token

    def counted(ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        steps.append(len(ids))
        return decode(ids, *rest)

    monkeypatch.setattr(captioner.decoder, "decode_one_token", counted)
    monkeypatch.setattr(captioner, "generator", Generator(captioner.decoder, max_rows=8))
    monkeypatch.setitem(CAPTION_BATCH, "cpu", 8)
    assert captioner.caption(frames, options) == expected
    together = len(steps)
    steps.clear()
    assert [c for start in range(0, 40, 8) for c in captioner.caption(frames[start : start + 8], options)] == expected
    assert together < len(steps)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_frame_that_overflows_is_an_error_of_its_own(
    captioner: Captioner, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [jpeg(seed) for seed in range(6)]
    expected = captioner.caption(frames, STRATEGIES[strategy])
    encode = captioner.features

    @torch.inference_mode()
    def overflowing(pixels: np.ndarray) -> ImageFeatures:
        features = encode(pixels)
        features.pooled[2] = float("inf")
        return features

    monkeypatch.setattr(captioner, "features", overflowing)
    found = captioner.caption(frames, STRATEGIES[strategy])
    assert (found[2].status, found[2].text, found[2].logprob) == ("error", "", None)
    assert (found[2].error or "").startswith("model: the decoder's logits are not finite")
    assert [c for row, c in enumerate(found) if row != 2] == [c for row, c in enumerate(expected) if row != 2]


def test_a_second_gpu_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SettingsError, match="set CUDA_VISIBLE_DEVICES=1 and use cuda"):
        choose_device("cuda:1")


def test_eight_bits_are_for_the_cpu(captioner: Captioner, tiny_captioner_dir: Path) -> None:
    with pytest.raises(SettingsError, match="dtype int8 is for the CPU"):
        choose_dtype("int8", torch.device("cuda"))
    rounded = Captioner.from_pretrained(tiny_captioner_dir, "cpu", "int8")
    assert rounded.encoder.dtype is rounded.decoder.dtype is torch.float32
    assert [c.status for c in rounded.caption([jpeg(1)])] == [c.status for c in captioner.caption([jpeg(1)])]
