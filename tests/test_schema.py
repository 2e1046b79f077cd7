"""What a frame shard must have, and what its caption shard then looks like."""

from __future__ import annotations

import pyarrow as pa
import pytest

from framecap.errors import ShardError
from framecap.schema import ExtraColumns, InputColumns, caption_schema, output_schema

FRAMES = pa.schema([("frame_id", pa.string()), ("image", pa.binary()), ("speed", pa.float64())])


def test_the_output_has_the_inputs_columns_less_the_image_then_the_captions() -> None:
    schema = output_schema(FRAMES, InputColumns(), caption_schema())
    assert schema.names[:3] == ["frame_id", "speed", "caption"]
    assert str(schema.field("caption_tokens").type) == "int16"
    assert str(schema.field("caption_logprob").type) == "float"


def test_optional_columns_come_only_on_request() -> None:
    assert "caption_candidates" not in caption_schema().names
    schema = caption_schema(ExtraColumns(candidates=True, image_embedding=512))
    assert str(schema.field("caption_candidates").type) == "list<item: string>"
    assert str(schema.field("image_embedding").type) == "fixed_size_list<item: halffloat>[512]"


def test_the_id_is_kept_even_if_nothing_else_is() -> None:
    assert InputColumns(keep=()).kept(FRAMES) == ["frame_id"]


@pytest.mark.parametrize(
    "image", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])]
)
def test_pictures_may_be_binary_or_hugging_face_structs(image: pa.DataType) -> None:
    InputColumns().check(pa.schema([("frame_id", pa.int64()), ("image", image)]), caption_schema())


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ([("image", pa.binary())], "missing_column"),
        ([("frame_id", pa.string())], "missing_column"),
        ([("frame_id", pa.float32()), ("image", pa.binary())], "wrong_type"),
        ([("frame_id", pa.string()), ("image", pa.int8())], "wrong_type"),
        ([("frame_id", pa.string()), ("image_uri", pa.int8())], "wrong_type"),
        ([("frame_id", pa.string()), ("image", pa.binary()), ("caption", pa.string())], "column_conflict"),
        ([("frame_id", pa.string()), ("image", pa.binary()), ("k", pa.int8()), ("k", pa.int8())], "column_conflict"),
    ],
)
def test_a_shard_that_cannot_be_used_says_why(fields: list[tuple[str, pa.DataType]], kind: str) -> None:
    with pytest.raises(ShardError) as caught:
        InputColumns().check(pa.schema(fields), caption_schema())
    assert caught.value.kind == kind
