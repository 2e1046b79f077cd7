"""The decoder equals transformers' GPT-2 on the same weights, and refuses what it cannot use."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from framecap.errors import (
    BridgeMismatchError,
    CaptionerError,
    MissingFileError,
    PositionLimitError,
    StateDictError,
    UnsafePickleError,
    WeightsError,
)
from framecap.model.bpe import GptTokenizer
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig
from framecap.model.weights import read_state_dict, write_state_dict

DATA = Path(__file__).parent / "data"

SHAPES = {
    "gelu_new": {},
    "relu with its own inner size": {"activation": "relu", "n_inner": 48},
    "gelu, one head": {"activation": "gelu", "n_head": 1},
    "attention scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "attention not scaled": {"scale_attn_weights": False, "eps": 1e-3},
}


@pytest.fixture
def published(tmp_path: Path, data: Path) -> Path:
    """A copy of the tiny ruGPT3 checkpoint that a test may spoil."""
    return Path(shutil.copytree(data / "rugpt3-tiny", tmp_path / "rugpt3"))


def random_decoder(**changes: object) -> RuGpt:
    torch.manual_seed(0)
    config = RuGptConfig(vocab_size=61, n_positions=32, n_embd=16, n_layer=3, n_head=4)
    model = RuGpt.from_config(replace(config, **changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def reference_of(model: RuGpt) -> GPT2LMHeadModel:
    config = GPT2Config(**model.config.to_json(), add_cross_attention=model.config.cross_attention)
    reference = GPT2LMHeadModel(config).eval()
    reference.load_state_dict(model.published_state() | {"lm_head.weight": model.wte.weight})
    return reference


def logits(model: RuGpt, inputs: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, T, V] of ``inputs`` [B, T, E] without a cache."""
    return model.logits(model.hidden_train(inputs, memory))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_equal_those_of_transformers_for_any_gpt2_shape(shape: str) -> None:
    model = random_decoder(**SHAPES[shape])
    inputs = torch.randn(3, 9, 16)
    expected = reference_of(model)(inputs_embeds=inputs).logits
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cross_attention_logits_equal_those_of_transformers() -> None:
    model = random_decoder(cross_attention=True)
    inputs, memory = torch.randn(3, 6, 16), torch.randn(3, 5, 16)
    expected = reference_of(model)(inputs_embeds=inputs, encoder_hidden_states=memory).logits
    actual = logits(model, inputs, memory=memory)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_token_by_token_through_the_cache_gives_the_logits_of_one_whole_pass() -> None:
    model = random_decoder(cross_attention=True)
    ids, prefix, memory = torch.randint(0, 61, (2, 4)), torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    whole = logits(model, torch.cat((prefix, model.embed(ids)), 1), memory=memory)
    cache = model.new_cache(slots=2, entries=7, memory_len=5)
    found = [model.prefill(prefix, memory, cache, first_slot=0)]
    for step in range(4):
        cache.start_step(slice(0, 2), 3, torch.full((2,), 1 + step), None, 1 + step)
        found.append(model.decode_one_token(ids[:, step, None], torch.full((2,), 3 + step), cache)[:, 0])
    torch.testing.assert_close(torch.stack(found, 1), whole[:, 2:], atol=1e-5, rtol=1e-5)


def test_the_cache_keeps_a_slot_whole_when_it_moves() -> None:
    cache = random_decoder(cross_attention=True).new_cache(slots=3, entries=4, memory_len=2)
    blocks = [cache.keys, cache.values, cache.memory_keys, cache.memory_values]
    for value, block in enumerate(blocks, 1):
        block[:, 2] = value
    cache.move(torch.tensor([2]), torch.tensor([0]), length=2)
    found = [cache.keys[:, 0, :2], cache.values[:, 0, :2], cache.memory_keys[:, 0], cache.memory_values[:, 0]]
    assert [tensor.unique().tolist() for tensor in found] == [[1.0], [2.0], [3.0], [4.0]]


