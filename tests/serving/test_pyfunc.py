"""The model class as MLflow saves and loads it from code; `tests/stages/test_register.py` tests it in the registry."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from saved_model import DECODING, PRESETS, save
from served_model import wait_for
from tiny_gpt2 import TINY_LEXICON
from tokenizers import Tokenizer

import pipeline
from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError
from pipeline.serving import pyfunc

SEEDED = {"seed": 5}


@pytest.fixture(scope="module")
def saved(tiny_engine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pyfunc"), tiny_engine_folder)


@pytest.fixture(scope="module")
def backwards(tiny_engine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version whose code reads a prompt from its end, and accepts fewer choices."""
    folder = tmp_path_factory.mktemp("backwards")
    package = Path(pipeline.__file__).parent
    shutil.copytree(package, folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text, other in (
        ("serving/worker.py", "prompt_ids(generator.tokenizer, text)", "prompt_ids(generator.tokenizer, text[::-1])"),
        ("decoding.py", "MOST_CHOICES = 1024", "MOST_CHOICES = 3"),
    ):
        source = (package / name).read_text(encoding="utf-8")
        assert source.count(text) == 1
        (folder / "pipeline" / name).write_text(source.replace(text, other), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "__file__", str(folder / "pipeline" / "__init__.py"))
        return save(folder, tiny_engine_folder)


@pytest.fixture(scope="module")
def model(saved: Path) -> Any:
    return mlflow.pyfunc.load_model(str(saved), model_config={"provider": "cpu"})


@pytest.fixture
def generator(tiny_engine: Engine, tiny_tokenizer: Tokenizer) -> TextGenerator:
    return TextGenerator(tiny_engine, tiny_tokenizer, TINY_LEXICON)


def complete(generator: TextGenerator, prompts: list[str], decoding: SamplingParams) -> list[str]:
    return [done.text for done in generator.complete(prompts, [decoding] * len(prompts))]


def test_callers_of_several_threads_do_not_mix(saved: Path) -> None:
    model = mlflow.pyfunc.load_model(str(saved), model_config={"provider": "cpu"})
    asked = [([f"The {word}"], {"seed": seed, "max_new_tokens": 12}) for seed, word in enumerate(["lamp", "cat"] * 4)]
    expected = [model.predict(prompts, params=params) for prompts, params in asked]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: model.predict(pair[0], params=pair[1]), asked))
    assert found == expected


def test_unset_parameters_are_the_packed_decoding(model: Any, generator: TextGenerator) -> None:
    decoding = SamplingParams.from_mapping({**DECODING.to_mapping(), **SEEDED})
    expected = complete(generator, ["The lamp", ""], decoding)
    assert model.predict(["The lamp", ""], params=SEEDED) == expected
    assert model.predict(pd.DataFrame({"prompt": ["The lamp", ""]}), params=SEEDED) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_replaces_the_packed_decoding(name: str, model: Any, generator: TextGenerator) -> None:
    preset = replace(PRESETS[name], seed=5)
    params = {"preset": name} | SEEDED
    (expected,) = complete(generator, ["The lamp"], preset)
    assert model.predict(["The lamp"], params=params) == [expected]
    assert "".join(model.predict_stream("The lamp", params=params)) == expected
    # Other parameters override it.
    others = params | {"temperature": 1.7, "max_new_tokens": 9, "stop": ["z"]}
    changed = replace(preset, temperature=1.7, max_new_tokens=9, stop=("z",))
    assert model.predict(["The lamp"], params=others) == complete(generator, ["The lamp"], changed)


def test_an_unknown_preset_is_the_callers_error(model: Any) -> None:
    for asked in (model.predict, lambda prompts, params: list(model.predict_stream(prompts[0], params=params))):
        with pytest.raises(MlflowException, match="preset: 'x' is none of balanced, faithful, adventurous") as raised:
            asked(["N"], params={"preset": "x"})
        assert raised.value.get_http_status_code() == 400  # type: ignore[no-untyped-call]


