"""On random small graphs, TensorRT reads each operator as ONNX defines it.

onnx's own reference evaluator is the judge. Where TensorRT differs, the difference is pinned here and listed
among the findings.
"""

import zlib

import numpy as np
import pytest

from engines.errors import InputError
from tests.helpers.onnx_graphs import ELEMENTS, integer_quotient, unary
from tests.helpers.onnx_layouts import LAYOUTS, negative_index, resize_by_fraction
from tests.helpers.onnx_sums import SUMS, einsum, integer_mean, nonpad, one_group, quantize_unsigned
from tests.helpers.parsed_network import evaluated

trt = pytest.importorskip("tensorrt_rtx")
FAMILIES = ELEMENTS | LAYOUTS | SUMS
DIFFERENT = {  # what TensorRT reads otherwise than ONNX says, without a word: family, smallest difference
    "GroupNormalization of one group": (one_group, 0.1),
    "Attention with nonpad_kv_seqlen": (nonpad, 0.1),
    "QuantizeLinear without a zero point": (quantize_unsigned, 0.1),
    "Resize by a scale that gives no whole size": (resize_by_fraction, 0.1),
    "Selu": (unary("Selu", low=1.0), 2e-6),
}
# what TensorRT's documentation does not define, or this interpreter does not know, and words of the refusal
REFUSED = {
    "quotient of integers": (integer_quotient, "inexact quotient"),
    "mean of integers": (integer_mean, "average of integers"),
    "negative index along a dynamic axis": (negative_index, "negative index along an axis of dynamic length"),
    "Einsum": (einsum, "EINSUM node_of_y: expected one of ACTIVATION"),
}
SEEDS = 8
TOLERANCE = 2e-5  # relative and absolute: float32, sums in another order


def generator(name, seed):
    return np.random.default_rng([zlib.crc32(name.encode()), seed])


def case(name, make, seed):
    """(model, inputs, wanted outputs) of one random graph."""
    rng = generator(name, seed)
    graph = make(rng)
    return graph, *graph.model(rng)


def test_there_are_at_least_five_hundred_graphs():
    models = {
        case(name, make, seed)[1].SerializeToString()
        for name, make in list(FAMILIES.items())[:20]
        for seed in range(SEEDS)
    }
    assert len(models) > 0.9 * 20 * SEEDS, "the graphs of a family are alike"
    assert len(FAMILIES) * SEEDS >= 500


@pytest.mark.parametrize("name", FAMILIES)
def test_tensorrt_reads_an_operator_as_onnx_means_it(name):
    for seed in range(SEEDS):
        graph, model, wanted = case(name, FAMILIES[name], seed)
        got = evaluated(trt, model, graph.feeds)
        assert list(got) == list(wanted)
        for output, array in wanted.items():
            assert (got[output].shape, got[output].dtype) == (array.shape, array.dtype), (
                f"seed {seed}: {output}"
            )
            np.testing.assert_allclose(
                got[output], array, rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"seed {seed}: {output}"
            )


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_tensorrt_reads_otherwise_is_known(name):
    make, least = DIFFERENT[name]
    differences = []
    for seed in range(SEEDS):
        graph, model, wanted = case(name, make, seed)
        differences.append(np.abs(evaluated(trt, model, graph.feeds)["y"] - wanted["y"]).max())
    assert max(differences) > least, "TensorRT reads this as ONNX means it now: say so in the README"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_defined_is_refused_by_name(name):
    make, words = REFUSED[name]
    graph, model, _ = case(name, make, 0)
    with pytest.raises(InputError, match="cannot be interpreted") as error:
        evaluated(trt, model, graph.feeds)
    assert words in str(error.value)
