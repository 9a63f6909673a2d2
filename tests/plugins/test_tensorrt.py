"""A real TensorRT, the one for RTX, loads the plugin, finds it from the classic graphs and compiles plans
with it.

It builds on any CPU, and no plan is run. The library is compiled with our own declaration of TensorRT's
interfaces: with the kernels on emulated blocks or, where there is nvcc, by the documented command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from engines import plugins
from star_export.exporter.export import export
from star_export.graph.classic import classic_from_graph
from tests.helpers.emulated import FLAGS, HERE, ROOT, SOURCES, compiler
from tests.helpers.plugin_in_tensorrt import COMPONENT

libraries = pytest.importorskip("tensorrt_rtx_libs")
FOLDER, FILE = Path(libraries.__file__).parent, "libtensorrt_rtx.so.1"
LAYERS = 4  # of the component


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A decoder of STAR-Nano in bf16: 4 heads and 2 key heads of 64."""
    return export(
        "nano", out=tmp_path_factory.mktemp("bundle") / "nano", precision="bf16", components=[COMPONENT]
    )


@pytest.fixture(scope="module")
def graphs(bundle, tmp_path_factory) -> Path:
    """A folder with its classic graph, one with int8 caches,
    one whose key heads do not divide the heads, and their weights."""
    folder = tmp_path_factory.mktemp("graphs")
    for file in ("classic.onnx", "model.onnx", "model.onnx.data"):
        shutil.copyfile(bundle / COMPONENT / file, folder / file)
    int8, odd = (
        classic_from_graph(ir.load(folder / "model.onnx"), cache="int8"),
        ir.load(folder / "classic.onnx"),
    )
    for node in odd.graph:
        if node.op_type == plugins.NAME:
            node.attributes["num_kv_heads"] = ir.AttrInt64("num_kv_heads", 3)
    for name, model in (("int8.onnx", int8), ("odd.onnx", odd)):
        (folder / name).write_bytes(ir.to_proto(model).SerializeToString())
    return folder


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    """The library with the kernels on emulated blocks."""
    library = tmp_path_factory.mktemp("emulated") / "libstar_plugins.so"
    sources = [str(HERE / "host_driver.cpp"), str(SOURCES / "plugin.cpp"), str(SOURCES / "entry.cpp")]
    tensorrt = [f"-L{FOLDER}", f"-l:{FILE}", f"-Wl,-rpath,{FOLDER}"]
    subprocess.run(
        [
            compiler(),
            *FLAGS,
            f"-I{HERE / 'minimal'}",
            f"-I{SOURCES}",
            *sources,
            "-o",
            str(library),
            *tensorrt,
        ],
        check=True,
    )
    return library


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """A function that runs one of plugin_in_tensorrt's in its own process: its answer, and stderr."""
    names = tmp_path_factory.mktemp("names")
    (names / "libtensorrt_rtx.so").symlink_to(FOLDER / FILE)  # the parser opens it by this name for plugins

    def call(library: Path, name: str, *arguments):
        code = (
            "import json\nfrom tests.helpers import plugin_in_tensorrt\n"
            f"print(json.dumps(plugin_in_tensorrt.{name}(*{[str(a) for a in arguments]!r})))"
        )
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "LD_LIBRARY_PATH": str(names),
            plugins.VARIABLE: str(library),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return call


def test_a_plan_of_the_classic_graph_is_built_with_the_plugin_and_says_with_which(
    bundle, emulated, in_process
) -> None:
    made, _ = in_process(emulated, "plan_of", bundle)
    assert made["plugin"] == made["library"] and made["updates"] == 2 * LAYERS and all(made["words"]), made


def test_the_documented_command_builds_a_library_that_tensorrt_takes(bundle, in_process, tmp_path) -> None:
    if not (shutil.which("nvcc") and shutil.which("cmake")):
        pytest.skip("no nvcc or no cmake on this machine: the library was not built by CMake")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libnvinfer.so").symlink_to(FOLDER / FILE)
    (tmp_path / "include").symlink_to(HERE / "minimal")
    folder = tmp_path / "build"
    command = plugins.COMMAND.replace(str(plugins.FOLDER / "build"), str(folder))
    command = command.replace(
        " && ", f" -DTENSORRT_ROOT={tmp_path} -DCMAKE_CUDA_ARCHITECTURES=87{hidden_nvcc()} && "
    )
    subprocess.run(command, shell=True, check=True, capture_output=True)
    made, _ = in_process(folder / plugins.BUILT.name, "plan_of", bundle)
    assert made["plugin"] == made["library"] and made["updates"] == 2 * LAYERS and all(made["words"]), made


def hidden_nvcc() -> str:
    """Keeps CMake from finding nvcc beside other programs: as on a Jetson, it is only in CUDA's folder."""
    nvcc, cmake, compiles = (os.path.dirname(shutil.which(name)) for name in ("nvcc", "cmake", "c++"))
    twice = Path("/usr/local/cuda/bin/nvcc").exists() and nvcc not in ("/usr/local/cuda/bin", cmake, compiles)
    return f" -DCMAKE_IGNORE_PATH={nvcc}" if twice else ""


@pytest.mark.parametrize("graph", ["classic.onnx", "int8.onnx"])
@pytest.mark.parametrize("how", ["when it is loaded", "by a registry"])
def test_tensorrt_compiles_both_kinds_of_cache_however_it_is_registered(
    bundle, graphs, emulated, in_process, graph, how
) -> None:
    answer, said = in_process(emulated, "compiled", bundle, graphs / graph, 2, how)
    assert answer.endswith("bytes"), answer + said


@pytest.mark.parametrize(
    "graph, rows, words, reason",
    [
        ("classic.onnx", 9, "", "rows: expected 1 to 8, got another"),
        (
            "odd.onnx",
            2,
            "TensorRT cannot read this graph",
            "num_heads: expected a multiple of num_kv_heads, got 4",
        ),
    ],
)
def test_what_the_plugin_cannot_compute_makes_no_plan(
    bundle, graphs, emulated, in_process, graph, rows, words, reason
) -> None:
    answer, said = in_process(emulated, "compiled", bundle, graphs / graph, rows, "when it is loaded")
    assert not answer.endswith("bytes") and words in answer and reason in said, answer + said
