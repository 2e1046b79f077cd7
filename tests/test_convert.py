"""Assembling captioners and importing ClipCap's: what comes out must say what the reference says."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from framecap import Captioner, DecodeOptions
from framecap.errors import BridgeMismatchError, MissingFileError, SettingsError, StateDictError, WeightsError
from framecap.model.bridge import build_bridge
from framecap.model.bridge_config import BridgeConfig
from framecap.model.captioner_config import CaptionerConfig
from framecap.model.convert import assemble, clipcap_bridge_config, import_clipcap
from framecap.model.ruclip import ImageFeatures
from framecap.model.rugpt import RuGpt
from framecap.model.weights import read_state_dict, write_state_dict


def test_the_imported_clipcap_checkpoint_gives_the_reference_captions(shared: Path, tmp_path: Path) -> None:
    oracle = shared / "oracle" / "clipcap-mlp"
    out = assemble(
        encoder=shared / "oracle" / "ruclip-vit-b32-tiny",
        decoder=oracle / "rugpt3-tiny",
        bridge=oracle / "clipcap.pt",
        out=tmp_path / "captioner",
    )
    expected = json.loads((oracle / "expected.json").read_text())
    frames = [shared / "photos" / "ru98" / "images" / case["file"] for case in expected["cases"]]
    captions = Captioner.from_pretrained(out, device="cpu").caption(frames, DecodeOptions(max_new_tokens=67))
    assert len(frames) == 98
    assert [c.text for c in captions] == [case["greedy"] for case in expected["cases"]]


def prototype_checkpoint(width: int = 64, resolution: int = 64, patch: int = 32, embed: int = 16) -> dict[str, Tensor]:
    """An image tower as ai-forever/ru-clip's prototype keeps it: OpenAI's keys, half precision."""
    side = resolution // patch
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (side * side + 1, width),
        "proj": (width, embed),
        "conv1.weight": (width, 3, patch, patch),
        "ln_pre.weight": (width,),
        "ln_pre.bias": (width,),
        "ln_post.weight": (width,),
        "ln_post.bias": (width,),
        "transformer.resblocks.0.attn.in_proj_weight": (3 * width, width),
        "transformer.resblocks.0.attn.in_proj_bias": (3 * width,),
        "transformer.resblocks.0.attn.out_proj.weight": (width, width),
        "transformer.resblocks.0.attn.out_proj.bias": (width,),
        "transformer.resblocks.0.ln_1.weight": (width,),
        "transformer.resblocks.0.ln_1.bias": (width,),
        "transformer.resblocks.0.ln_2.weight": (width,),
        "transformer.resblocks.0.ln_2.bias": (width,),
        "transformer.resblocks.0.mlp.c_fc.weight": (4 * width, width),
        "transformer.resblocks.0.mlp.c_fc.bias": (4 * width,),
        "transformer.resblocks.0.mlp.c_proj.weight": (width, 4 * width),
        "transformer.resblocks.0.mlp.c_proj.bias": (width,),
    }
    return {f"visual_encoder.model.{k}": (torch.randn(s) * 0.05).half() for k, s in shapes.items()}


def clipcap_state(decoder: RuGpt, embed: int, prefix_length: int = 10) -> dict[str, Tensor]:
    """What ClipCap's training script saves: gpt.*, clip_project.* and the buffers of old transformers."""
    size = decoder.config.n_embd
    bridge = build_bridge(BridgeConfig("mlp", embed, size, prefix_length=prefix_length))
    state = {f"gpt.{name}": tensor.clone() for name, tensor in decoder.published_state().items()}
    state["gpt.lm_head.weight"] = state["gpt.transformer.wte.weight"]
    for layer in range(decoder.config.n_layer):
        state[f"gpt.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        state[f"gpt.transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return {**state, **{f"clip_project.{k}": v.clone() for k, v in bridge.state_dict().items()}}


def test_the_public_russian_layout_imports_openai_tower_and_all(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = RuGpt.from_pretrained(data / "rugpt3-tiny")
    torch.save(prototype_checkpoint(embed=16), tmp_path / "ViT-B32-small.pt")
    torch.save(clipcap_state(decoder, embed=16), tmp_path / "coco_prefix_latest.pt")
    out = assemble(
        tmp_path / "ViT-B32-small.pt",
        data / "rugpt3-tiny",
        tmp_path / "coco_prefix_latest.pt",
        tmp_path / "captioner",
    )
    frame = data / "ruclip-vit-b32-tiny" / "images" / "00_RGB_640x360.jpg"
    captioner = Captioner.from_pretrained(out)
    caption = captioner.caption([frame])[0]
    with pytest.raises(SettingsError, match="text tower"):
        captioner.caption([frame], DecodeOptions(num_beams=2, num_return_sequences=2, rerank=True))
    assert caption.status in ("ok", "truncated")
    assert caption.similarity is None  # the prototype has no text tower here


@pytest.mark.parametrize("kind", ["mlp", "linear", "transformer"])
def test_the_kind_and_sizes_of_a_mapper_are_read_from_its_tensors(kind: str) -> None:
    config = BridgeConfig(kind, 24, 32, prefix_length=6, clip_length=5, num_layers=3)
    found = clipcap_bridge_config(build_bridge(config).state_dict(), 32, "test")
    sizes = ("kind", "feature_size", "decoder_size", "prefix_length")
    assert [getattr(found, s) for s in sizes] == [getattr(config, s) for s in sizes]
    if kind == "transformer":
        assert (found.clip_length, found.num_layers) == (5, 3)


def test_a_linear_mapper_as_the_notebooks_have_it_is_imported_with_its_values(data: Path, tmp_path: Path) -> None:
    linear = torch.nn.Linear(48, 20 * 64)  # ClipCaptionModel with prefix_length 20: one nn.Linear, no MLP
    state = {f"clip_project.{name}": tensor.detach() for name, tensor in linear.state_dict().items()}
    torch.save(state, tmp_path / "linear.pt")
    out = assemble(data / "ruclip-vit-b32-tiny", data / "rugpt3-tiny", tmp_path / "linear.pt", tmp_path / "out")
    captioner = Captioner.from_pretrained(out, device="cpu")
    pooled = torch.randn(2, 48)
    with torch.inference_mode():
        prefix, _ = captioner.bridge(ImageFeatures(pooled, torch.empty(0)))
    assert prefix is not None
    torch.testing.assert_close(prefix.flatten(1), linear(pooled).detach())


def clipcap_transformer(data: Path, path: Path) -> BridgeConfig:
    """A ClipCap checkpoint of the transformer mapper at ``path``, and what it was trained as."""
    config = BridgeConfig("transformer", 48, 64, 10, clip_length=5, num_layers=2, num_heads=4, normalize_features=True)
    torch.save({f"clip_project.{k}": v for k, v in build_bridge(config).state_dict().items()}, path)
    return config


def test_a_config_says_of_a_clipcap_checkpoint_what_its_tensors_do_not(data: Path, tmp_path: Path) -> None:
    bridge = clipcap_transformer(data, tmp_path / "t.pt")
    asked = CaptionerConfig(bridge, stop=("!",))
    parts = (data / "ruclip-vit-b32-tiny", data / "rugpt3-tiny", tmp_path / "t.pt")
    assert CaptionerConfig.from_file(assemble(*parts, tmp_path / "asked", asked) / "config.json") == asked
    plain = CaptionerConfig.from_file(assemble(*parts, tmp_path / "plain") / "config.json")
    assert (plain.bridge.num_heads, plain.bridge.normalize_features, plain.stop) == (8, False, (".",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_length": 12}, "says prefix_length 12, its tensors say 10"),
        ({"kind": "linear"}, "says kind 'linear', its tensors say 'transformer'"),
        ({"num_layers": 8}, "says num_layers 8, its tensors say 2"),
        ({"feature_size": 512}, "says feature_size 512, its tensors say 48"),
        ({"decoder_size": 768}, "says decoder_size 768, its tensors say 64"),
    ],
)
def test_a_config_that_contradicts_the_tensors_of_a_clipcap_checkpoint_is_refused(
    data: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    bridge = clipcap_transformer(data, tmp_path / "t.pt")
    asked = CaptionerConfig(BridgeConfig.from_dict(bridge.to_dict() | change))
    with pytest.raises(BridgeMismatchError, match=message):
        assemble(data / "ruclip-vit-b32-tiny", data / "rugpt3-tiny", tmp_path / "t.pt", tmp_path / "out", asked)


class Node(nn.Module):
    """A part of a module tree that is built by names."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def as_torchscript(state: dict[str, Tensor], path: Path) -> None:
    """``state`` as the module that OpenAI's ``ViT-B-32.pt`` is: a traced one, whose code torch would compile."""
    root = Node()
    for name, tensor in state.items():
        *parts, last = name.split(".")
        node = root
        for part in parts:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node._modules[part]  # type: ignore[assignment]
        node.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    torch.jit.save(torch.jit.trace(root, torch.zeros(1)), path)


@pytest.mark.filterwarnings("error")
def test_the_torchscript_archive_of_openai_gives_the_tensors_of_its_state_dict(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = {k.replace("visual_encoder.model.", "visual."): v for k, v in prototype_checkpoint().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        as_torchscript(tower | {"text_projection": torch.randn(4, 4)}, tmp_path / "ViT-B-32.pt")
    torch.save(clipcap_state(RuGpt.from_pretrained(data / "rugpt3-tiny"), embed=16), tmp_path / "clipcap.pt")
    out = assemble(tmp_path / "ViT-B-32.pt", data / "rugpt3-tiny", tmp_path / "clipcap.pt", tmp_path / "out")
    found = read_state_dict(out / "encoder")
    assert found.keys() == tower.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tower.items())


def renamed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "DistributedDataParallel": lambda state: renamed("module.", state),
    "torch.compile": lambda state: renamed("_orig_mod.", state),
    "Lightning": lambda state: {"state_dict": renamed("model.", state), "epoch": 1, "optimizer_states": []},
    "model and optimizer": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
    "DeepSpeed, DDP and compile": lambda state: {"module": renamed("module._orig_mod.", state), "dp_world_size": 8},
    "a compiled part": lambda state: {name.replace("gpt.", "gpt._orig_mod."): v for name, v in state.items()},
}


@pytest.mark.parametrize("wrapping", list(WRAPPED))
def test_wrapped_checkpoints_are_unwrapped(data: Path, tmp_path: Path, wrapping: str) -> None:
    state = clipcap_state(RuGpt.from_pretrained(data / "rugpt3-tiny"), embed=48)
    torch.save(WRAPPED[wrapping](state), tmp_path / "x.pt")
    found = read_state_dict(tmp_path / "x.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_bridge_that_is_called_model_keeps_its_names(tmp_path: Path) -> None:
    state = build_bridge(BridgeConfig("mlp", 4, 8)).state_dict()
    write_state_dict(tmp_path / "mlp.safetensors", state)
    assert set(read_state_dict(tmp_path / "mlp.safetensors")) == {
        "model.0.weight", "model.0.bias", "model.2.weight", "model.2.bias",
    }  # fmt: skip


def test_a_prefix_that_nobody_knows_is_named_in_the_error(data: Path, tmp_path: Path) -> None:
    state = clipcap_state(RuGpt.from_pretrained(data / "rugpt3-tiny"), embed=48)
    torch.save(renamed("captioner.net.", state), tmp_path / "x.pt")
    with pytest.raises(StateDictError, match=r"tensors under 'captioner\.net\.'; take that prefix off all names"):
        assemble(data / "ruclip-vit-b32-tiny", data / "rugpt3-tiny", tmp_path / "x.pt", tmp_path / "out")


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("model-00001-of-00001.safetensors", "model.safetensors.index.json"),
        ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
    ],
)
def test_a_decoder_of_one_shard_with_an_index_assembles_and_loads(
    tiny_captioner_dir: Path, data: Path, tmp_path: Path, shard: str, index: str
) -> None:
    decoder = tmp_path / "decoder"
    shutil.copytree(data / "rugpt3-tiny", decoder)
    state = read_state_dict(decoder)
    (decoder / "model.safetensors").unlink()
    if shard.endswith(".bin"):
        torch.save(state, decoder / shard)
    else:
        write_state_dict(decoder / shard, state)
    (decoder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, shard)}))
    bridge = tiny_captioner_dir / "bridge.safetensors"
    out = assemble(data / "ruclip-vit-b32-tiny", decoder, bridge, tmp_path / "out")
    frame = data / "ruclip-vit-b32-tiny" / "images" / "00_RGB_640x360.jpg"
    assert Captioner.from_pretrained(out).caption([frame]) == Captioner.from_pretrained(tiny_captioner_dir).caption(
        [frame]
    )


