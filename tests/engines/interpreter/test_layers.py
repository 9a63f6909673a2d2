"""Layers and settings that the ONNX parser never makes, built with TensorRT's own API.

They are the examples of TensorRT's documentation, and each kind of causal mask, of lengths and of
out-of-bounds indices.
"""

import numpy as np
import pytest

from engines.errors import InputError
from engines.interpreter import Network, parsed_from_network
from engines.tensorrt.module import log_of

trt = pytest.importorskip("tensorrt_rtx")
KINDS = {"float32": trt.float32, "int64": trt.int64, "int32": trt.int32, "bool": trt.bool}


def evaluated(make, *arrays):
    """The output of the layer that `make(network, *tensors)` returns; first axes of `arrays` are dynamic."""
    with log_of(trt).collect() as errors:
        builder = trt.Builder(log_of(trt))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        tensors = [network.add_input(f"x{i}", KINDS[a.dtype.name], a.shape) for i, a in enumerate(arrays)]
        layer = make(network, *tensors)
        assert layer is not None, errors
        tensor = layer.get_output(0)
        tensor.name = "y"
        network.mark_output(tensor)
        parsed = parsed_from_network(trt, network, owner=builder)
    return Network(parsed).run({f"x{i}": a for i, a in enumerate(arrays)})["y"]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attended(query, key, value, visible):
    """The definition, one query at a time; `visible` bool [B,S,C]."""
    result = np.zeros(query.shape)
    for b, h, s in np.ndindex(query.shape[:3]):
        keys, values = (
            t[b, h // (query.shape[1] // t.shape[1])][visible[b, s]].astype(np.float64) for t in (key, value)
        )
        powers = np.exp(keys @ query[b, h, s])
        result[b, h, s] = powers @ values / powers.sum()
    return result


@pytest.mark.parametrize("kind", ["NONE", "UPPER_LEFT", "LOWER_RIGHT"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_of_each_causal_kind(kind, tokens):
    query, key, value = random(2, 4, tokens, 16), random(2, 2, 5, 16, seed=1), random(2, 2, 5, 16, seed=2)
    rows, slots = np.arange(tokens)[:, None], np.arange(5)
    visible = {
        "NONE": slots < 5 + 0 * rows,
        "UPPER_LEFT": slots <= rows,
        "LOWER_RIGHT": slots <= rows + 5 - tokens,
    }[kind]

    def make(network, q, k, v):
        return network.add_attention_v2(
            q, k, v, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.__members__[kind]
        )

    got = evaluated(make, query, key, value)
    np.testing.assert_allclose(
        got, attended(query, key, value, np.broadcast_to(visible, (2, tokens, 5))), rtol=1e-4, atol=1e-5
    )


def with_lengths(kind):
    def make(network, q, k, v, n):
        attention = network.add_attention_v2(
            q, k, v, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.__members__[kind]
        )
        attention.key_value_lengths = n
        return attention

    return make


def test_attention_reads_no_key_beyond_the_length_of_its_row():
    query, key, value, lengths = (
        random(2, 2, 3, 16),
        random(2, 2, 5, 16, seed=1),
        random(2, 2, 5, 16, seed=2),
        np.array([2, 4], np.int32),
    )
    visible = np.broadcast_to(np.arange(5) < lengths[:, None, None], (2, 3, 5))
    key[0, :, 2:], value[1, :, 4:] = 1e4, -1e4
    got = evaluated(with_lengths("NONE"), query, key, value, lengths)
    np.testing.assert_allclose(got, attended(query, key, value, visible), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="LOWER_RIGHT with lengths"):
        evaluated(with_lengths("LOWER_RIGHT"), query, key, value, lengths)


def test_a_fill_is_the_documentations_matrix():
    def make(network):
        layer = network.add_fill((3, 4), trt.FillOperation.LINSPACE, trt.int32)
        layer.set_input(1, network.add_constant((), np.array(1, np.int32)).get_output(0))
        layer.set_input(2, network.add_constant((2,), np.array([100, 10], np.int32)).get_output(0))
        return layer

    assert evaluated(make).tolist() == [[1, 11, 21, 31], [101, 111, 121, 131], [201, 211, 221, 231]]


@pytest.mark.parametrize(
    "mode, wanted",
    [
        ("WRAP", [3, 0, 1, 2, 3, 0]),
        ("CLAMP", [0, 0, 1, 2, 3, 3]),
        ("REFLECT", [1, 0, 1, 2, 3, 2]),
        ("FILL", [0, 0, 1, 2, 3, 0]),
    ],
)
def test_a_slice_beyond_its_bounds(mode, wanted):
    def make(network, x):
        layer = network.add_slice(x, (-1,), (6,), (1,))
        layer.mode = trt.SampleMode.__members__[mode]
        return layer

    assert evaluated(make, np.arange(4, dtype=np.float32)).tolist() == wanted


def test_a_slice_is_the_documentations():
    x = np.array([[0, 2, 4], [1, 3, 5]], np.float32)
    assert evaluated(lambda network, t: network.add_slice(t, (1, 0), (1, 2), (1, 2)), x).tolist() == [[1, 5]]


def test_a_padding_of_the_last_two_dimensions_pads_or_crops():
    x = random(1, 2, 4, 5)
    got = evaluated(lambda network, t: network.add_padding_nd(t, (1, -1), (-2, 3)), x)
    wanted = np.zeros((1, 2, 3, 7), np.float32)
    wanted[:, :, 1:, :4] = x[:, :, :2, 1:]
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("mode", ["DEFAULT", "ELEMENT", "ND"])
def test_a_gather_out_of_bounds_gives_zero(mode):
    x, indices = random(3, 2), np.array([[0, 1], [2, 3]])
    if mode == "ND":
        indices = np.array([[0], [3], [2]])

    def make(network, t, i):
        layer = network.add_gather_v2(t, i, trt.GatherMode.__members__[mode])
        layer.axis = 0
        return layer

    got, zero = evaluated(make, x, indices), np.zeros(2, np.float32)
    wanted = {
        "DEFAULT": [[x[0], x[1]], [x[2], zero]],
        "ELEMENT": [[x[0, 0], x[1, 1]], [x[2, 0], 0]],
        "ND": [x[0], zero, x[2]],
    }[mode]
    np.testing.assert_array_equal(got, np.array(wanted))


def test_a_gather_row_by_row():
    x, indices = random(3, 4, 2), np.array([[0, 3], [1, 1], [2, 0]])

    def make(network, t, i):
        layer = network.add_gather_v2(t, i, trt.GatherMode.DEFAULT)
        layer.axis, layer.num_elementwise_dims = 1, 1
        return layer

    np.testing.assert_array_equal(evaluated(make, x, indices), x[np.arange(3)[:, None], indices])


def test_two_writes_to_one_element_are_refused():
    def make(network, t, i, u):
        return network.add_scatter(t, i, u, trt.ScatterMode.ND)

    with pytest.raises(InputError, match="two writes to one element"):
        evaluated(make, random(4, 2), np.array([[1], [1]], np.int32), random(2, 2, seed=1))


@pytest.mark.parametrize(
    "first, second", [("VECTOR", "NONE"), ("NONE", "VECTOR"), ("VECTOR", "VECTOR"), ("TRANSPOSE", "NONE")]
)
def test_products_of_vectors_and_matrices(first, second):
    x = random(3) if first == "VECTOR" else random(4, 3).T.copy() if first == "TRANSPOSE" else random(4, 3)
    y = random(3, seed=1) if second == "VECTOR" else random(3, 5, seed=1)

    def make(network, a, b):
        return network.add_matrix_multiply(
            a, trt.MatrixOperation.__members__[first], b, trt.MatrixOperation.__members__[second]
        )

    np.testing.assert_allclose(
        evaluated(make, x, y), (x.T if first == "TRANSPOSE" else x) @ y, rtol=1e-5, atol=1e-6
    )


def test_the_older_normalisation_scales_by_group():
    x, scale, bias = random(2, 6, 3, 3), random(1, 2, 1, 1, seed=1), random(1, 2, 1, 1, seed=2)

    def make(network, *tensors):
        layer = network.add_normalization(*tensors, 0b1100)
        layer.num_groups = 2
        return layer

    groups = x.reshape(2, 2, -1)
    normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(
        groups.var(-1, keepdims=True) + np.float32(1e-5)
    )
    wanted = (normal * scale.reshape(1, 2, 1) + bias.reshape(1, 2, 1)).reshape(x.shape)
    np.testing.assert_allclose(evaluated(make, x, scale, bias), wanted, rtol=1e-4, atol=1e-5)
