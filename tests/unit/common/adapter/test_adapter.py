import json
import pickle
import struct

import pytest
import torch

from common.adapter import adapter, ranks
from common.errors import ModelError, WireError
from common.frame.records import TensorSpec
from common.run import packing, trainable

A, B = "layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight"
SPECS = (TensorSpec(A, (2, 3)), TensorSpec(B, (4, 2)))
TENSORS = {A: torch.linspace(-1, 1, 6).reshape(2, 3), B: torch.linspace(0.123456789, 7, 8).reshape(4, 2)}
ENTRIES = {
    A: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    B: {"dtype": "F32", "shape": [4, 2], "data_offsets": [24, 56]},
}
VALUES = b"".join(TENSORS[name].numpy().tobytes() for name in (A, B))


def assemble(header: object, values: bytes = VALUES) -> bytes:
    """Safetensors bytes around any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def entry(name: str, **changes: object) -> dict[str, object]:
    """The right header with one entry changed."""
    return {**ENTRIES, name: {**ENTRIES[name], **changes}}


def decode(data: bytes):
    return adapter.decode(data, SPECS, dtype="float32")


def test_float32_tensors_survive_to_the_bit():
    found = adapter.decode(adapter.encode(TENSORS, dtype="float32"), SPECS, dtype="float32")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_bfloat16_tensors_are_rounded_once_and_come_back_as_float32():
    found = adapter.decode(adapter.encode(TENSORS, dtype="bfloat16"), SPECS, dtype="bfloat16")
    for name, tensor in TENSORS.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.to(torch.bfloat16).float())


@pytest.mark.parametrize(("dtype", "size"), [("float32", 56), ("bfloat16", 28)])
def test_the_size_of_the_values_is_known_beforehand(dtype, size):
    data = adapter.encode(TENSORS, dtype=dtype)
    (header_size,) = struct.unpack_from("<Q", data)
    assert len(data) - 8 - header_size == adapter.encoded_size(SPECS, dtype=dtype) == size


def test_the_same_tensors_give_the_same_bytes_in_any_order():
    backwards = dict(reversed(TENSORS.items()))
    assert adapter.encode(TENSORS, dtype="float32") == adapter.encode(backwards, dtype="float32")


def test_hand_made_bytes_are_read():
    assert torch.equal(decode(assemble(ENTRIES))[B], TENSORS[B])


def test_a_header_that_declares_an_enormous_size_is_refused():
    with pytest.raises(WireError, match="10000000000"):
        decode(struct.pack("<Q", 10**10) + b"{}")


def test_a_header_over_the_limit_is_refused_though_it_is_there():
    with pytest.raises(WireError, match="limit"):
        decode(assemble(b"{" + b" " * packing.MAX_HEADER_BYTES + b"}"))


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_data_too_short_for_a_header_are_refused(size):
    with pytest.raises(WireError):
        decode(b"\x01" * size)


@pytest.mark.parametrize(
    "header",
    [
        entry(B, data_offsets=[28, 60]),
        entry(B, data_offsets=[20, 52]),
        entry(B, data_offsets=[24, 55]),
        entry(B, data_offsets=[24]),
        entry(B, data_offsets=[24, 56, 56]),
        entry(B, data_offsets=[24.0, 56.0]),
        entry(B, data_offsets=[-8, 24]),
        entry(B, data_offsets=[True, 56]),
        entry(B, data_offsets="24"),
        entry(B, data_offsets=None),
        entry(A, data_offsets=[0, 10**30]),
        {A: {**ENTRIES[A], "data_offsets": [32, 56]}, B: {**ENTRIES[B], "data_offsets": [0, 24]}},
    ],
)
def test_gaps_overlaps_and_odd_offsets_are_refused(header):
    with pytest.raises(WireError):
        decode(assemble(header))


def test_tensors_may_lie_in_another_order_without_gaps():
    header = {A: {**ENTRIES[A], "data_offsets": [32, 56]}, B: {**ENTRIES[B], "data_offsets": [0, 32]}}
    found = decode(assemble(header, VALUES[24:] + VALUES[:24]))
    assert torch.equal(found[A], TENSORS[A])


@pytest.mark.parametrize("values", [VALUES + b"\0", VALUES + VALUES, VALUES[:-1], b""])
def test_trailing_and_missing_bytes_are_refused(values):
    with pytest.raises(WireError):
        decode(assemble(ENTRIES, values))


def test_duplicate_keys_are_refused():
    text = json.dumps(ENTRIES)
    with pytest.raises(WireError, match="strict JSON"):
        decode(assemble((text[:-1] + f', "{A}": ' + json.dumps(ENTRIES[A]) + "}").encode()))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        b'{"a": 7}',
        b'{"a": {}}',
        json.dumps({**ENTRIES, "__metadata__": {"format": "pt"}}).encode(),
        json.dumps(entry(A, more=1)).encode(),
        b"\xef\xbb\xbf" + json.dumps(ENTRIES).encode(),
        json.dumps(ENTRIES).encode("utf-16"),
        json.dumps(ENTRIES).replace("[0, 24]", "[-0, 24]").encode(),
    ],
)
def test_headers_that_are_not_strict_are_refused(header):
    with pytest.raises(WireError):
        decode(assemble(header))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64", "I32", "f32", "", 7, None, ["F32"]])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(WireError):
        decode(assemble(entry(A, dtype=dtype)))


def test_the_dtype_of_the_run_is_the_only_one():
    with pytest.raises(WireError, match="bfloat16"):
        adapter.decode(adapter.encode(TENSORS, dtype="float32"), SPECS, dtype="bfloat16")


@pytest.mark.parametrize("shape", [[3, 2], [6], [2, 3, 1], [1, 2, 3], [], [2, 4], [2**62, 2**62], [10**40]])
def test_another_shape_is_refused_and_both_are_named(shape):
    with pytest.raises(ModelError, match=r"lora_A\.weight: found .*expected \(2, 3\)"):
        decode(assemble(entry(A, shape=shape)))


@pytest.mark.parametrize("shape", [[2.0, 3], ["2", "3"], [True, 3], [-2, -3], "23", 6, None, {"0": 2}])
def test_a_shape_that_is_no_list_of_sizes_is_refused(shape):
    with pytest.raises(WireError, match="shape"):
        decode(assemble(entry(A, shape=shape)))


def test_missing_and_surplus_tensors_are_refused_by_name():
    with pytest.raises(ModelError, match=r"lora_B\.weight: found absent"):
        adapter.decode(adapter.encode({A: TENSORS[A]}, dtype="float32"), SPECS, dtype="float32")
    surplus = {**TENSORS, "lm_head.weight": torch.zeros(2)}
    with pytest.raises(ModelError, match=r"lm_head\.weight: found \(2,\), expected absent"):
        adapter.decode(adapter.encode(surplus, dtype="float32"), SPECS, dtype="float32")


def test_a_peers_names_and_shapes_cannot_put_long_or_unprintable_text_into_a_message():
    odd = {"\x1b[2J" * 9999: {"dtype": "F32", "shape": [1] * 9999, "data_offsets": [0, 4]}}
    with pytest.raises(ModelError) as caught:
        decode(assemble(odd, VALUES[:4]))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    with pytest.raises(WireError) as refused:
        decode(assemble({"\x1b[2J" * 9999: {}}))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38, -1e7])
def test_values_that_no_training_gives_are_refused_by_tensor_and_never_told(value):
    spoilt = {**TENSORS, B: TENSORS[B].index_fill(0, torch.tensor([2]), value)}
    with pytest.raises(ModelError, match=r"lora_B\.weight") as caught:
        adapter.decode(adapter.encode(spoilt, dtype="float32"), SPECS, dtype="float32")
    assert str(caught.value) == (
        f"received adapter: tensor {B} holds NaN, infinity or a value over 1e+06; lower training.learning_rate"
    )


def test_pickle_is_refused():
    for data in (pickle.dumps(TENSORS), b"PK\x03\x04" + bytes(60)):
        with pytest.raises(WireError):
            decode(data)


def test_parameters_are_counted():
    assert adapter.num_parameters(SPECS) == 14
    assert adapter.num_parameters(()) == 0


def test_modules_are_named_once():
    assert adapter.module_names(SPECS) == ["layers.0.q_proj"]


def test_write_then_read_gives_the_same_adapter(engine):
    changed = {name: tensor + 0.5 for name, tensor in engine.initial.items()}
    adapter.write(engine.model, changed)
    found = adapter.read(engine.model)
    assert all(torch.equal(found[name], changed[name]) for name in changed)
    assert adapter.specs(found) == engine.tensor_specs


def test_read_gives_a_copy(engine):
    found = adapter.read(engine.model)
    adapter.write(engine.model, {name: tensor + 1 for name, tensor in found.items()})
    assert all(torch.equal(found[name], engine.initial[name]) for name in found)


def test_write_refuses_an_adapter_of_another_shape_and_leaves_the_model_alone(engine):
    name = engine.tensor_specs[0].name
    wrong = {**engine.initial, name: torch.zeros(1, 1)}
    with pytest.raises(ModelError, match="found \\(1, 1\\)"):
        adapter.write(engine.model, {key: tensor + 1 for key, tensor in wrong.items()})
    assert torch.equal(adapter.read(engine.model)[name], engine.initial[name])


def test_gradients_have_the_new_rank_while_a_graph_of_the_old_one_is_alive(engine):
    tokens = torch.tensor([[5, 6, 7]])
    graphs = []
    for rank in (4, 2, 1, 4):
        tensors = ranks.cut(engine.initial, trainable.at_rank(engine.tensor_specs, rank))
        adapter.write(engine.model, tensors)
        held = engine.model(input_ids=tokens).logits.sum()
        torch.autograd.backward(held, retain_graph=True)
        found = {name: parameter.grad.shape for name, parameter in adapter.parameters(engine.model).items()}
        assert found == {name: tensor.shape for name, tensor in tensors.items()}
        graphs.append(held)
    engine.model.zero_grad()


def test_an_adapter_of_another_rank_takes_the_place_of_the_models_at_the_same_scale(engine):
    generator = torch.Generator().manual_seed(1)
    small = {
        spec.name: 0.1 * torch.randn(spec.shape, generator=generator)
        for spec in trainable.at_rank(engine.tensor_specs, 2)
    }
    ids = torch.arange(12).unsqueeze(0) + 40
    answers = []
    for tensors in (small, ranks.padded(small, engine.initial), engine.initial):
        adapter.write(engine.model, tensors)
        engine.model.eval()
        assert all(torch.equal(found, tensors[name]) for name, found in adapter.read(engine.model).items())
        with torch.no_grad():
            answers.append(engine.model(input_ids=ids).logits)
    assert torch.allclose(answers[0], answers[1], atol=1e-4)
    assert not torch.allclose(answers[0], answers[2], atol=1e-2)  # the control
    name = engine.tensor_specs[0].name
    with pytest.raises(ModelError, match="expected"):
        adapter.write(engine.model, {**engine.initial, name: engine.initial[name][:1]})


def test_names_are_those_under_which_peft_saves(engine, tmp_path):
    from safetensors import safe_open

    engine.model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as saved:
        assert sorted(saved.keys()) == [spec.name for spec in engine.tensor_specs]
