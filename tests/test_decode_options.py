"""Options that cannot be are refused by name, value and what is known."""

from __future__ import annotations

import json

import pytest

from framecap.errors import SettingsError
from framecap.model.decode_options import DecodeOptions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beam": 5}, "'num_beam'; did you mean 'num_beams'.*known: num_beams, length_penalty"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2.5}, r"num_beams is 2\.5; it must be int"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; it must be true or false"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": -1.0}, r"repetition_penalty is -1\.0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"length_penalty": -25.0}, r"length_penalty is -25\.0; with max_new_tokens = 40 .* between -18 and 18"),
        ({"length_penalty": 1e300, "max_new_tokens": 1}, "length_penalty is 1e[+]300"),
        ({"stop": [""]}, "stop is"),
        ({"num_beams": 2, "do_sample": True}, "do_sample with num_beams = 2"),
        ({"num_return_sequences": 3}, "num_return_sequences = 3 is more than num_beams = 1"),
    ],
)
def test_an_impossible_option_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DecodeOptions.from_dict(values)


def test_options_survive_json() -> None:
    options = DecodeOptions(num_beams=3, length_penalty=2, stop=(".", "!"), no_repeat_ngram_size=2)
    assert DecodeOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_one_stop_text_may_stand_without_a_list() -> None:
    assert DecodeOptions.from_dict({"stop": "."}).stop == (".",)
