"""The network that TensorRT parsed from our ONNX, read back and evaluated on the CPU: what the engine means, on any machine.

The parser between ONNX and engine drops and reinterprets things without a word. The `INetworkDefinition` that it makes is open to
inspection: `parsed` reads it as data, `evaluate` computes it in numpy, `describe` shows and hashes it. What this proves is the
meaning of the network, not the kernels that are compiled from it.
"""

from .describe import describe_network, network_hash
from .evaluate import Network
from .parsed import BUILDERS, parsed_from_network

__all__ = ["BUILDERS", "Network", "describe_network", "network_hash", "parsed_from_network"]