def test_every_kind_of_parameter_reaches_the_engine(model: Any, generator: TextGenerator) -> None:
    params = {
        "temperature": 1.2,
        "repetition_penalty": 1.3,
        "max_new_tokens": 9,
        "n": 2,
        "best_of": 3,
        "ignore_eos": True,
        "banned_token_ids": [3, 4],
        "stop": ["q"],
        "logit_bias_ids": [5, 6],
        "logit_bias_values": [3.5, -1.0],
    }
    decoding = SamplingParams(
        temperature=1.2,
        top_k=40,
        repetition_penalty=1.3,
        max_new_tokens=9,
        n=2,
        best_of=3,
        ignore_eos=True,
        banned_token_ids=(3, 4),
        stop=("q",),
        logit_bias={5: 3.5, 6: -1.0},
        seed=5,
    )
    found = model.predict(["The lamp", "N"], params=params | SEEDED)
    assert found == complete(generator, ["The lamp", "N"], decoding)
    assert len(found) == 4


def test_a_loop_ends_the_text(model: Any) -> None:
    looping = {"logit_bias_ids": [65], "logit_bias_values": [100.0], "repetition_detection": [4, 3]}
    (text,) = model.predict(["The lamp"], params=looping | SEEDED)
    assert (len(text), len(set(text))) == (3, 1)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"repetition_detection": [4, 1]}, "repetition_detection: 1 is out of range, must be at least 2"),
        ({"top_p": 1.5}, r"top_p: 1\.5 is out of range, must be in \(0, 1\]"),
        ({"logit_bias_ids": [3]}, "logit_bias_values: 0 values for 1 ids"),
        ({"banned_token_ids": [300]}, "banned_token_ids: no token has the id 300"),
        ({"n": 1025}, "n: 1025 is out of range, must be at most 1024"),
        ({"best_of": 10**9}, "best_of: 1000000000 is out of range, must be at most 1024"),
    ],
)
def test_a_wrong_value_is_the_callers_error(model: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(MlflowException, match=message) as raised:
        model.predict(["N"], params=params)
    assert raised.value.get_http_status_code() == 400  # type: ignore[no-untyped-call]


def test_any_number_of_rows_is_drawn_in_turns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"The {word}" for word in ("lamp", "cat", "rope", "tide", "gull", "")]
    params = {**SEEDED, "n": 2}
    expected = model.predict(rows, params=params)
    own = type(model.unwrap_python_model())._worker.fget.__globals__
    asked: list[int] = []
    run_job = own["run_job"]

    def noted(worker: Any, prompts: list[Any], decoding: SamplingParams) -> Any:
        asked.append(len(prompts))
        return run_job(worker, prompts, decoding)

    monkeypatch.setitem(own, "run_job", noted)
    monkeypatch.setitem(own, "CONTINUATIONS_AT_ONCE", 8)
    assert model.predict(rows, params=params) == expected
    assert asked == [4, 2]
    monkeypatch.setitem(own, "CONTINUATIONS_AT_ONCE", 1)
    assert model.predict(rows, params=params) == expected


def test_a_model_that_is_dropped_gives_its_memory_back(saved: Path) -> None:
    dropped = mlflow.pyfunc.load_model(str(saved), model_config={"provider": "cpu"})
    assert dropped.predict(["The lamp"], params=SEEDED)
    engine = weakref.ref(dropped.unwrap_python_model()._worker.generator)
    del dropped
    # MLflow keeps what was loaded last.
    other = mlflow.pyfunc.load_model(str(saved), model_config={"provider": "cpu"})

    def is_gone() -> bool:
        gc.collect()
        return engine() is None

    wait_for(is_gone)
    assert other.predict(["The lamp"], params=SEEDED)


def test_a_prompt_that_is_no_text_is_the_callers_error(model: Any) -> None:
    with pytest.raises(MlflowException, match="row 1: expected a text to continue") as raised:
        model.predict(pd.DataFrame({"prompt": ["N", None]}))
    assert raised.value.get_http_status_code() == 400  # type: ignore[no-untyped-call]


def test_a_wrong_type_is_refused_by_the_signature(model: Any) -> None:
    with pytest.raises(MlflowException, match="temperature"):
        model.predict(["N"], params={"temperature": "hot"})


def test_model_config_chooses_the_precision(saved: Path) -> None:
    # A UserError of the model's own code.
    with pytest.raises(
        ValueError, match=r"^precision: .* holds float32, float16, int8, int4, int8_float16, not 'int3'$"
    ):
        mlflow.pyfunc.load_model(str(saved), model_config={"precision": "int3"})


@pytest.mark.parametrize("threads", [1, 2])
def test_model_config_chooses_the_threads(threads: int, saved: Path) -> None:
    model = mlflow.pyfunc.load_model(str(saved), model_config={"provider": "cpu", "threads": threads})
    session = model.unwrap_python_model()._worker.generator.engine.session
    assert session.graph.get_session_options().intra_op_num_threads == threads