@pytest.mark.parametrize("part", ["encoder", "decoder", "bridge"])
def test_what_is_wrong_with_a_part_is_said_of_the_file_that_was_given(
    tiny_captioner_dir: Path, data: Path, tmp_path: Path, part: str
) -> None:
    given = tmp_path / "given"
    shutil.copytree(tiny_captioner_dir, given)
    weights = {
        "encoder": given / "encoder" / "pytorch_model.bin",
        "decoder": given / "decoder" / "model.safetensors",
        "bridge": given / "bridge.safetensors",
    }[part]
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError) as caught:
        assemble(given / "encoder", given / "decoder", given / "bridge.safetensors", tmp_path / "out")
    assert str(weights) in str(caught.value)
    assert ".assemble-" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_a_foreign_key_in_a_clipcap_checkpoint_is_named(data: Path, tmp_path: Path) -> None:
    state = {"clip_project.model.0.weight": torch.zeros(4, 4), "optimizer.step": torch.zeros(1)}
    with pytest.raises(StateDictError, match=r"optimizer\.step"):
        import_clipcap(state, data / "rugpt3-tiny", tmp_path, "checkpoint.pt")


def test_assembling_over_something_that_exists_is_refused(tiny_captioner_dir: Path, data: Path) -> None:
    with pytest.raises(SettingsError, match="not empty"):
        assemble(
            data / "ruclip-vit-b32-tiny",
            data / "rugpt3-tiny",
            tiny_captioner_dir / "bridge.safetensors",
            tiny_captioner_dir,
        )


