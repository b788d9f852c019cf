"""The clients that docs/serving.md names: the bodies that they send, and those that are installed against a server.

`tests/serving/test_app.py` uses `openai`, and `tests/serving/test_lm_eval.py` `lm_eval`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_model import Running, running_server

BODIES: dict[str, dict[str, Any]] = {
    "guidellm 0.8.1": {
        "model": "engine",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 8,
        "stop": None,
        "ignore_eos": True,
        "prompt": "The lamp number 0",
    },
    "vLLM's benchmark": {
        "model": "engine",
        "prompt": "The lamp",
        "best_of": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 8,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
    },
    "litellm 1.110.2": {
        "model": "engine",
        "prompt": "The lamp",
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "langchain-openai 1.7.4": {
        "model": "engine",
        "prompt": ["The lamp", "A cat"],
        "frequency_penalty": 0,
        "logprobs": None,
        "max_tokens": 4,
        "n": 1,
        "presence_penalty": 0,
        "seed": None,
        "temperature": 0.7,
        "top_p": 1,
    },
    "llama-index-llms-openai-like 0.8.1": {
        "model": "engine",
        "prompt": "The lamp",
        "max_tokens": 4,
        "stream": False,
        "temperature": 0.1,
    },
    "llm 0.32.1": {"model": "engine", "prompt": "The lamp", "stream": True, "stream_options": {"include_usage": True}},
}
"""What each client sent to a server that recorded it, or what its code builds."""


@pytest.fixture(scope="module")
def running(tiny_engine_folder: Path) -> Iterator[Running]:
    with running_server(tiny_engine_folder) as server:
        yield server


@pytest.mark.parametrize("client", BODIES)
def test_what_a_client_sends_is_answered(client: str, running: Running) -> None:
    body = BODIES[client]
    answer = running.post(**body)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        usage = json.loads(events[-2])["usage"]
    else:
        usage = answer.json()["usage"]
    assert usage["completion_tokens"] > 0


def test_litellm_completes_and_streams(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    asked = {"model": "text-completion-openai/engine", "api_base": f"{running.url}/v1", "api_key": "none"}
    whole = litellm.text_completion(**asked, prompt="The lamp", max_tokens=9, seed=5).choices[0].text
    pieces = litellm.text_completion(**asked, prompt="The lamp", max_tokens=9, seed=5, stream=True)
    assert whole
    assert "".join(piece.choices[0].text or "" for piece in pieces) == whole


def test_langchain_completes_and_streams(running: Running) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = langchain_openai.OpenAI(
        model="engine", base_url=f"{running.url}/v1", api_key="none", max_tokens=9, seed=5, temperature=0.7
    )
    whole = model.invoke("The lamp")
    assert whole
    assert "".join(model.stream("The lamp")) == whole


def test_llama_index_completes_and_streams(running: Running) -> None:
    openai_like = pytest.importorskip("llama_index.llms.openai_like", reason="llama-index is not installed")
    model = openai_like.OpenAILike(
        model="engine",
        api_base=f"{running.url}/v1",
        api_key="none",
        is_chat_model=False,
        max_tokens=9,
        context_window=64,
        additional_kwargs={"seed": 5},
    )
    whole = model.complete("The lamp").text
    assert whole
    assert "".join(piece.delta or "" for piece in model.stream_complete("The lamp")) == whole


def test_llm_completes_and_streams(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: engine, model_name: engine, api_base: {running.url}/v1, completion: true}}\n"
    )
    llm = pytest.importorskip("llm", reason="llm is not installed")
    model = llm.get_model("engine")
    model.key = "none"
    whole = model.prompt("The lamp", stream=False, max_tokens=9, seed=5).text()
    assert whole
    assert model.prompt("The lamp", stream=True, max_tokens=9, seed=5).text() == whole
