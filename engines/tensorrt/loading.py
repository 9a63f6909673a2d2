"""Loads plans and lets them go: the program of the process that `trial.py` starts.

Its arguments are the search path and {"builder", "library", "plans": {name: bytes}}. It reads the plans from
stdin, one after the other, and prints the name of each before TensorRT sees it.
"""

import ctypes
import importlib
import json
import os
import sys


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    request = json.loads(sys.argv[2])
    module = importlib.import_module(request["builder"])
    if request["library"]:
        ctypes.CDLL(request["library"])
    runtime = module.Runtime(module.Logger(module.Logger.INTERNAL_ERROR))
    for name, size in request["plans"].items():
        data = sys.stdin.buffer.read(size)
        print(name, flush=True)
        runtime.deserialize_cuda_engine(data)
    os._exit(0)  # what a library does when a process ends is no matter of a plan


if __name__ == "__main__":
    main()
