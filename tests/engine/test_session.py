"""Loading an engine, its files and providers, and what a session computes in each precision."""

import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import GPT2LMHeadModel

from pipeline.engine import Engine, SamplingParams
from pipeline.engine.cuda import driver
from pipeline.engine.manifest import FORMAT_VERSION, GRAPH_FILE, MANIFEST_FILE
from pipeline.engine.memory import HostMemory
from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.tokens import TOKENIZER_FILE

OBSTACLES = driver.obstacles()
HAS_DRIVER = driver.driver() is not None


@pytest.fixture
def engine_folder(tiny_engine_folder: Path, tmp_path: Path) -> Path:
    """A copy, to be spoiled."""
    return shutil.copytree(tiny_engine_folder, tmp_path / "engine")


def change_manifest(folder: Path, **values: object) -> None:
    write_json(folder / MANIFEST_FILE, {**read_json(folder / MANIFEST_FILE), **values})


def test_auto_takes_the_first_precision_and_a_provider_that_runs(tiny_engine_folder: Path) -> None:
    engine = Engine.load(tiny_engine_folder)
    assert engine.session.precision == "float32"
    assert engine.session.provider == ("cpu" if OBSTACLES else "cuda")
    assert (engine.context_length, engine.end_of_text_id) == (64, 0)


def test_a_path_may_be_a_string(tiny_engine_folder: Path) -> None:
    engine = Engine.load(str(tiny_engine_folder), precision="float32", provider="cpu", threads=2)
    assert len(engine.generate([[5]], SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=2))[0].token_ids)


def test_an_unknown_precision_is_refused(tiny_engine_folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"^precision: .* holds float32, float16, int8, int4, int8_float16, not 'int3'$"
    ):
        Engine.load(tiny_engine_folder, precision="int3")


def test_an_unknown_provider_is_refused(tiny_engine_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^provider: 'tpu' is none of auto, cpu, cuda$"):
        Engine.load(tiny_engine_folder, provider="tpu")


@pytest.mark.skipif(not OBSTACLES, reason="CUDA runs here")
def test_cuda_that_cannot_run_is_an_error_that_says_why(tiny_engine_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^provider: CUDA does not run here: .*(driver|CUDA provider)"):
        Engine.load(tiny_engine_folder, provider="cuda")


@pytest.mark.skipif(not OBSTACLES, reason="CUDA runs here")
def test_auto_takes_the_processor_and_says_why(tiny_engine_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert Engine.load(tiny_engine_folder, provider="auto").session.provider == "cpu"
    (line,) = caplog.messages
    assert line.startswith("provider: cpu (CUDA does not run here: ")


@pytest.mark.skipif(HAS_DRIVER, reason="has a driver")
def test_a_driver_without_the_libraries_is_no_cuda(
    tiny_engine_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A library that always exists replaces the driver.
    monkeypatch.setattr(driver, "DRIVER_LIBRARIES", ("libc.so.6",))
    monkeypatch.setattr(driver.ort, "get_available_providers", lambda: [driver.PROVIDER, driver.PROCESSOR])
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert Engine.load(tiny_engine_folder, provider="auto").session.provider == "cpu"
    assert "libraries of CUDA 13 are missing: " in caplog.messages[0]
    assert "libcublasLt.so.13" in caplog.messages[0]
    with pytest.raises(UserError, match=r"^provider: CUDA does not run here: .*; install them by pip install"):
        Engine.load(tiny_engine_folder, provider="cuda")


def test_a_package_that_hides_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.ort, "get_available_providers", lambda: [driver.PROCESSOR])
    monkeypatch.setattr(driver, "_installed", lambda: {"onnxruntime", "onnxruntime-gpu", "numpy"})
    assert str(driver.obstacles()[0]).startswith("onnxruntime is installed over onnxruntime-gpu, and hides its CUDA")
    monkeypatch.setattr(driver, "_installed", lambda: {"onnxruntime"})
    assert str(driver.obstacles()[0]).startswith(
        "this build of onnxruntime has no CUDA provider; install onnxruntime-gpu"
    )


def test_where_each_node_runs_is_known(tiny_engine_folder: Path) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    file = tiny_engine_folder / "float16" / GRAPH_FILE
    graph = ort.InferenceSession(str(file), options, providers=[driver.PROCESSOR])
    assert "GroupQueryAttention h.0.attention" in driver.nodes_elsewhere(graph)


def test_cuda_wants_its_own_precision(tiny_engine_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "obstacles", list)
    with pytest.raises(
        UserError, match=r"^provider: CUDA runs float16 or int8_float16, and .* was asked for int8; ask"
    ):
        Engine.load(tiny_engine_folder, provider="cuda", precision="int8")


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-4), ("float16", 0.5), ("int8", 4), ("int4", 15), ("int8_float16", 4)]
)
def test_every_precision_runs_here_and_says_nearly_the_same(
    precision: str, tolerance: float, tiny_engine_folder: Path, tiny_model: GPT2LMHeadModel
) -> None:
    engine = Engine.load(tiny_engine_folder, precision=precision, provider="cpu", threads=1)
    text = [(17 * index) % 300 for index in range(40)]
    with torch.inference_mode():
        expected = tiny_model(torch.tensor([text])).logits[0].numpy()
    np.testing.assert_allclose(engine.session.read(text, 0)[0], expected, atol=tolerance, rtol=0)
    engine.session.prefill(1, text[:30], 0)
    engine.session.prefill(0, text[:20], 0)
    engine.session.decode([text[20], text[30]], [20, 30])
    # The same weights in another batch: rounding of activations at most.
    np.testing.assert_allclose(engine.session.logits[:2], engine.session.read(text, 0)[0][[20, 30]], atol=tolerance / 2)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float16", 0.05), ("int8", 1.5)])