def test_a_failed_assembly_leaves_nothing_behind(tiny_captioner_dir: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(BridgeMismatchError, match="48"):
        assemble(
            data / "ruclip-vit-l14-tiny",
            data / "rugpt3-tiny",
            tiny_captioner_dir / "bridge.safetensors",
            tmp_path / "x",
        )
    with pytest.raises(MissingFileError, match=r"nowhere\.pt"):
        assemble(data / "ruclip-vit-b32-tiny", data / "rugpt3-tiny", tmp_path / "nowhere.pt", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


FULL_SIZE = """
import json, sys, resource, torch
from pathlib import Path
from framecap import Captioner
from framecap.model.bridge import build_bridge
from framecap.model.bridge_config import BridgeConfig
from framecap.model.captioner_config import CaptionerConfig
from framecap.model.convert import assemble
from framecap.model.ruclip import RuClip, RuClipConfig
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig
from framecap.model.weights import write_state_dict
from framecap.model.yttm import YttmTokenizer
from framecap.model.bpe import GptTokenizer
data, out = Path(sys.argv[1]), Path(sys.argv[2])
from dataclasses import replace
encoder = RuClip.from_config(
    RuClipConfig(512, 384, 12, 768, 32, 77, 49408, 512, 8, 12),
    YttmTokenizer.from_file(data / "ruclip-vit-b32-tiny" / "bpe.model"),
)
encoder.save_pretrained(out / "encoder")
del encoder
tiny = RuGpt.from_pretrained(data / "rugpt3-tiny")
config = replace(tiny.config, n_layer=12, n_head=12, n_embd=768, n_positions=2048, vocab_size=50264)
RuGpt.from_config(config, tiny.tokenizer).save_pretrained(out / "decoder")
bridge = BridgeConfig("mlp", 512, 768)
write_state_dict(out / "bridge.safetensors", {f"bridge.{k}": v for k, v in build_bridge(bridge).state_dict().items()})
assemble(out / "encoder", out / "decoder", out / "bridge.safetensors", out / "captioner", CaptionerConfig(bridge))
caption = Captioner.from_pretrained(out / "captioner", device="cpu").caption(
    [data / "ruclip-vit-b32-tiny" / "images" / "08_RGB_1280x720.jpg"]
)[0]
print(json.dumps({"status": caption.status, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def test_a_full_size_captioner_assembles_loads_and_captions_within_8_gib(data: Path, tmp_path: Path) -> None:
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    command = [sys.executable, "-c", FULL_SIZE, str(data), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] in ("ok", "truncated")
    assert result["gib"] < 8


def test_a_decoder_that_only_lends_its_weights_keeps_them(data: Path, tmp_path: Path) -> None:
    decoder = RuGpt.from_pretrained(data / "rugpt3-tiny")
    state = {k: v for k, v in clipcap_state(decoder, embed=48).items() if k.startswith("clip_project.")}
    import_clipcap(state, data / "rugpt3-tiny", tmp_path, "prefix-only.pt")
    kept = read_state_dict(tmp_path / "decoder")["transformer.wte.weight"]
    assert torch.equal(kept, decoder.published_state()["transformer.wte.weight"])
