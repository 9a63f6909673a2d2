"""A real TensorRT, the one for RTX, which builds on any CPU, loads the plugin, finds it from the classic graphs, and compiles plans
with it. The library has the kernels on emulated blocks and our own declaration of TensorRT's interfaces; no plan is run."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from emulated import FLAGS, HERE, SOURCES, compiler
from tensorrt_driver import COMPONENT

from engines import plugins
from star_export.classic import classic_from_graph
from star_export.export import export

libraries = pytest.importorskip("tensorrt_rtx_libs")
FOLDER = Path(libraries.__file__).parent
LAYERS = 4  # of the component


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A decoder of STAR-Nano in bf16: 4 heads and 2 key heads of 64."""
    return export("nano", out=tmp_path_factory.mktemp("bundle") / "nano", precision="bf16", components=[COMPONENT])


@pytest.fixture(scope="module")
def graphs(bundle, tmp_path_factory) -> Path:
    """A folder with its classic graph, the one with int8 caches, one with key heads that do not divide the heads, and their weights."""
    folder = tmp_path_factory.mktemp("graphs")
    for file in ("classic.onnx", "model.onnx", "model.onnx.data"):
        shutil.copyfile(bundle / COMPONENT / file, folder / file)
    int8, odd = classic_from_graph(ir.load(folder / "model.onnx"), cache="int8"), ir.load(folder / "classic.onnx")
    for node in odd.graph:
        if node.op_type == plugins.NAME:
            node.attributes["num_kv_heads"] = ir.AttrInt64("num_kv_heads", 3)
    for name, model in (("int8.onnx", int8), ("odd.onnx", odd)):
        (folder / name).write_bytes(ir.to_proto(model).SerializeToString())
    return folder


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """A function that calls one of tensorrt_driver's in a process of its own, and gives its answer and what went to stderr."""
    folder = tmp_path_factory.mktemp("plugin")
    library, names = folder / "libstar_plugins.so", folder / "names"
    sources = [str(HERE / "host_driver.cpp"), str(SOURCES / "plugin.cpp"), str(SOURCES / "entry.cpp")]
    tensorrt = [f"-L{FOLDER}", "-l:libtensorrt_rtx.so.1", f"-Wl,-rpath,{FOLDER}"]
    subprocess.run([compiler(), *FLAGS, f"-I{HERE / 'minimal'}", f"-I{SOURCES}", *sources, "-o", str(library), *tensorrt], check=True)
    names.mkdir()
    (names / "libtensorrt_rtx.so").symlink_to(FOLDER / "libtensorrt_rtx.so.1")  # the parser opens it by this name for plugins

    def call(name: str, *arguments):
        code = f"import json, tensorrt_driver\nprint(json.dumps(tensorrt_driver.{name}(*{[str(a) for a in arguments]!r})))"
        environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}", "LD_LIBRARY_PATH": str(names),
                                    plugins.VARIABLE: str(library)}
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return call


def test_a_plan_of_the_classic_graph_is_built_with_the_plugin_and_says_with_which(bundle, in_process) -> None:
    made, _ = in_process("plan_of", bundle)
    assert made["plugin"] == made["library"] and made["updates"] == 2 * LAYERS and all(made["words"]), made


@pytest.mark.parametrize("graph", ["classic.onnx", "int8.onnx"])
@pytest.mark.parametrize("how", ["when it is loaded", "by a registry"])
def test_tensorrt_compiles_both_kinds_of_cache_however_the_plugin_is_registered(bundle, graphs, in_process, graph, how) -> None:
    answer, said = in_process("compiled", bundle, graphs / graph, 2, how)
    assert answer.endswith("bytes"), answer + said


@pytest.mark.parametrize("graph, rows, words, reason", [
    ("classic.onnx", 9, "", "rows: expected 1 to 8, got another"),
    ("odd.onnx", 2, "TensorRT cannot read this graph", "num_heads: expected a multiple of num_kv_heads, got 4")])
def test_what_the_plugin_cannot_compute_makes_no_plan(bundle, graphs, in_process, graph, rows, words, reason) -> None:
    answer, said = in_process("compiled", bundle, graphs / graph, rows, "when it is loaded")
    assert not answer.endswith("bytes") and words in answer and reason in said, answer + said
