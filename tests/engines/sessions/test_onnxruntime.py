"""ONNX Runtime sessions share memory, update caches in place, check what is bound.

docs/bad_inputs.md 23, 41, 43.
"""

import contextlib
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from engines.bundle.reader import Bundle
from engines.errors import InputError, MissingError, UsageError, install
from engines.runtime.kv_cache import kv_cache_attention
from engines.sessions import onnxruntime as module
from engines.sessions import open_session, run
from engines.sessions.onnxruntime_buffers import float32_from_bfloat16
from tests.helpers.tiny_bundle import model_from_nodes, write_component, write_manifest, write_tiny_bundle
from tests.helpers.tiny_decoder import KV_HEADS, SIZE, boundary, decoder_buffers, write_decoder_bundle

ROOT = Path(__file__).parents[3]
IDS = np.array([[0, 3, 7]])


@pytest.fixture
def tiny(tmp_path):
    return open_session(Bundle.open(write_tiny_bundle(tmp_path / "b")), "token_embedding")


@pytest.fixture
def decoder(tmp_path):
    return open_session(Bundle.open(write_decoder_bundle(tmp_path / "b")), "base_ar")


def test_run_gives_all_outputs(tiny):
    out = run(tiny, {"input_ids": IDS})
    np.testing.assert_array_equal(out["inputs_embeds"], np.arange(32, dtype=np.float32).reshape(8, 4)[IDS])


def test_buffers_share_their_memory_with_numpy(tiny):
    ids, embeds = tiny.buffer((1, 2), "int64"), tiny.buffer((1, 2, 4), "float32")
    step, view = tiny.bind({"input_ids": ids, "inputs_embeds": embeds}), embeds.read()
    for values in ([0, 1], [5, 2]):
        ids.write(np.array([values]))
        step()
        assert view[0, :, 0].tolist() == [4 * v for v in values]
    assert embeds.value.data_ptr() == view.ctypes.data


def test_a_cache_bound_once_is_updated_in_place_and_read_by_the_next_step(decoder):
    rng, buffers = np.random.default_rng(0), decoder_buffers(decoder)
    step = decoder.bind(buffers)
    key, value = (np.zeros((2, KV_HEADS, 16, SIZE), np.float32) for _ in range(2))
    for i in range(16):  # to the last slot
        new, index = (
            rng.standard_normal((2, KV_HEADS, 1, SIZE), dtype=np.float32),
            np.array([i, max(i - 1, 0)]),
        )
        buffers["inputs_embeds"].write(new)
        buffers["write_indices"].write(index)
        buffers["mask"].write(np.arange(16) <= index[:, None, None, None])
        step()
        expected, key, value = kv_cache_attention(new, new, new, key, value, index)
        np.testing.assert_allclose(buffers["hidden_states"].read(), expected, atol=1e-6)
        np.testing.assert_array_equal(buffers["past_key_values.0.key"].read(), key)


STEP = """
from engines.sessions import onnxruntime as module
module.LOG_SEVERITY = 2
from engines.bundle.reader import Bundle
from engines.sessions import open_session
from tests.helpers.tiny_decoder import decoder_buffers
session = open_session(Bundle.open({root!r}), "base_ar")
buffers = decoder_buffers(session)
if {copying}:
    import onnxruntime
    caches = {{n: session.buffer(b.shape, b.dtype) for n, b in buffers.items() if n.startswith("past")}}
    present = {{n.replace("past_key_values", "present"): b for n, b in caches.items()}}
    binding = session.inference_session.io_binding()
    for t in session.spec.inputs: binding.bind_ortvalue_input(t.name, buffers[t.name].value)
    for t in session.spec.outputs: binding.bind_ortvalue_output(t.name, (buffers | present)[t.name].value)
    session.inference_session.run_with_iobinding(binding)
else:
    session.bind(buffers)()
"""