def test_states_are_what_pytorch_makes_its_logits_of(
    precision: str, tolerance: float, tiny_engine_folder: Path, tiny_model: GPT2LMHeadModel
) -> None:
    session = Engine.load(tiny_engine_folder, precision=precision, provider="cpu", threads=1).session
    text = [(17 * index) % 300 for index in range(40)]
    with torch.inference_mode():
        expected = tiny_model.transformer(torch.tensor([text])).last_hidden_state[0].numpy()
    alone = session.read(text, 0)[0]
    logits, states = session.read(text, 0, states=True)
    np.testing.assert_allclose(states, expected, atol=tolerance, rtol=0)
    np.testing.assert_array_equal(logits, alone)
    # The output that was bound for the states is not written when they are not asked for.
    del states
    np.testing.assert_array_equal(session.read(text, 0)[0], alone)


def test_a_graph_without_states_is_refused(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.session.STATES", "of_later_days")
    with pytest.raises(UserError, match="exported without hidden states; export"):
        tiny_engine.session.read([1, 2], 0, states=True)


def test_a_prompt_read_in_passes_gives_the_same(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny_engine.session
    text = [(17 * index) % 300 for index in range(20)]
    session.prefill(4, text, 0)
    expected = session.logits[4].copy()
    monkeypatch.setattr("pipeline.engine.session.CPU_PASS_TOKENS", 7)
    session.prefill(3, text, 0)
    np.testing.assert_allclose(session.logits[3], expected, atol=1e-4)


def test_a_slot_is_copied_with_what_it_holds(tiny_engine: Engine) -> None:
    session = tiny_engine.session
    text = [(17 * index) % 300 for index in range(20)]
    session.prefill(4, text[:19], 0)
    session.copy(4, 0, 19)
    session.decode([text[19]], [19])
    np.testing.assert_allclose(session.logits[0], session.read(text, 0)[0][-1], atol=1e-4)


def test_nothing_is_allocated_for_a_slot_that_is_not_used(tiny_engine_folder: Path) -> None:
    # 6.5 GB, were they touched.
    session = Engine.load(tiny_engine_folder, provider="cpu", slots=200_000, threads=1).session
    session.decode([5], [0])
    assert np.isfinite(session.logits[0]).all()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says in /proc what memory a process holds")
def test_a_slot_takes_up_memory_as_its_text_grows() -> None:
    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before = resident_mb()
    # 134 MB, of which the first ten tokens are a hundredth, in pages of 4 kB.
    cache = HostMemory().zeros((2, 256, 4096, 64), np.int8)
    assert cache.array is not None
    assert not cache.array[1, :, -1].any()
    cache.array[0, :, :10] = 1
    assert resident_mb() - before < 20
    assert cache.array[0].sum() == 256 * 10 * 64


def test_a_folder_without_an_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no engine \(engine\.json is missing\)"):
        Engine.load(tmp_path)


def test_a_foreign_format_version_is_refused(engine_folder: Path) -> None:
    change_manifest(engine_folder, format_version=1, something_new=True)
    with pytest.raises(UserError, match=rf"format version 1 is not the {FORMAT_VERSION} that this code reads; export"):
        Engine.load(engine_folder)


def test_a_manifest_that_is_cut_off_is_refused(engine_folder: Path) -> None:
    file = engine_folder / MANIFEST_FILE
    file.write_text(file.read_text()[:40])
    with pytest.raises(UserError, match=r"engine\.json: not JSON: .*; export the checkpoint again$"):
        Engine.load(engine_folder)


@pytest.mark.parametrize("name", [f"float32/{GRAPH_FILE}", TOKENIZER_FILE])
def test_a_missing_file_is_named(engine_folder: Path, name: str) -> None:
    (engine_folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing; export the checkpoint again$"):
        Engine.load(engine_folder)


@pytest.mark.parametrize("name", [f"float32/{GRAPH_FILE}", TOKENIZER_FILE])
def test_a_changed_file_is_named(engine_folder: Path, name: str) -> None:
    data = bytearray((engine_folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (engine_folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: its SHA-256 is not the one in engine\.json; export"):
        Engine.load(engine_folder)


def test_the_manifest_describes_the_model_and_every_file(tiny_engine_folder: Path) -> None:
    manifest = read_json(tiny_engine_folder / MANIFEST_FILE)
    assert {name: manifest[name] for name in ("context_length", "vocabulary_size", "layers", "heads", "width")} == {
        "context_length": 64,
        "vocabulary_size": 300,
        "layers": 2,
        "heads": 2,
        "width": 32,
    }
    files = {
        path.relative_to(tiny_engine_folder).as_posix() for path in tiny_engine_folder.rglob("*") if path.is_file()
    }
    assert set(manifest["files"]) == files - {MANIFEST_FILE}
