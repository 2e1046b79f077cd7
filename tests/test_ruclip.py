"""ruCLIP's towers against ruclip 0.0.2's own outputs, transformers' CLIP, and a plain-torch CLIP written out below."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from framecap.bench.transformers_clip import clip_text, clip_vision
from framecap.errors import (
    CaptionerError,
    MissingFileError,
    StateDictError,
    UnsafePickleError,
    WeightsError,
)
from framecap.model.images import normalise
from framecap.model.ruclip import RuClip, RuClipConfig
from framecap.model.weights import read_state_dict, write_state_dict
from framecap.model.yttm import YttmTokenizer

DATA = Path(__file__).parent / "data"
B32 = DATA / "ruclip-vit-b32-tiny"
L14 = DATA / "ruclip-vit-l14-tiny"

# Published config.json of each variant, layers apart (two here): (resolution, patch, vision width, embed_dim,
# text width, text heads).
VARIANTS = {
    "base-patch32-224": (224, 32, 768, 512, 512, 8),
    "base-patch16-224": (224, 16, 768, 512, 512, 8),
    "base-patch32-384": (384, 32, 768, 512, 512, 8),
    "base-patch16-384": (384, 16, 768, 512, 512, 8),
    "large-patch14-224": (224, 14, 1024, 768, 768, 12),
    "large-patch14-336": (336, 14, 1024, 768, 768, 12),
}


@pytest.fixture(params=[B32, L14], ids=["b32", "l14"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def model() -> RuClip:
    return RuClip.from_pretrained(B32)


def expected(checkpoint: Path) -> tuple[dict[str, np.ndarray], list[Path], list[str]]:
    names = json.loads((checkpoint / "expected.json").read_text(encoding="utf-8"))
    images = [checkpoint / "images" / name for name in names["images"]]
    return dict(np.load(checkpoint / "expected.npz")), images, names["texts"]


def plain_tower(
    x: Tensor, state: dict[str, Tensor], prefix: str, layers: int, heads: int, mask: Tensor | None
) -> Tensor:
    """OpenAI's residual attention blocks on x [N, L, W], from the published tensors, without any shortcut."""
    for i in range(layers):
        p = {k.removeprefix(f"{prefix}.{i}."): v for k, v in state.items() if k.startswith(f"{prefix}.{i}.")}
        h = F.layer_norm(x, x.shape[-1:], p["ln_1.weight"], p["ln_1.bias"])
        q, k, v = (h @ p["attn.in_proj_weight"].T + p["attn.in_proj_bias"]).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = (scores if mask is None else scores + mask).softmax(-1)
        h = (weights @ v).transpose(1, 2).flatten(2)
        x = x + h @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
        h = F.layer_norm(x, x.shape[-1:], p["ln_2.weight"], p["ln_2.bias"])
        h = h @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"]
        x = x + (h * torch.sigmoid(1.702 * h)) @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]
    return x