@torch.no_grad()
def test_the_published_layout_loads_with_the_logits_of_transformers(data: Path) -> None:
    model = RuGpt.from_pretrained(data / "rugpt3-tiny")
    reference = GPT2LMHeadModel.from_pretrained(data / "rugpt3-tiny").eval()
    ids = torch.tensor([model.tokenizer.encode("Собака бежит по снегу.")])
    expected = reference(ids).logits
    torch.testing.assert_close(logits(model, model.embed(ids)), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_pickle_with_old_attention_buffers_loads_with_and_without_the_prefix(
    published: Path, data: Path, prefix: str
) -> None:
    state = load_file(published / "model.safetensors")
    state = {name.replace("transformer.", prefix): tensor for name, tensor in state.items()}
    state[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.uint8)
    state[f"{prefix}h.1.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state[f"{prefix}wte.weight"]
    torch.save(state, published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    loaded, expected = RuGpt.from_pretrained(published), RuGpt.from_pretrained(data / "rugpt3-tiny")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def spoil(directory: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("key", "tensor", "field"),
    [
        ("transformer.h.1.ln_2.bias", None, "missing"),
        ("transformer.h.7.ln_2.bias", torch.zeros(64), "unexpected"),
        ("transformer.ln_f.weight", torch.zeros(63), "mis_shaped"),
    ],
)
def test_a_key_that_does_not_fit_is_named(published: Path, key: str, tensor: torch.Tensor | None, field: str) -> None:
    spoil(published, **{key: tensor})
    with pytest.raises(StateDictError, match=key) as caught:
        RuGpt.from_pretrained(published)
    assert key in getattr(caught.value, field)[0]


def test_an_output_matrix_of_its_own_is_refused(published: Path) -> None:
    spoil(published, **{"lm_head.weight": torch.zeros(2008, 64)})
    with pytest.raises(WeightsError, match="tied"):
        RuGpt.from_pretrained(published)


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code ran",))


def test_a_pickle_that_wants_to_run_code_is_refused(published: Path) -> None:
    (published / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload()}, published / "pytorch_model.bin")
    with pytest.raises(UnsafePickleError, match=r"pytorch_model\.bin"):
        RuGpt.from_pretrained(published)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_special_ids_come_from_the_tokenizer_and_a_warning_says_where_the_config_differs(
    published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(published / "config.json", bos_token_id=50256, eos_token_id=50257)
    with caplog.at_level(logging.WARNING):
        config = RuGpt.from_pretrained(published).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert "eos_token_id = 50257, the tokenizer says 2; the tokenizer wins" in caplog.text


def test_special_ids_that_agree_give_no_warning(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    RuGpt.from_pretrained(published)
    assert caplog.text == ""


def test_without_a_special_tokens_map_the_tokens_of_rugpt3_are_known_by_name(published: Path) -> None:
    (published / "special_tokens_map.json").unlink()
    (published / "tokenizer_config.json").unlink()
    assert RuGpt.from_pretrained(published).config.eos_token_id == 2


def test_a_special_token_may_be_given_as_an_object_and_stand_among_the_added_tokens(published: Path) -> None:
    edit(published / "special_tokens_map.json", eos_token={"content": "<end>", "lstrip": False})
    (published / "added_tokens.json").write_text(json.dumps({"<end>": 2000}))
    tokenizer = GptTokenizer.from_pretrained(published)
    assert (tokenizer.special_id("eos_token"), len(tokenizer)) == (2000, 2001)


def test_a_tokenizer_that_outgrows_the_embedding_is_refused(published: Path) -> None:
    edit(published / "special_tokens_map.json", eos_token="<end>")
    (published / "added_tokens.json").write_text(json.dumps({"<end>": 2000}))
    edit(published / "config.json", vocab_size=2000)
    with pytest.raises(CaptionerError, match=r"id 2000.*vocab_size 2000"):
        RuGpt.from_pretrained(published)


def test_an_ordinary_token_beyond_the_embedding_is_refused_before_a_text_holds_it(published: Path) -> None:
    state = {name: tensor for name, tensor in read_state_dict(published).items() if name != "lm_head.weight"}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:1500].clone()
    write_state_dict(published / "model.safetensors", state)
    edit(published / "config.json", vocab_size=1500)
    with pytest.raises(CaptionerError, match=r"has id 1999, beyond the decoder's vocab_size 1500"):
        RuGpt.from_pretrained(published)


def test_a_bos_beyond_the_embedding_is_refused_where_captions_begin_with_it(published: Path) -> None:
    vocabulary = {f"[{token}]" if token == "<s>" else token: n for token, n in json.loads(
        (published / "vocab.json").read_text()).items()}  # fmt: skip
    (published / "vocab.json").write_text(json.dumps(vocabulary))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (published / name).unlink()
    edit(published / "config.json", bos_token_id=50256)
    RuGpt.from_pretrained(published)
    with pytest.raises(CaptionerError, match="bos_token_id = 50256, beyond"):
        RuGpt.from_pretrained(published, cross_attention=True)


def test_padding_truncation_and_dropout_left_in_tokenizer_json_are_not_obeyed(published: Path) -> None:
    """transformers saves with the vocabulary what the last padded call asked for."""
    reference = AutoTokenizer.from_pretrained(published)
    reference(["а", "б"], padding="max_length", max_length=12, truncation=True)
    reference.save_pretrained(published)
    for name in ("vocab.json", "merges.txt"):
        (published / name).unlink(missing_ok=True)
    saved = json.loads((published / "tokenizer.json").read_text())
    assert saved["padding"]
    assert saved["truncation"]
    edit(published / "tokenizer.json", model=saved["model"] | {"dropout": 0.5})
    tokenizer, fresh = GptTokenizer.from_pretrained(published), AutoTokenizer.from_pretrained(DATA / "rugpt3-tiny")
    for text in ("кот", "Белая кошка сидит в поле и смотрит на дом у реки"):
        assert tokenizer.encode(text) == fresh(text)["input_ids"]


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_damaged_tokenizer_files_are_one_clear_error(published: Path, name: str) -> None:
    if name == "tokenizer.json":
        (published / "vocab.json").unlink()
    (published / name).write_text('{"а": ')
    with pytest.raises(WeightsError, match="tokenizer files cannot be read"):
        GptTokenizer.from_pretrained(published)


def test_a_checkpoint_without_its_tokenizer_says_which_file_is_missing(published: Path) -> None:
    (published / "merges.txt").unlink()
    with pytest.raises(MissingFileError, match=r"merges\.txt"):
        RuGpt.from_pretrained(published)


@pytest.mark.parametrize(
    "text",
    ["Собака бежит по снегу.", "  два  пробела\n", "", "ёлка, 25 шт. 🙂", "abc</s>где", "Ёж — «колючий»…"],
)
def test_token_ids_and_text_equal_those_of_transformers(data: Path, text: str) -> None:
    reference = AutoTokenizer.from_pretrained(data / "rugpt3-tiny")
    tokenizer = GptTokenizer.from_pretrained(data / "rugpt3-tiny")
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    expected = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(ids) == expected


def test_every_token_is_known_by_its_bytes(data: Path) -> None:
    tokenizer = GptTokenizer.from_pretrained(data / "rugpt3-tiny")
    pieces = tokenizer.token_bytes()
    text = "Ёж — «колючий», 25 шт."
    assert b"".join(pieces[index] for index in tokenizer.encode(text)).decode() == text


@torch.no_grad()
def test_what_is_saved_loads_in_transformers_and_here(tmp_path: Path, data: Path) -> None:
    model = RuGpt.from_pretrained(data / "rugpt3-tiny", cross_attention=True)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([model.tokenizer.encode("Кошка спит.")])
    expected = GPT2LMHeadModel.from_pretrained(tmp_path).eval()(ids).logits
    again = RuGpt.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, again.embed(ids)), expected, atol=1e-4, rtol=1e-5)
    assert again.tokenizer.encode("Кошка спит.") == ids[0].tolist()


def test_cross_attention_weights_travel_apart_from_the_decoder(data: Path) -> None:
    source = RuGpt.from_pretrained(data / "rugpt3-tiny", cross_attention=True)
    target = RuGpt.from_pretrained(data / "rugpt3-tiny", cross_attention=True)
    state = source.cross_attention_state()
    target.load_cross_attention_state(state, "bridge.safetensors")
    assert all(name.startswith("decoder.crossattention.") for name in state)
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in source.state_dict().items())