def test_model_config_refuses_threads_that_are_no_count(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"^threads: 0 must be a whole number from 1"):
        mlflow.pyfunc.load_model(str(saved), model_config={"provider": "cpu", "threads": 0})


def test_a_stream_gives_the_same_text_in_pieces(model: Any) -> None:
    (expected,) = model.predict(["The lamp"], params=SEEDED)
    pieces = list(model.predict_stream("The lamp", params=SEEDED))
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_a_stream_that_is_left_frees_its_slot(model: Any) -> None:
    endless = {"max_new_tokens": 10_000, "context_overflow": "slide", "ignore_eos": True}
    stream = model.predict_stream("The lamp", params=endless)
    next(stream)
    stream.close()
    assert model.predict(["The lamp"], params=SEEDED)


def test_a_stream_is_of_one_continuation(model: Any) -> None:
    with pytest.raises(MlflowException, match="n: a stream is one continuation, got 2"):
        list(model.predict_stream("a", params={"n": 2}))


FORKED = """
import multiprocessing, os, sys
import mlflow

model = mlflow.pyfunc.load_model(sys.argv[1], model_config={"provider": "cpu"})
ask = lambda prompt: model.predict([prompt], params={"seed": 5})


def child(prompt):
    return ask(prompt)


streamed = model.predict_stream("The lamp", params={"seed": 5})
next(streamed)


def rest(_):
    try:
        return list(streamed)
    except RuntimeError as error:
        return str(error)


own = [ask("The lamp"), ask("A cat")]
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(child, ["The lamp", "A cat"] * 2).get(60) == own * 2
    assert "forked" in pool.apply_async(rest, [0]).get(60)
assert [ask("The lamp"), ask("A cat")] == own
if os.fork() == 0:
    assert ask("The lamp") == own[0]
    sys.exit()
assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_a_forked_process_predicts_the_same(saved: Path) -> None:
    """It has none of the threads of its parent, and would wait for ever on the parent's engine."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(saved)], capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stderr


def test_versions_with_other_code_run_side_by_side(saved: Path, backwards: Path, model: Any) -> None:
    other = mlflow.pyfunc.load_model(str(backwards), model_config={"provider": "cpu"})
    again = mlflow.pyfunc.load_model(str(saved), model_config={"provider": "cpu"})
    for prompt in ("The lamp", "A cat"):
        expected = model.predict([prompt], params=SEEDED)
        assert again.predict([prompt], params=SEEDED) == expected
        assert other.predict([prompt[::-1]], params=SEEDED) == expected != other.predict([prompt], params=SEEDED)
    for each, most in ((model, 1024), (other, 3), (again, 1024)):
        with pytest.raises(MlflowException, match=f"n: 1025 is out of range, must be at most {most}"):
            each.predict(["N"], params={"n": 1025})
    # One version's code is imported once, and the checkout's is another.
    generators = [each.unwrap_python_model()._worker.generator for each in (model, other, again)]
    first, second, third = (type(generator) for generator in generators)
    assert first is third
    assert len({first, second, TextGenerator}) == 3


SIDE_BY_SIDE = """
import json, sys
import mlflow

models = [mlflow.pyfunc.load_model(folder, model_config={"provider": "cpu"}) for folder in sys.argv[1:]]
assert "pipeline" not in sys.modules
print(json.dumps([model.predict(["The lamp"], params={"seed": 5}) for model in models * 2]))
"""


@pytest.mark.parametrize("order", [1, -1])
def test_versions_load_in_either_order_in_a_process_of_their_own(
    order: int, saved: Path, backwards: Path, model: Any
) -> None:
    forwards, reversed_ = model.predict(["The lamp"], params=SEEDED), model.predict(["pmal ehT"], params=SEEDED)
    folders = [str(saved), str(backwards)][::order]
    done = subprocess.run(
        [sys.executable, "-c", SIDE_BY_SIDE, *folders], capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [forwards, reversed_][::order] * 2


def test_logit_bias_is_made_of_two_lists() -> None:
    assert pyfunc.read_logit_bias([3, 5], [1.0, -2.0]) == {3: 1.0, 5: -2.0}
    with pytest.raises(UserError, match=r"^logit_bias_values: 1 values for 2 ids in logit_bias_ids$"):
        pyfunc.read_logit_bias([3, 5], [1.0])
