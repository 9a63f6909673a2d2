"""The interpreter: evaluates on the CPU the network that TensorRT parsed from our ONNX.

The parser between ONNX and engine drops and reinterprets things silently. The `INetworkDefinition` that it
makes can be inspected: `parsed` turns it into data, `evaluate` computes it in numpy, `describe` shows and
hashes it. So any machine can tell what an engine means. This proves the meaning of the network, not the
kernels compiled from it.
"""

from .describe import describe_network, network_hash
from .evaluate import Network
from .parsed import BUILDERS, parsed_from_network

__all__ = ["BUILDERS", "Network", "describe_network", "network_hash", "parsed_from_network"]