@pytest.mark.parametrize("copying", [False, True])
def test_onnx_runtime_says_that_it_does_not_copy_the_cache(tmp_path, copying):
    root = write_decoder_bundle(tmp_path / "b")
    code = STEP.format(root=str(root), copying=copying)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("copying past_cache" in done.stderr) is copying  # True: this test can see the warning


# Row 23
def swapped(tensors):
    return [tensors[1], tensors[0], *tensors[2:]]


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda i, o: ([replace(i[0], name="embeds"), *i[1:]], o),
            r"inputs\[0\]: expected embeds:float32.*got inputs_embeds:float32",
        ),
        (lambda i, o: (swapped(i), o), r"inputs\[0\]: expected write_indices:int64.*got inputs_embeds"),
        (
            lambda i, o: ([replace(i[0], dtype="int64"), *i[1:]], o),
            r"expected inputs_embeds:int64.*got inputs_embeds:float32",
        ),
        (
            lambda i, o: ([replace(i[0], shape=("B", 3, "S", SIZE)), *i[1:]], o),
            r"\[\*,3,\*,8\], got .*\[\*,2,\*,8\]",
        ),
        (lambda i, o: ([replace(i[0], shape=("B", "S", SIZE)), *i[1:]], o), r"inputs\[0\]"),
        (
            lambda i, o: (i[:-1], o),
            r"expected 2 caches of 1 layers, got 1",
        ),
        (lambda i, o: (i, swapped(o)), r"outputs\[0\]: expected present.0.key"),
        (lambda i, o: (i, o[:-1]), r"outputs\[2\]: expected nothing"),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(tmp_path, change, match):
    root = write_decoder_bundle(tmp_path / "b", manifest_boundary=change(*boundary()))
    with pytest.raises(InputError, match=match):
        open_session(Bundle.open(root), "base_ar")


def test_a_graph_that_is_no_graph_is_refused(tmp_path):
    root = write_tiny_bundle(tmp_path / "b")
    (root / "token_embedding/model.onnx").write_bytes(b"\xff\xd8 an image")
    bundle = Bundle.open(write_tiny_bundle(tmp_path / "c"))
    with pytest.raises(InputError):
        Bundle.open(root)  # its size and hash
    bundle.loading = lambda *a, **k: contextlib.nullcontext(root / "token_embedding/model.onnx")
    with pytest.raises(InputError, match="cannot load this graph"):
        open_session(bundle, "token_embedding")