def test_a_missing_cross_attention_key_is_named() -> None:
    model = random_decoder(cross_attention=True)
    state = model.cross_attention_state()
    del state["decoder.crossattention.1.q_attn.bias"]
    with pytest.raises(StateDictError, match=r"decoder\.crossattention\.1\.q_attn\.bias"):
        model.load_cross_attention_state(state, "bridge.safetensors")


def test_more_positions_than_the_decoder_has_are_refused_with_both_numbers() -> None:
    with pytest.raises(PositionLimitError, match=r"10 .* 30 .* 40.*n_positions = 32"):
        random_decoder().check_positions(10, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"activation_function": "swiglu"}, "swiglu.*gelu_new"),
        ({"n_head": 5}, "64 is not divisible by n_head 5"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_by_value(
    published: Path, changes: dict[str, object], message: str
) -> None:
    edit(published / "config.json", **changes)
    with pytest.raises(CaptionerError, match=message):
        RuGpt.from_pretrained(published)


def test_a_decoder_with_cross_attention_asks_for_its_memory() -> None:
    with pytest.raises(BridgeMismatchError, match="memory"):
        logits(random_decoder(cross_attention=True), torch.randn(1, 2, 16))


def test_gradients_reach_the_inputs_and_every_weight() -> None:
    model = random_decoder(cross_attention=True)
    inputs, memory = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 3, 16)
    logits(model, inputs, memory=memory).logsumexp(-1).sum().backward()
    assert inputs.grad is not None
    assert all(parameter.grad is not None for parameter in model.parameters())
