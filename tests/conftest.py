"""What tests share: reference data, a tiny random captioner, and one local Ray cluster a session."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data"
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data() -> Path:
    """tests/data: fixtures that are committed."""
    return DATA


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared: reference vectors and photographs that may not be committed; the test is skipped without."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return folder


@pytest.fixture(scope="session")
def tiny_captioner_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner of tiny shape with random weights: ruCLIP oracle encoder, MLP bridge, two-layer decoder."""
    return make_captioner(tmp_path_factory.mktemp("tiny") / "captioner", "mlp")


@pytest.fixture(scope="session")
def tiny_cross_captioner_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a cross-attention bridge over all patches."""
    return make_captioner(tmp_path_factory.mktemp("cross") / "captioner", "cross_attention")


def make_captioner(out: Path, kind: str, seed: int = 0) -> Path:
    """Assemble a random captioner of tiny shape at ``out``."""
    from framecap.model.bridge import build_bridge
    from framecap.model.bridge_config import BridgeConfig
    from framecap.model.captioner_config import CaptionerConfig
    from framecap.model.convert import assemble
    from framecap.model.rugpt import RuGpt
    from framecap.model.weights import write_state_dict

    encoder, decoder = DATA / "ruclip-vit-b32-tiny", DATA / "rugpt3-tiny"
    work = out.parent / f"{out.name}-parts"
    work.mkdir(parents=True)
    torch.manual_seed(seed)
    crosses = kind == "cross_attention"
    model = RuGpt.from_pretrained(decoder, cross_attention=crosses)
    sizes = json.loads((encoder / "config.json").read_text())
    feature, width = ("patches", sizes["vision_width"]) if crosses else ("pooled", sizes["embed_dim"])
    config = BridgeConfig(kind, width, model.config.n_embd, feature=feature, num_layers=2, num_heads=2)
    bridge = build_bridge(config)
    state = {f"bridge.{name}": tensor for name, tensor in bridge.state_dict().items()}
    write_state_dict(work / "bridge.safetensors", {**state, **model.cross_attention_state()})
    assembled = assemble(encoder, decoder, work / "bridge.safetensors", out, CaptionerConfig(config))
    shutil.rmtree(work)
    return assembled


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session: two cores pretend to be four so that small jobs need not queue."""
    # Ray gives its workers niceness 15; on a busy machine they would hardly start at all.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so
    os.environ["RAY_metrics_report_interval_ms"] = "2000"  # noqa: SIM112
    import ray

    ray.init(num_cpus=4, object_store_memory=300_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of a moto server on loopback; this process and all workers reach it by storage options."""
    from moto.server import ThreadedMotoServer

    from framecap.storage import open_fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRAMECAP_STORAGE_OPTIONS", json.dumps(options))
        open_fs("s3://frames")[0].makedirs("frames", exist_ok=True)  # moto keeps buckets as long as the process
        yield "s3://frames"
    server.stop()