def test_a_bundle_swapped_while_it_is_loaded_is_refused(tmp_path, monkeypatch):
    import onnxruntime

    root = write_tiny_bundle(tmp_path / "b")
    bundle, real = Bundle.open(root), onnxruntime.InferenceSession

    def swapping(path, *args, **kwargs):
        data = root / "token_embedding/model.onnx.data"
        data.write_bytes(data.read_bytes()[::-1])
        return real(path, *args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", swapping)
    with pytest.raises(InputError, match="sha256"):
        open_session(bundle, "token_embedding")


# Row 41
@pytest.mark.parametrize(
    "feeds, match",
    [
        ({"input_ids": IDS.astype(np.int32)}, "expected int64.*got int32"),
        ({"input_ids": IDS.astype(">i8")}, "foreign byte order"),
        ({"input_ids": IDS[0]}, r"got int64\[3\]"),
        ({"input_ids": IDS[None]}, r"got int64\[1,1,3\]"),
        ({"input_ids": IDS[:, :0]}, "size 0"),
        ({"input_ids": np.arange(6).reshape(2, 3).T}, "not contiguous"),
        ({}, "input_ids: missing"),
        ({"input_ids": IDS, "x": IDS}, "x: extra"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(tiny, feeds, match):
    with pytest.raises(InputError, match=match):
        run(tiny, feeds)


@pytest.mark.parametrize("id", [-9, 8, 2**40])
def test_ids_outside_the_table_are_not_read(tiny, id):
    with pytest.raises(
        Exception, match="indices element out of data bounds"
    ):  # the runtime checks ids before they come here
        run(tiny, {"input_ids": np.array([[id]])})


def test_buffers_that_do_not_fit_together_are_refused(decoder):
    buffers = decoder_buffers(decoder)
    for name, shape, match in (
        ("mask", (2, 1, 1, 15), "expected C=15 as in mask, got C=16"),
        ("write_indices", (3,), "expected B=2"),
        ("past_key_values.0.key", (2, KV_HEADS + 1, 16, SIZE), "got size 3 for 2"),
    ):
        with pytest.raises(InputError, match=match):
            decoder.bind(buffers | {name: decoder.buffer(shape, buffers[name].dtype)})
    with pytest.raises(InputError, match="present.0.key: extra"):
        decoder.bind(buffers | {"present.0.key": buffers["past_key_values.0.key"]})


def test_memory_of_another_device_is_refused(decoder):
    buffers, foreign = decoder_buffers(decoder), module.DeviceBuffer.__new__(module.DeviceBuffer)
    foreign.shape, foreign.dtype = (2,), "int64"
    for other in (np.zeros(2, np.int64), foreign):
        with pytest.raises(
            InputError, match=f"write_indices: expected HostBuffer, got {type(other).__name__}"
        ):
            decoder.bind(buffers | {"write_indices": other})


def test_bfloat16_memory_is_refused_on_the_cpu(tiny):
    with pytest.raises(InputError, match="does not support bfloat16"):
        tiny.buffer((1,), "bfloat16")


# Row 43
def test_use_after_close_names_the_state(decoder):
    buffers = decoder_buffers(decoder)
    step = decoder.bind(buffers)
    decoder.close()
    for use in (step, lambda: decoder.bind(buffers)):
        with pytest.raises(InputError, match="base_ar: expected an open session, got a closed one"):
            use()


def test_two_threads_on_one_session_are_refused(decoder):
    step, entered, leave = decoder.bind(decoder_buffers(decoder)), threading.Event(), threading.Event()

    class Slow:
        def run_with_iobinding(self, binding, options):
            entered.set()
            leave.wait(5)

    decoder.inference_session = Slow()
    thread = threading.Thread(target=step)
    thread.start()
    entered.wait(5)
    with pytest.raises(InputError, match="one thread at a time"):
        step()
    leave.set()
    thread.join()
    step()


def test_an_unknown_backend_is_answered_with_the_valid_ones(tmp_path):
    bundle = Bundle.open(write_tiny_bundle(tmp_path / "b"))
    for backend in ("onnx", "tensorrt:", "", "cuda"):
        with pytest.raises(
            UsageError,
            match="onnxruntime, onnxruntime-exact, onnxruntime-cuda, tensorrt:TARGET, "
            "interpreter:TARGET, interpreter-fp32:TARGET, got",
        ):
            open_session(bundle, "token_embedding", backend=backend)
    with pytest.raises(UsageError, match="one of token_embedding, got 'base'"):
        open_session(bundle, "base")


def test_a_missing_onnx_runtime_is_answered_with_the_extra(tmp_path, monkeypatch):
    bundle = Bundle.open(write_tiny_bundle(tmp_path / "b"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for backend, extra in (("onnxruntime", "cpu"), ("onnxruntime-cuda", "cuda")):
        with pytest.raises(MissingError) as caught:
            open_session(bundle, "token_embedding", backend=backend)
        assert caught.value.fix == install(extra)


def test_cuda_is_missing_where_the_provider_is(tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(MissingError, match="CUDAExecutionProvider"):
        open_session(
            Bundle.open(write_tiny_bundle(tmp_path / "b")), "token_embedding", backend="onnxruntime-cuda"
        )


def test_the_twin_has_its_caches_in_float32():
    inputs, outputs = boundary()
    narrow = [replace(t, dtype="bfloat16") if "key" in t.name else t for t in inputs]
    from engines.bundle.manifest import ComponentSpec

    spec = ComponentSpec("m.onnx", "t.onnx", "g", tuple(narrow), tuple(outputs))
    assert module.twin_spec(spec).inputs == tuple(inputs)


WIDTH = 11008  # STAR-3B's largest inner size


@pytest.fixture(params=["int4", "int8"])
def product(request, tmp_path):
    """(run, x, weight, block): a graph that multiplies x [2,K] by a weight [K,32] in int4 or int8, of real
    width. Its fast path rounds x in blocks of `block`."""
    import onnxruntime
    from onnx import TensorProto, helper

    from engines.bundle.manifest import TensorSpec
    from tests.helpers.tiny_bundle import model_from_nodes

    rng = np.random.default_rng(0)
    top = 7 if request.param == "int4" else 127
    codes, x = rng.integers(-top, top + 1, (WIDTH, 32)), rng.standard_normal((2, WIDTH), dtype=np.float32)
    form = {"axis": 0, "block_size": 128} if request.param == "int4" else {"axis": 1}
    scales = (
        rng.uniform(0.5, 1, (WIDTH // 128, 32) if request.param == "int4" else 32).astype(np.float32) / top
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], **form),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    model = model_from_nodes(
        nodes,
        [TensorSpec("x", "float32", ("B", WIDTH))],
        [TensorSpec("y", "float32", ("B", 32))],
        {"s": scales},
    )
    kind = getattr(TensorProto, request.param.upper())
    model.graph.initializer.append(helper.make_tensor("w", kind, codes.shape, codes.flatten().tolist()))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())

    def run(exact):
        session = module._inference_session(
            onnxruntime,
            tmp_path / "model.onnx",
            module._config_entries(request.param, exact=exact),
            [(module.PROVIDERS["cpu"], {})],
            fused=False,
            save_to=None,
        )
        return session.run(None, {"x": x})[0]

    block = 128 if request.param == "int4" else module.ACTIVATION_BLOCK
    return run, x, codes * (scales.repeat(128, 0) if scales.ndim == 2 else scales), block


def test_the_exact_path_multiplies_quantised_weights_in_float32(product):
    run, x, weight, _ = product
    wanted = x.astype(np.float64) @ weight
    assert np.abs(run(exact=True) - wanted).max() < 1e-5 * wanted.std()


def test_the_fast_path_rounds_activations_to_int8_in_blocks_and_nothing_else(product):
    run, x, weight, block = product
    blocks = x.reshape(2, -1, block)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    rounded = (np.round(blocks / scales) * scales).reshape(2, -1).astype(np.float64)
    wanted, got = x.astype(np.float64) @ weight, run(exact=False)
    assert 1e-3 < np.abs(got - wanted).max() / wanted.std() < 0.05  # this test can see the rounding
    # A number in the middle of two steps may be rounded either way.
    assert np.abs(got - rounded @ weight).max() < 3e-4 * wanted.std()


def test_memory_of_a_device_starts_at_zero_and_keeps_bfloat16_bits():
    """On the CPU, by the code that serves CUDA; what copies between the two is left to `gpu` tests."""
    import ml_dtypes

    buffer = module.DeviceBuffer((2, 3), "bfloat16", device="cpu")
    assert not float32_from_bfloat16(buffer.value.data_ptr(), (2, 3)).any()
    numbers = np.array([[1, -2.5, 3e38], [0, 1e-3, np.inf]]).astype(ml_dtypes.bfloat16)
    buffer.write(numbers)
    np.testing.assert_array_equal(
        float32_from_bfloat16(buffer.value.data_ptr(), (2, 3)), numbers.astype(np.float32)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_bundle_passes_the_ladder_on_cuda(bundle_of, tmp_path, precision):

    from engines.errors import MissingError
    from engines.tensorrt.device import gpus

    try:
        gpus()
    except MissingError as error:
        pytest.skip(f"no GPU: {error.what}")
    from star_export.validator.ladder import validate

    assert validate(shutil.copytree(bundle_of(precision), tmp_path / "b"), backend="onnxruntime-cuda").passed


def test_weights_are_hashed_once_and_while_they_load(tmp_path, monkeypatch):
    """ONNX Runtime loads them before their hash is known, and the session is refused when it differs."""
    import onnxruntime

    from engines.bundle import reader

    bundle, real = Bundle.open(write_tiny_bundle(tmp_path / "b")), reader.sha256_from_file
    hashed, loading = [], []
    load, loaded = onnxruntime.InferenceSession, threading.Event()

    def hash_of(file, **kwargs):
        name = Path(file.name).name
        if name.endswith(".data"):
            loading.append(loaded.wait(5))  # the hash ends after the load
        hashed.append(name)
        return real(file, **kwargs)

    def loads(*args, **kwargs):
        session = load(*args, **kwargs)
        loaded.set()
        return session

    monkeypatch.setattr(reader, "sha256_from_file", hash_of)
    monkeypatch.setattr(onnxruntime, "InferenceSession", loads)
    run(open_session(bundle, "token_embedding"), {"input_ids": IDS})
    assert loading == [True] and sorted(hashed) == ["model.onnx", "model.onnx.data"]
    open_session(bundle, "token_embedding")
    assert len(hashed) == 2


@pytest.mark.parametrize("exact", ["onnxruntime", "onnxruntime-exact"])
def test_flipped_weights_open_no_session(tmp_path, exact):
    root = write_tiny_bundle(tmp_path / "b")
    data = root / "token_embedding/model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="sha256"):
        open_session(Bundle.open(root), "token_embedding", backend=exact)


def test_weights_that_are_exchanged_and_put_back_while_they_load_change_nothing(tmp_path, monkeypatch):
    """docs/bad_inputs.md 26: their folder is another one while they are opened, and no file notices."""
    import onnxruntime

    root, load = write_tiny_bundle(tmp_path / "b"), onnxruntime.InferenceSession
    right, other, aside = root / "token_embedding", tmp_path / "other", tmp_path / "aside"
    wanted = run(open_session(Bundle.open(root), "token_embedding"), {"input_ids": IDS})["inputs_embeds"]
    shutil.copytree(right, other)
    data = other / "model.onnx.data"
    data.write_bytes(bytes(len(data.read_bytes())))

    def loads(*args, **kwargs):
        right.rename(aside)
        other.rename(right)
        try:
            return load(*args, **kwargs)
        finally:
            right.rename(other)
            aside.rename(right)

    monkeypatch.setattr(onnxruntime, "InferenceSession", loads)
    got = run(open_session(Bundle.open(root), "token_embedding"), {"input_ids": IDS})["inputs_embeds"]
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what a process holds")
def test_what_a_first_run_takes_goes_back(tmp_path):
    """A prefill is far wider than a step, and what it took would be kept. In a process of its own."""
    root = tmp_path / "b"
    nodes = [
        helper.make_node("Constant", [], ["repeats"], value_ints=[1, 5_000_000, 1]),
        helper.make_node("Constant", [], ["axes"], value_ints=[1]),
        helper.make_node("Gather", ["table", "input_ids"], ["row"]),
        helper.make_node("Tile", ["row", "repeats"], ["wide"]),  # 240 MB
        helper.make_node("Relu", ["wide"], ["positive"]),
        helper.make_node("ReduceMax", ["positive", "axes"], ["largest"]),
        helper.make_node("Add", ["row", "largest"], ["inputs_embeds"]),
    ]
    spec = Bundle.open(write_tiny_bundle(root)).component("token_embedding")
    model = model_from_nodes(nodes, spec.inputs, spec.outputs, {"table": np.ones((8, 4), np.float32)})
    component = write_component(root, "token_embedding", model, spec.inputs, spec.outputs)
    write_manifest(root, {"token_embedding": component})
    program = """
import resource, sys
from pathlib import Path
import numpy as np
from engines.bundle.reader import Bundle
from engines.sessions import open_session, run
session = open_session(Bundle.open(sys.argv[1]), "token_embedding")
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
before = pages()
run(session, {"input_ids": np.array([[0, 3, 7]])})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
print(before, peak, pages())
"""
    before, peak, after = map(int, subprocess.check_output([sys.executable, "-c", program, root]).split())
    assert peak - before > 200 and after - before < 50, (before, peak, after)