def plain_image(pixels: Tensor, state: dict[str, Tensor], config: RuClipConfig) -> Tensor:
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=config.vision_patch_size).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = x + state["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    heads = config.vision_width // 64
    x = plain_tower(x, state, "visual.transformer.resblocks", config.vision_layers, heads, None)
    x = F.layer_norm(x[:, 0], x.shape[-1:], state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    return x @ state["visual.proj"]


def plain_text(ids: Tensor, state: dict[str, Tensor], config: RuClipConfig) -> Tensor:
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    heads = config.transformer_heads
    x = plain_tower(x, state, "transformer.resblocks", config.transformer_layers, heads, mask)
    x = F.layer_norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    return x[torch.arange(len(x)), torch.where(ids == 3)[1]] @ state["text_projection"]


def normalised(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def copy_checkpoint(source: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("config.json", "bpe.model", "pytorch_model.bin"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


def with_changed_state(target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the b32 checkpoint whose tensors ``change`` has edited in place."""
    copy_checkpoint(B32, target)
    state = read_state_dict(target)
    change(state)
    torch.save(state, target / "pytorch_model.bin")
    return target


def test_pixels_are_those_of_the_reference(checkpoint: Path) -> None:
    want, images, _ = expected(checkpoint)
    pixels = RuClip.from_pretrained(checkpoint).preprocess(images)
    assert pixels.dtype == torch.float32
    assert np.abs(pixels.numpy() - want["pixel_values"]).max() <= 1e-6


def test_ids_are_those_of_the_reference(checkpoint: Path) -> None:
    want, _, texts = expected(checkpoint)
    ids = RuClip.from_pretrained(checkpoint).tokenize(texts)
    assert ids.dtype == torch.int64
    assert (ids.numpy() == want["input_ids"]).all()


def test_image_embeddings_are_those_of_the_reference(checkpoint: Path) -> None:
    want, images, _ = expected(checkpoint)
    model = RuClip.from_pretrained(checkpoint)
    assert np.abs(model.encode_image(model.preprocess(images)).numpy() - want["image_embeds"]).max() <= 1e-4


def test_text_embeddings_are_those_of_the_reference(checkpoint: Path) -> None:
    want, _, texts = expected(checkpoint)
    model = RuClip.from_pretrained(checkpoint)
    assert np.abs(model.encode_text(model.tokenize(texts)).numpy() - want["text_embeds"]).max() <= 1e-4


def test_logits_are_those_of_the_reference(checkpoint: Path) -> None:
    want, images, texts = expected(checkpoint)
    model = RuClip.from_pretrained(checkpoint)
    image = normalised(model.encode_image(model.preprocess(images)))
    text = normalised(model.encode_text(model.tokenize(texts)))
    logits = model.logit_scale.exp() * image @ text.T
    assert np.abs(logits.numpy() - want["logits_per_image"]).max() <= 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_published_variant_computes_what_a_plain_clip_does(variant: str, tmp_path: Path) -> None:
    resolution, patch, width, embed_dim, text_width, text_heads = VARIANTS[variant]
    config = RuClipConfig(
        embed_dim=embed_dim,
        image_resolution=resolution,
        vision_layers=2,
        vision_width=width,
        vision_patch_size=patch,
        vocab_size=700,
        transformer_width=text_width,
        transformer_heads=text_heads,
        transformer_layers=2,
    )
    torch.manual_seed(0)
    RuClip.from_config(config, YttmTokenizer.from_file(B32 / "bpe.model")).save_pretrained(tmp_path)
    state = read_state_dict(tmp_path)
    state = {name: t + 0.05 * torch.randn_like(t) if t.dim() < 2 else t * 2 for name, t in state.items()}
    write_state_dict(tmp_path / "model.safetensors", state)
    model = RuClip.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, resolution, resolution)
    ids = model.tokenize(["Собака бежит по траве.", "кот"])
    image, text = plain_image(pixels, state, config), plain_text(ids, state, config)
    torch.testing.assert_close(model.encode_image(pixels), image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.encode_text(ids), text, atol=1e-4, rtol=1e-4)
    assert model.image_features(pixels).patches.shape == (2, (resolution // patch) ** 2 + 1, width)


def test_text_heads_come_from_the_config(tmp_path: Path) -> None:
    config = RuClipConfig.from_file(B32 / "config.json")
    wider = replace(config, transformer_heads=4)
    assert RuClip.from_config(wider).text.transformer.resblocks[0].attn.heads == 4


@torch.inference_mode()
def test_both_towers_compute_what_those_of_transformers_do(checkpoint: Path) -> None:
    _, images, texts = expected(checkpoint)
    model = RuClip.from_pretrained(checkpoint)
    pixels, ids = model.preprocess(images), model.tokenize(texts)
    reference = clip_vision(model)(pixel_values=pixels)
    features = model.image_features(pixels)
    torch.testing.assert_close(features.pooled, reference.image_embeds, atol=1e-5, rtol=1e-5)
    patches = reference.last_hidden_state
    normed = F.layer_norm(patches, patches.shape[-1:], model.vision.ln_post.weight, model.vision.ln_post.bias)
    torch.testing.assert_close(features.patches, normed, atol=1e-4, rtol=1e-4)
    text = clip_text(model)(input_ids=ids).text_embeds
    torch.testing.assert_close(model.encode_text(ids), text, atol=1e-5, rtol=1e-5)


def cropped(model: RuClip, count: int) -> Tensor:
    side = model.config.image_resolution
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grads", [False, True], ids=["inference", "training"])
def test_raw_pixels_embed_as_normalised_ones_do(checkpoint: Path, grads: bool) -> None:
    model = RuClip.from_pretrained(checkpoint)
    raw = cropped(model, 5)
    with torch.set_grad_enabled(grads):
        found, want = (model.image_features(p) for p in (raw, normalise(raw, model.config.mean, model.config.std)))
    torch.testing.assert_close(found.pooled, want.pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.patches, want.patches, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_in_half_precision_raw_pixels_embed_as_exactly_as_normalised_ones() -> None:
    torch.manual_seed(0)
    config = RuClipConfig(64, 64, 1, 768, 32)
    model = RuClip.from_config(config)
    model.vision.conv1.weight.mul_(torch.logspace(-2, 1, 768)[:, None, None, None])  # small ones and large ones
    raw = cropped(model, 32)
    half = copy.deepcopy(model).half()
    model.vision.conv1.weight.copy_(half.vision.conv1.weight)
    exact = (
        copy.deepcopy(model).double().vision._patch_embeddings(normalise(raw, config.mean, config.std, torch.float64))
    )
    of_raw = half.vision._patch_embeddings(raw).double()
    of_normalised = half.vision._patch_embeddings(normalise(raw, config.mean, config.std, torch.float16)).double()
    error, usual = ((found - exact).square().mean((0, 1)).sqrt() for found in (of_raw, of_normalised))
    assert (error / usual).mean() < 1.1
    assert (error / usual).max() < 2, "nor does a small weight lose more than a large one"


@torch.inference_mode()
def test_weights_that_change_between_two_frames_are_seen(model: RuClip) -> None:
    changed, raw = copy.deepcopy(model), cropped(model, 2)
    changed.encode_image(raw)
    for _ in range(2):
        changed.vision.load_state_dict({name: 0.9 * t for name, t in changed.vision.state_dict().items()}, assign=True)
        want = changed.encode_image(normalise(raw, changed.config.mean, changed.config.std))
        torch.testing.assert_close(changed.encode_image(raw), want, atol=1e-5, rtol=1e-5)


def test_training_computes_what_inference_does(model: RuClip) -> None:
    pixels = torch.randn(5, 3, 96, 96)
    with torch.inference_mode():
        want = model.image_features(pixels)
    found = model.image_features(pixels)
    torch.testing.assert_close(found.pooled, want.pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.patches, want.patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 96, 96, 3), (2, 3, 64, 64)], ids=str)
def test_pixels_of_another_shape_are_refused_with_the_right_one(model: RuClip, shape: tuple[int, ...]) -> None:
    with pytest.raises(CaptionerError, match=r"must be \[3, 96, 96\]"):
        model.encode_image(torch.zeros(shape))


def test_image_features_hold_the_embedding_and_the_normed_patches(model: RuClip) -> None:
    pixels = torch.randn(3, 3, 96, 96)
    features = model.image_features(pixels)
    assert torch.equal(features.pooled, model.encode_image(pixels))
    assert features.patches.shape == (3, 10, 128)
    projected = features.patches[:, 0] @ model.published_state()["visual.proj"]
    torch.testing.assert_close(projected, features.pooled)


def test_an_image_embeds_alike_alone_and_in_a_batch(model: RuClip) -> None:
    pixels = torch.randn(7, 3, 96, 96)
    torch.testing.assert_close(model.encode_image(pixels)[3:4], model.encode_image(pixels[3:4]), atol=1e-5, rtol=0)


def test_long_texts_are_cut_to_the_context(model: RuClip) -> None:
    row = model.tokenize(["слово " * 200])[0]
    assert row.shape == (77,)
    assert row[0] == 2
    assert row[-1] == 3


def test_texts_of_all_lengths_are_read_to_their_ends_and_keep_their_order(model: RuClip) -> None:
    ids = model.tokenize(["слово " * count for count in (1, 40, 8, 200, 3)])
    assert model.text is not None
    ends = (ids == 3).int().argmax(dim=1)
    assert len({int(end) // 16 for end in ends}) > 2, "several buckets"
    whole = model.text(ids, ends)
    torch.testing.assert_close(model.encode_text(ids), whole, atol=1e-5, rtol=1e-5)
    alone = torch.cat([model.encode_text(row[None]) for row in ids])
    torch.testing.assert_close(model.encode_text(ids), alone, atol=1e-5, rtol=1e-5)


def test_ids_without_an_eos_are_refused(model: RuClip) -> None:
    with pytest.raises(CaptionerError, match="<eos>"):
        model.encode_text(torch.tensor([[2, 5, 3], [2, 5, 6]]))


def test_the_published_layout_survives_saving(checkpoint: Path, tmp_path: Path) -> None:
    RuClip.from_pretrained(checkpoint).save_pretrained(tmp_path)
    before, after = read_state_dict(checkpoint), read_state_dict(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())
    again = RuClip.from_pretrained(tmp_path)
    assert again.tokenize(["Кот"]).tolist() == RuClip.from_pretrained(checkpoint).tokenize(["Кот"]).tolist()


def test_a_checkpoint_can_be_saved_over_itself(tmp_path: Path, model: RuClip) -> None:
    model.save_pretrained(tmp_path)
    loaded = RuClip.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 96, 96)
    for twin in (loaded, RuClip.from_pretrained(tmp_path)):
        assert all(
            torch.equal(tensor, twin.published_state()[name]) for name, tensor in model.published_state().items()
        )
        # Not bit for bit: MKL has other kernels where weights lie at other addresses.
        torch.testing.assert_close(twin.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bpe.model", "config.json", "model.safetensors"]


def test_from_config_trains() -> None:
    model = RuClip.from_config(RuClipConfig.from_file(B32 / "config.json"))
    model.encode_image(torch.randn(1, 3, 96, 96)).sum().backward()
    assert model.vision.proj.grad is not None


def test_loaded_weights_are_frozen(model: RuClip) -> None:
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_half_precision_stays_close_to_single(model: RuClip) -> None:
    half = RuClip.from_pretrained(B32, dtype=torch.bfloat16)
    pixels = torch.randn(4, 3, 96, 96)
    cosine = F.cosine_similarity(half.encode_image(pixels).float(), model.encode_image(pixels))
    assert half.dtype == torch.bfloat16
    assert cosine.min() > 0.99


@pytest.mark.parametrize("prefix", ["visual_encoder.model.", "visual.", ""])
def test_the_prototypes_image_tower_is_found_in_openai_layouts(tmp_path: Path, prefix: str, model: RuClip) -> None:
    published = {k: v for k, v in read_state_dict(B32).items() if k.startswith("visual.")}
    state = {prefix + name.removeprefix("visual."): tensor.half() for name, tensor in published.items()}
    if prefix:
        state |= {"logit_scale": torch.tensor(1.0), "text_encoder.model.wte.weight": torch.zeros(3, 2)}
        state |= {"visual_encoder.projection.linear1.weight": torch.zeros(2, 2)} if "model" in prefix else {}
    torch.save(state, tmp_path / "ViT-B32-small.pt")
    prototype = RuClip.from_prototype(tmp_path / "ViT-B32-small.pt")
    want = replace(model.config, vocab_size=0, transformer_width=0, transformer_heads=0, transformer_layers=0)
    assert prototype.config == want
    pixels = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(prototype.encode_image(pixels), model.encode_image(pixels), atol=5e-2, rtol=1e-2)


def test_an_encoder_without_a_text_tower_says_so(tmp_path: Path, model: RuClip) -> None:
    torch.save({k: v for k, v in read_state_dict(B32).items() if k.startswith("visual.")}, tmp_path / "vit.pt")
    RuClip.from_prototype(tmp_path / "vit.pt").save_pretrained(tmp_path / "encoder")
    image_only = RuClip.from_pretrained(tmp_path / "encoder")
    assert not image_only.has_text
    assert model.has_text
    pixels = torch.randn(1, 3, 96, 96)
    assert torch.equal(image_only.encode_image(pixels), model.encode_image(pixels))
    with pytest.raises(CaptionerError, match="no text tower"):
        image_only.tokenize(["кот"])
    with pytest.raises(CaptionerError, match="no text tower"):
        image_only.encode_text(torch.tensor([[2, 3]]))


def test_a_checkpoint_without_an_image_tower_is_refused(tmp_path: Path) -> None:
    torch.save({"gpt.wte.weight": torch.zeros(2, 2)}, tmp_path / "gpt.pt")
    with pytest.raises(WeightsError, match="no image tower"):
        RuClip.from_prototype(tmp_path / "gpt.pt")


def test_a_tokenizer_that_outgrows_the_text_tower_is_refused(tmp_path: Path) -> None:
    tokenizer = YttmTokenizer.from_file(B32 / "bpe.model")
    config = RuClipConfig.from_file(B32 / "config.json")
    RuClip.from_config(replace(config, vocab_size=tokenizer.highest_id + 1), tokenizer)
    with pytest.raises(CaptionerError, match="ids up to 699, beyond the text tower's vocab_size 699"):
        RuClip.from_config(replace(config, vocab_size=tokenizer.highest_id), tokenizer)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    key = "transformer.resblocks.1.attn.in_proj_bias"
    broken = with_changed_state(tmp_path / "c", lambda state: state.pop(key))
    with pytest.raises(StateDictError) as caught:
        RuClip.from_pretrained(broken)
    assert caught.value.missing == [key]
    assert key in str(caught.value)


def test_an_unexpected_key_is_named(tmp_path: Path) -> None:
    broken = with_changed_state(tmp_path / "c", lambda state: state.update({"visual.extra": torch.zeros(1)}))
    with pytest.raises(StateDictError, match=r"unexpected key: visual\.extra"):
        RuClip.from_pretrained(broken)


def test_a_mis_shaped_key_is_named_with_both_shapes(tmp_path: Path) -> None:
    broken = with_changed_state(tmp_path / "c", lambda state: state.update({"visual.proj": torch.zeros(48, 128)}))
    with pytest.raises(StateDictError, match=r"visual\.proj \[48, 128\] \(should be \[128, 48\]\)"):
        RuClip.from_pretrained(broken)


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin", "bpe.model"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    checkpoint = copy_checkpoint(B32, tmp_path / "c")
    (checkpoint / name).unlink()
    with pytest.raises(MissingFileError, match=name.replace(".", r"\.")):
        RuClip.from_pretrained(checkpoint)


@pytest.mark.parametrize("kept", [0, 10, 1000, 1_000_000, -10])
def test_a_truncated_weight_file_is_an_error(tmp_path: Path, kept: int) -> None:
    checkpoint = copy_checkpoint(B32, tmp_path / "c")
    weights = checkpoint / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
        RuClip.from_pretrained(checkpoint)


def test_a_truncated_safetensors_file_is_an_error(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "model.safetensors", {"a": torch.zeros(100)})
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        read_state_dict(tmp_path)


class RunsCode:
    """Unpickling this creates a file: what a hostile checkpoint does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle 2", "bare pickle 5"])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, form: str) -> None:
    checkpoint = copy_checkpoint(B32, tmp_path / "c")
    weights, mark = checkpoint / "pytorch_model.bin", tmp_path / "mark"
    content = {"visual.proj": RunsCode(mark)}
    if form.startswith("bare"):
        weights.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    else:
        torch.save(content, weights, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UnsafePickleError, match="refused"):
        RuClip.from_pretrained(checkpoint)
    assert not mark.exists()


def test_a_checkpoint_of_something_else_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="epoch"):
        read_state_dict(tmp_path / "a.pt")


def test_sharded_weights_are_read_through_their_index(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    write_state_dict(tmp_path / "b.safetensors", {"b": torch.ones(3)})
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(read_state_dict(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("embed_dim", None, "embed_dim"),
        ("vision_width", 100, "multiple of 64"),
        ("vision_layers", -1, "vision_layers=-1"),
    ],
)
def test_an_impossible_config_is_an_error(tmp_path: Path, field: str, value: object, message: str) -> None:
    checkpoint = copy_checkpoint(B32, tmp_path / "c")
    config = json.loads((checkpoint / "config.json").read_text()) | {field: value}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CaptionerError, match=message):
        RuClip.from_pretrained(checkpoint)


def test_everything_loads_and_runs_with_sockets_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    model = RuClip.from_pretrained(B32)
    picture = Image.new("RGB", (40, 30), (200, 10, 10))
    assert model.encode_image(model.preprocess([picture])).shape == (1, 48)
    assert model.encode_text(model.tokenize(["красный"])).shape == (1, 48)
