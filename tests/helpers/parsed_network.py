"""An ONNX model as the network that TensorRT parses from it, and what the interpreter computes with it."""

from __future__ import annotations

from engines.interpreter import Network, parsed_from_network
from engines.tensorrt.module import log_of


def parsed(trt, model):
    """The network of `model`; AssertionError with the parser's words where it has none."""
    with log_of(trt).collect():
        builder = trt.Builder(log_of(trt))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log_of(trt))
        assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
        return parsed_from_network(trt, network, owner=(builder, parser))


def evaluated(trt, model, feeds, **options):
    """Outputs of `model` by name, as TensorRT reads it."""
    return Network(parsed(trt, model), **options).run({name: array.copy() for name, array in feeds.items()})
