"""Types of a network: fp8 and nvfp4 weights from TensorRT's own bytes, and rounding after 16-bit layers."""

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.errors import InputError
from engines.interpreter import Network, constants
from engines.interpreter import parsed as reading
from engines.tensorrt.module import log_of
from tests.helpers.parsed_network import evaluated, parsed
from tests.helpers.typed_models import (
    E2M1,
    E4M3,
    dynamic_model,
    fp8_model,
    model_of,
    node,
    nvfp4_model,
    random,
    stored,
)

trt = pytest.importorskip("tensorrt_rtx")
KINDS = {
    "FLOAT": (TensorProto.FLOAT, np.float32),
    "HALF": (TensorProto.FLOAT16, np.float16),
    "BF16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}


def test_the_parser_misreads_fp8_that_is_not_in_raw_bytes():
    """ONNX may store fp8 in `int32_data`, one number in each.
    TensorRT takes the bytes as they lie, so three of four weights are zero."""
    codes, scale = (random(32, 16) * 100).clip(-448, 448).astype(E4M3), np.array(1, ml_dtypes.bfloat16)
    spread = helper.make_tensor(
        "c", TensorProto.FLOAT8E4M3FN, codes.shape, codes.astype(np.float32).reshape(-1)
    )
    x = random(3, 32, seed=1)
    right = evaluated(trt, fp8_model(codes, None, scale), {"x": x})["y"]
    wrong = evaluated(trt, fp8_model(codes, spread, scale), {"x": x})["y"]
    assert right.all() and (wrong == 0).mean() == 0.75


@pytest.mark.parametrize("per_channel", [False, True])
def test_fp8_weights_are_dequantised_from_tensorrts_bytes(per_channel):
    codes, x = (random(32, 16) * 100).clip(-448, 448).astype(E4M3), random(3, 32, seed=1)
    scale = (np.abs(random(16, seed=2)) + 0.1 if per_channel else np.float32(0.03)).astype(ml_dtypes.bfloat16)
    model = fp8_model(codes, None, scale)
    weight = (
        (codes.astype(np.float32) * scale.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    wanted = (
        (x.astype(ml_dtypes.bfloat16).astype(np.float32) @ weight)
        .astype(ml_dtypes.bfloat16)
        .astype(np.float32)
    )
    np.testing.assert_array_equal(evaluated(trt, model, {"x": x})["y"], wanted)
    wide = x @ (codes.astype(np.float32) * scale.astype(np.float32))
    np.testing.assert_allclose(evaluated(trt, model, {"x": x}, wide=True)["y"], wide, rtol=1e-5, atol=1e-4)


def test_fp8_activations_saturate_and_round_to_even():
    x = np.array([[0.0, 1.0, 1.0625, 1.1875, 500.0, -500.0, 0.001, 0.0015]], np.float32)
    nodes = [node("QuantizeLinear", ["x", "s", "z"], "q"), node("DequantizeLinear", ["q", "s", "z"], "y")]
    zero = stored("z", TensorProto.FLOAT8E4M3FN, np.zeros((), E4M3))
    model = model_of(
        nodes,
        {"x": (TensorProto.FLOAT, [1, 8])},
        {"y": (TensorProto.FLOAT, [1, 8])},
        {"s": np.float32(0.5), "z": zero},
    )
    wanted = np.clip(x / np.float32(0.5), -448, 448).astype(E4M3).astype(np.float32) * np.float32(0.5)
    np.testing.assert_array_equal(evaluated(trt, model, {"x": x})["y"], wanted)


@pytest.mark.parametrize(
    "kind, sm, builds",
    [("fp8", "SM89", True), ("fp8", "SM120", True), ("nvfp4", "SM120", True), ("nvfp4", "SM89", False)],
)
def test_the_network_that_is_interpreted_is_compiled_where_the_device_has_its_type(kind, sm, builds):
    """fp8 runs from SM 8.9 on, nvfp4 on SM 12.0:
    the network evaluated here is the object that the builder takes."""
    if kind == "fp8":
        model, x = (
            fp8_model(
                (random(32, 16) * 100).clip(-448, 448).astype(E4M3), None, np.array(0.03, ml_dtypes.bfloat16)
            ),
            random(3, 32, seed=1),
        )
    else:
        (model, _), x = nvfp4_model(0), random(3, 64, seed=1)
    read = parsed(trt, model)
    network, (builder, _) = read.owner
    assert Network(read).run({"x": x})["y"].any()
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.__members__[sm], 0)
    if kind == "nvfp4":
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (1, 64), (4, 64), (8, 64))
        config.add_optimization_profile(profile)
    with log_of(trt).collect() as errors:
        assert (builder.build_serialized_network(network, config) is not None) == builds, errors


@pytest.mark.parametrize("axis", [0, 1])
def test_nvfp4_weights_have_fp8_scales_that_are_dequantised_themselves(axis):
    (model, weight), x = nvfp4_model(axis), random(3, 64, seed=1)
    np.testing.assert_allclose(
        evaluated(trt, model, {"x": x}, wide=True)["y"], x @ weight, rtol=1e-5, atol=1e-4
    )
    narrow = [a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (x, weight)]
    got = evaluated(trt, model, {"x": x})["y"]
    assert np.abs(got - narrow[0] @ narrow[1]).max() < 2**-7 * np.abs(got).max() and (got != x @ weight).any()


def test_nvfp4_activations_find_their_block_scales_themselves():
    """Against ml_dtypes' own rounding: a scale of 1/6 of a block's largest number, over 2^-11, in E4M3.
    A block of zeros stays zero, and numbers beyond 6 * 448 * 2^-11 saturate."""
    x = random(3, 64) * np.array([[1e-3], [1.0], [50.0]], np.float32)
    x[1, 16:32] = 0
    model, whole = dynamic_model(), np.float32(2.0**-11)
    narrow = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    blocks = narrow.reshape(3, 4, 16)
    largest = (np.abs(blocks).max(-1) / np.float32(6) / whole).clip(max=448)
    scales = largest.astype(E4M3).astype(np.float32)[..., None] * whole
    with np.errstate(invalid="ignore"):
        codes = np.where(scales > 0, blocks / scales, 0).clip(-6, 6).astype(E2M1).astype(np.float32)
    got = evaluated(trt, model, {"x": x})["y"]
    np.testing.assert_array_equal(got, (codes * scales).reshape(3, 64))
    assert not got[1, 16:32].any() and np.abs(got[2]).max() == 6 * 448 * whole


def test_another_dynamic_quantisation_is_refused_by_name(monkeypatch):
    read = parsed(trt, dynamic_model())
    (layer,) = [layer for layer in read.layers if layer.kind == "DYNAMIC_QUANTIZE"]
    monkeypatch.setitem(layer.attributes, "to_type", "FP8")
    with pytest.raises(InputError, match="DYNAMIC_QUANTIZE .*: expected to_type FP4, got to_type FP8"):
        Network(read)


@pytest.mark.parametrize("kind", ["HALF", "BF16"])
def test_a_16_bit_network_is_rounded_after_every_layer(kind):
    proto, dtype = KINDS[kind]
    x, b = random(4, 33) * 3, (random(33, seed=1) / 7).astype(dtype)
    nodes = [
        node("Cast", ["x"], "h", to=proto),
        node("Add", ["h", "b"], "s"),
        node("Sigmoid", ["s"], "g"),
        node("Mul", ["s", "g"], "m"),
        node("Sqrt", ["g"], "r"),
        node("Add", ["m", "r"], "t"),
        node("Cast", ["t"], "y", to=TensorProto.FLOAT),
    ]
    model = model_of(
        nodes,
        {"x": (TensorProto.FLOAT, ["n", 33])},
        {"y": (TensorProto.FLOAT, ["n", 33])},
        {"b": numpy_helper.from_array(b, "b")},
    )

    def to(a):
        return a.astype(dtype).astype(np.float32)

    total = to(to(x) + b.astype(np.float32))
    gate = to(1 / (1 + np.exp(-total)))
    wanted = to(to(total * gate) + to(np.sqrt(gate)))
    got = evaluated(trt, model, {"x": x})["y"]
    assert (got == wanted).mean() > 0.99 and np.abs(got - wanted).max() <= 2.0 ** (
        -9 if kind == "HALF" else -6
    )  # an exp may differ in its last bit
    wide = evaluated(trt, model, {"x": x}, wide=True)["y"]
    exact = x + b.astype(np.float32)
    np.testing.assert_allclose(
        wide, exact / (1 + np.exp(-exact)) + np.sqrt(1 / (1 + np.exp(-exact))), rtol=1e-5, atol=1e-6
    )
    assert np.abs(wide - wanted).max() > 1e-4


@pytest.mark.parametrize(
    "head_dim, kind, least",
    [(128, "BF16", 2.8e-3), (80, "BF16", 2.3e-3), (64, "BF16", 2e-4), (128, "HALF", 4e-4)],
)
def test_the_parser_computes_the_scale_of_attention_in_the_networks_type(head_dim, kind, least):
    """ONNX multiplies scores by 1/sqrt(d); TensorRT's parser multiplies query and key by sqrt(1/sqrt(d))
    each.

    Each is rounded to the network's type at every step: in bf16 with d = 128, as in STAR-3B and 7B, the
    scores are 0.29 % smaller.
    """
    shape = ["B", 2, "S", head_dim]
    nodes = [node("Attention", ["q", "k", "v"], "y")]
    inputs = dict.fromkeys("qkv", (KINDS[kind][0], shape))
    network = parsed(trt, model_of(nodes, inputs, {"y": (KINDS[kind][0], shape)}, {}))
    ratios = []
    for wide in (False, True):
        evaluator = Network(network, wide=wide)
        evaluator.run({name: random(1, 2, 3, head_dim) for name in "qkv"})
        query, key = (array.item() for array in evaluator._kept.values() if array.shape == (1, 1, 1, 1))
        ratios.append(query * key * head_dim**0.5)
    assert least <= abs(ratios[0] - 1) <= 1.1 * least and abs(ratios[1] - 1) < 1e-6


def cache_model(kind="FLOAT"):
    nodes = [node("TensorScatter", ["c", "u", "w"], "p", axis=-2, mode="linear")]
    proto, shape = KINDS[kind][0], ["B", 2, 6, 4]
    return model_of(
        nodes,
        {"c": (proto, shape), "u": (proto, ["B", 2, "S", 4]), "w": (TensorProto.INT64, ["B"])},
        {"p": (proto, shape)},
        {},
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_cache_is_updated_in_place_and_writes_beyond_it_are_ignored(dtype):
    cache, update = np.full((2, 2, 6, 4), 7, dtype), random(2, 2, 3, 4).astype(dtype)
    network = Network(parsed(trt, cache_model("FLOAT" if dtype == np.float32 else "HALF")))
    result = network.run({"c": cache, "u": update, "w": np.array([1, 4])})["p"]
    wanted = np.full((2, 2, 6, 4), 7, dtype)
    wanted[0, :, 1:4], wanted[1, :, 4:6] = update[0], update[1, :, :2]
    assert result is cache
    np.testing.assert_array_equal(cache, wanted)
    with pytest.raises(InputError, match="negative write index"):
        network.run({"c": cache, "u": update, "w": np.array([-1, 0])})


def test_a_cache_that_something_else_reads_is_refused():
    model = cache_model()
    model.graph.node.append(node("Add", ["c", "p"], "q"))
    model.graph.output.append(helper.make_tensor_value_info("q", TensorProto.FLOAT, ["B", 2, 6, 4]))
    with pytest.raises(InputError, match="the cache c read beside its update"):
        Network(parsed(trt, model))


def plain_model():
    return model_of(
        [node("Relu", ["x"], "y")], {"x": (TensorProto.FLOAT, ["n"])}, {"y": (TensorProto.FLOAT, ["n"])}, {}
    )


@pytest.mark.parametrize(
    "table, words",
    [
        ({}, "ACTIVATION node_of_y: expected one of"),
        ({"ACTIVATION": ("alpha",)}, "attributes alpha, got attributes alpha, beta"),
        ({"ACTIVATION": ("alpha", "beta", "gamma")}, "attributes alpha, beta, gamma"),
    ],
)
def test_a_layer_or_attribute_that_is_not_in_the_table_is_refused_by_name(monkeypatch, table, words):
    monkeypatch.setattr(reading, "ATTRIBUTES", table)
    with pytest.raises(InputError) as error:
        parsed(trt, plain_model())
    assert words in str(error.value)


def test_a_type_or_operation_that_is_not_in_the_table_is_refused_by_name(monkeypatch):
    from engines.interpreter import elementwise

    monkeypatch.setattr(elementwise, "ACTIVATION", {"TANH": np.tanh})
    with pytest.raises(InputError, match="expected one of TANH, got operation RELU"):
        Network(parsed(trt, plain_model()))
    monkeypatch.setattr(reading, "BITS", {"HALF": 16})
    with pytest.raises(InputError, match="tensor x: expected one of HALF, got type FLOAT"):
        parsed(trt, plain_model())


def test_a_shape_that_tensorrt_did_not_infer_is_an_error(monkeypatch):
    from engines.interpreter import evaluate

    monkeypatch.setitem(evaluate.READERS, "ACTIVATION", lambda layer: lambda x: x[:, None])
    with pytest.raises(
        InputError, match=r"expected shape \(-1,\) of y, as TensorRT inferred it, got shape \(3, 1\)"
    ):
        Network(parsed(trt, plain_model())).run({"x": np.zeros(3, np.float32)})


def test_weights_that_lie_elsewhere_are_refused(monkeypatch):
    from engines.errors import MissingError

    constants.check_weights_layout.cache_clear()
    monkeypatch.setattr(constants, "_raw", lambda weights: constants._Weights(0, 1234, 7))
    with pytest.raises(MissingError, match="stores its weights in another form"):
        parsed(trt, plain_model())


def test_a_tensor_is_freed_after_its_last_use():
    import tracemalloc

    nodes = [
        node("Neg", ["x"], "t0"),
        *[node("Neg", [f"t{i}"], f"t{i + 1}") for i in range(20)],
        node("Neg", ["t20"], "y"),
    ]
    network = Network(
        parsed(trt, model_of(nodes, {"x": (TensorProto.FLOAT, ["n"])}, {"y": (TensorProto.FLOAT, ["n"])}, {}))
    )
    x = np.ones(1 << 20, np.float32)
    tracemalloc.start()
    network.run({"x": x})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.5 * x.nbytes


def test_dequantised_weights_are_not_kept_beyond_the_room(monkeypatch):
    """Eight weights of int4: kept, they take 8 x 4 bytes a number; one at a time, with what it is read by."""
    import tracemalloc

    monkeypatch.setattr("engines.interpreter.evaluate.KEEP_BYTES", 1 << 16)
    size, block = 512, 128
    rng, nodes, weights = np.random.default_rng(0), [], {}
    for i in range(8):
        codes = rng.integers(-7, 8, (size, size)).astype(ml_dtypes.int4)
        weights |= {f"w{i}": codes, f"s{i}": np.full((size // block, size), 2**-7, np.float32)}
        nodes += [
            node("DequantizeLinear", [f"w{i}", f"s{i}"], f"d{i}", axis=0, block_size=block),
            node("MatMul", [f"x{i}" if i else "x", f"d{i}"], f"x{i + 1}" if i < 7 else "y"),
        ]
    io = {"x": (TensorProto.FLOAT, ["n", size])}, {"y": (TensorProto.FLOAT, ["n", size])}
    network, x = Network(parsed(trt, model_of(nodes, *io, weights))), random(2, size)
    wanted = x
    for i in range(8):
        wanted = wanted @ (weights[f"w{i}"].astype(np.float32) * np.float32(2**-7))
    for _ in range(2):
        tracemalloc.start()
        got = network.run({"x": x})["y"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
        assert peak < 1.6 * 4 * size * size, f"{peak} bytes"
