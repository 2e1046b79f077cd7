"""cluster.yaml is what Ray's cluster launcher accepts, and says what the README says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import fillout_defaults, validate_config

CLUSTER = Path(__file__).parent.parent / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return content


def test_it_validates_against_rays_own_schema(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    faults = [fault.message for fault in jsonschema.Draft7Validator(schema).iter_errors(cluster)]
    assert faults == []


def test_it_validates_as_the_launcher_does_it_with_defaults_filled_in(cluster: dict[str, Any]) -> None:
    filled = fillout_defaults({**cluster, "provider": {"type": "aws", "region": "eu-central-1"}})
    validate_config(filled)


def test_workers_scale_from_zero_and_the_head_takes_no_frames(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert kinds[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    workers = [kind for name, kind in kinds.items() if name != cluster["head_node_type"]]
    assert [kind["min_workers"] for kind in workers] == [0, 0]
    assert sorted("GPU" in kind["resources"] for kind in workers) == [False, True]
