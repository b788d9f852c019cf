"""The server over a socket: answers, streams, errors, keys and limits, also through `openai`'s own client."""

import asyncio
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from served_model import DECODING, PATIENCE_S, SLOTS, Running, running_server, served_folder, wait_for
from tiny_gpt2 import TINY_LEXICON

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.engine.sampler import Continuation
from pipeline.engine.text import TextGenerator
from pipeline.errors import UserError
from pipeline.serving.app import BodyLimit, create_app, playground
from pipeline.serving.completions import in_thread, to_json
from pipeline.serving.options import Access, Address, Limits, keys_from_environment
from pipeline.tokens import prompt_ids

ENDLESS = {"max_tokens": 60, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def running(tiny_engine_folder: Path) -> Iterator[Running]:
    with running_server(tiny_engine_folder) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: Running) -> OpenAI:
    return OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def generator(tiny_engine: Engine, tiny_tokenizer: Any) -> TextGenerator:
    return TextGenerator(tiny_engine, tiny_tokenizer, TINY_LEXICON)


def events(response: requests.Response) -> list[dict[str, Any]]:
    """Return the events of a stream without its `[DONE]`, which must be the last."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_openais_client_completes(client: OpenAI, generator: TextGenerator) -> None:
    (expected,) = generator.complete(["The lamp"], [SamplingParams(temperature=0.7, max_new_tokens=20, seed=5)])
    found = client.completions.create(
        model="engine", prompt="The lamp", temperature=0.7, top_p=1, max_tokens=20, seed=5
    )
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.system_fingerprint == "engine/float32"
    assert found.usage is not None
    tokens = len(prompt_ids(generator.tokenizer, "The lamp"))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (tokens, len(expected.token_ids))


def test_openais_client_streams_what_it_completes(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "engine", "prompt": "The lamp", "max_tokens": 30, "seed": 4, "n": 2}
    whole = client.completions.create(**asked)
    texts, reasons = ["", ""], ["", ""]
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_the_best_of_several_are_those_of_the_generator(
    stream: bool, client: OpenAI, running: Running, generator: TextGenerator
) -> None:
    params = replace(DECODING.default, n=2, best_of=4, seed=4, max_new_tokens=16)
    expected = [done.text for done in generator.complete(["The lamp"], [params])]
    asked: dict[str, Any] = {"model": "engine", "prompt": "The lamp", "max_tokens": 16, "seed": 4, "n": 2, "best_of": 4}
    if stream:
        texts = ["", ""]
        for chunk in client.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        texts = [choice.text for choice in client.completions.create(**asked).choices]
    assert texts == expected
    wait_for(lambda: running.metric("pipeline_cache_slots_used") == 0)


def test_openais_client_lists_models(client: OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "engine"
    assert client.models.retrieve("engine") == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_a_stream_ends_with_its_usage(running: Running) -> None:
    found = events(running.post(prompt="The lamp", seed=3, stream=True))
    assert [("usage" in event) for event in found] == [*([False] * (len(found) - 1)), True]
    assert found[-1]["usage"] == running.post(prompt="The lamp", seed=3).json()["usage"]
    assert found[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_every_event_reports_the_usage_so_far_where_asked(running: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(running.post(prompt="The lamp", seed=3, stream=True, stream_options=options))
    usage = running.post(prompt="The lamp", seed=3).json()["usage"]
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] == usage["completion_tokens"]
    assert {event["usage"]["prompt_tokens"] for event in found} == {usage["prompt_tokens"]}
    assert (found[-1]["choices"], found[-1]["usage"]) == ([], usage)


def test_a_prompt_longer_than_the_context_is_taken_as_the_error_advises(running: Running) -> None:
    asked = {"prompt": "the lamp " * 100, "max_tokens": 5, "ignore_eos": True}
    refused = running.post(**asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert refused.json()["error"]["message"].endswith("or set context_overflow to slide")
    taken = running.post(**asked, context_overflow="slide")
    assert (taken.status_code, taken.json()["usage"]["completion_tokens"]) == (200, 5)


def test_every_parameter_reaches_the_engine(running: Running, generator: TextGenerator) -> None:
    params = SamplingParams(
        temperature=1.2,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        typical_p=0.95,
        top_n_sigma=3.5,
        eta_cutoff=0.001,
        repetition_penalty=1.1,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        no_repeat_ngram_size=3,
        repetition_detection=(4, 2, 2),
        logit_bias={5: 3.5},
        min_new_tokens=4,
        max_new_tokens=25,
        stop=("q",),
        stop_token_ids=(9,),
        banned_token_ids=(8,),
        context_overflow="slide",
        seed=11,
        n=2,
        best_of=3,
    )
    values = params.to_mapping()
    # A new parameter is set above, or listed here because another test sends it.
    elsewhere = {"allowed_token_ids", "max_verbatim_tokens", "ignore_eos", "logprobs"}
    assert {field.name for field in fields(SamplingParams)} - values.keys() == elsewhere
    names = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
    body = {names.get(name, name): value for name, value in values.items()}
    body["logit_bias"] = {"5": 3.5}
    body["repetition_detection"] = {"max_pattern_size": 4, "min_count": 2, "min_pattern_size": 2}
    expected = [done.text for done in generator.complete(["The lamp", "A cat"], [params] * 2)]
    found = running.post(prompt=["The lamp", "A cat"], **body).json()
    assert [choice["text"] for choice in found["choices"]] == expected
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", DECODING.presets)
def test_a_preset_decodes_as_it_says(name: str, client: OpenAI, generator: TextGenerator) -> None:
    preset = replace(DECODING.presets[name], seed=5)
    asked: dict[str, Any] = {"model": "engine", "prompt": "The lamp", "seed": 5, "extra_body": {"preset": name}}
    (expected,) = generator.complete(["The lamp"], [preset])
    assert client.completions.create(**asked).choices[0].text == expected.text
    assert "".join(piece.choices[0].text for piece in client.completions.create(**asked, stream=True)) == expected.text
    # Other fields override it.
    (expected,) = generator.complete(["The lamp"], [replace(preset, temperature=1.7, max_new_tokens=9)])
    assert client.completions.create(**asked, temperature=1.7, max_tokens=9).choices[0].text == expected.text


def test_a_preset_is_described(running: Running) -> None:
    schemas = requests.get(f"{running.url}/openapi.json", timeout=PATIENCE_S).json()["components"]["schemas"]
    preset = schemas["CompletionRequest"]["properties"]["preset"]
    assert "/v1/models lists" in preset["description"]
    assert {"type": "string", "maxLength": 1000} in preset["anyOf"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_ends_with_a_reason_of_its_own(stream: bool, client: OpenAI) -> None:
    # Likely enough that nothing else is drawn.
    asked: dict[str, Any] = {"model": "engine", "prompt": "The lamp", "logit_bias": {"65": 100}, "max_tokens": 30}
    loops = {"repetition_detection": {"max_pattern_size": 4, "min_count": 5}}
    if stream:
        pieces = [piece.choices[0] for piece in client.completions.create(**asked, stream=True, extra_body=loops)]
        text, reason = "".join(piece.text for piece in pieces), pieces[-1].finish_reason
    else:
        found = client.completions.create(**asked, extra_body=loops)
        assert found.usage is not None
        assert found.usage.completion_tokens == 5
        text, reason = found.choices[0].text, found.choices[0].finish_reason
    assert (len(text), len(set(text)), str(reason)) == (5, 1, "repetition")


def test_a_limit_on_copies_needs_an_engine_that_holds_its_text(running: Running) -> None:
    answer = running.post(prompt="The lamp", max_verbatim_tokens=8)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "max_verbatim_tokens")
    assert error["message"].startswith("max_verbatim_tokens: this engine holds no index of its training text; export")


def test_a_request_gives_the_same_alone_and_among_others(running: Running) -> None:
    def ask(seed: int) -> str:
        return str(running.post(prompt="The lamp", **{**ENDLESS, "seed": seed}).json()["choices"][0]["text"])

    alone = ask(7)
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: ask(seed)}))  # type: ignore[misc]
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[7] == alone


def test_token_ids_are_read_as_they_are(running: Running, generator: TextGenerator) -> None:
    ids = prompt_ids(generator.tokenizer, "The lamp")
    by_text = running.post(prompt="The lamp", seed=2).json()["choices"][0]["text"]
    assert running.post(prompt=ids, seed=2).json()["choices"][0]["text"] == by_text
    assert running.post(prompt=[ids, ids], seed=2).json()["choices"][1]["text"] == by_text


def test_an_echo_with_log_probabilities_scores_a_text(running: Running, generator: TextGenerator) -> None:
    ids = generator.tokenizer.encode("The lamp on Gull Rock").ids
    expected = generator.engine.echo(ids, 0, len(ids), 2)
    for most in (0, 1):
        body = running.post(prompt=[ids], echo=True, logprobs=2, max_tokens=most, temperature=0).json()
        (choice,) = body["choices"]
        report = choice["logprobs"]
        assert len(report["tokens"]) == len(ids) + most
        assert report["token_logprobs"][0] is None
        assert report["token_logprobs"][1 : len(ids)] == [token.logprob for token in expected[1:]]
        assert [len(top) for top in report["top_logprobs"][1:]] == [2] * (len(ids) + most - 1)
        assert choice["text"].startswith("The lamp on Gull Rock")
        assert body["usage"]["completion_tokens"] == most
        for token, offset in zip(report["tokens"], report["text_offset"], strict=True):
            assert token.startswith("bytes:") or choice["text"].startswith(token, offset)


def test_streamed_log_probabilities_are_those_of_the_whole(running: Running) -> None:
    asked = {"prompt": "The lamp", "seed": 6, "logprobs": 3, "echo": True, "max_tokens": 20}
    whole = running.post(**asked).json()["choices"][0]
    chunks = [event["choices"][0] for event in events(running.post(**asked, stream=True))]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values


def test_tokenizing_and_back_gives_the_text(running: Running) -> None:
    text = "The lamp, über ☃"
    ids = requests.post(f"{running.url}/tokenize", json={"prompt": text}, timeout=PATIENCE_S).json()
    assert ids["count"] == len(ids["tokens"])
    assert ids["max_model_len"] == 64
    back = requests.post(f"{running.url}/detokenize", json={"tokens": ids["tokens"]}, timeout=PATIENCE_S)
    assert back.json() == {"prompt": text}
    wrong = requests.post(f"{running.url}/detokenize", json={"tokens": [300]}, timeout=PATIENCE_S)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens")


def test_the_card_describes_what_is_served(running: Running) -> None:
    (card,) = requests.get(f"{running.url}/v1/models", timeout=PATIENCE_S).json()["data"]
    assert card["precision"] == "float32"
    assert card["provider"] == "cpu"
    assert card["context_length"] == 64
    assert card["decoding"] == DECODING.default.to_mapping()
    assert card["presets"] == {name: preset.to_mapping() for name, preset in DECODING.presets.items()}
    assert list(card["presets"]) == ["balanced", "faithful", "adventurous"]
    assert card["version"] is None


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"temperature": -1}, 400, "temperature", "temperature: -1.0 is out of range, must be at least 0"),
        ({"max_tokens": -3}, 400, "max_tokens", "max_tokens: -3 is out of range, must be at least 1"),
        (
            {"n": 3, "best_of": 2},
            400,
            "best_of",
            "best_of: 2 is out of range, must be at least n (3), or 1, which is off",
        ),
        (
            {"prompt": ["a"] * 13},
            400,
            "prompt",
            "prompt: 13 prompts are more than the 12 that the server takes at a time",
        ),
        (
            {"best_of": 20},
            400,
            "best_of",
            "best_of: 20 continuations are more than the 12 that the server takes at a time",
        ),
        ({"suffix": "x"}, 400, "suffix", "suffix: the model continues a text and cannot fill a gap; leave it out"),
        ({"preset": "x"}, 400, "preset", "preset: 'x' is none of balanced, faithful, adventurous"),
        ({"model": "gpt-5"}, 404, "model", "model: 'gpt-5' is not served here, engine is"),
        ({"prompt": [300]}, 400, "prompt", "prompt: token id 300 is not in [0, 300)"),
        ({"logit_bias": {"300": 1}}, 400, "logit_bias", "logit_bias: no token has the id 300"),
        ({"prompt": [5] * 64}, 400, "prompt", "prompt: 64 tokens leave no room in the context of 64"),
        ({"prompt": [5] * 65}, 400, "prompt", "prompt: 65 tokens do not fit in the context of 64; shorten it"),
        ({"n": 1000}, 400, "n", "n: 1000 continuations are more than the 12 that the server takes at a time"),
        ({"prompt": [[]], "echo": True, "max_tokens": 0, "logprobs": 1}, 400, "prompt", "prompt: has no tokens"),
    ],
)
def test_an_error_names_its_field(
    body: dict[str, Any], status: int, param: str, message: str, running: Running
) -> None:
    for stream in (False, True):
        found = running.post(**{"prompt": "a", **body}, stream=stream)
        error = found.json()["error"]
        assert (found.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
        assert error["message"].startswith(message)


def test_openais_client_knows_the_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"top_p: 2.* is out of range"):
        client.completions.create(model="engine", prompt="a", top_p=2)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b"", JSON, "the body is empty; send a JSON object"),
        (
            b"{",
            JSON,
            "the body is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (b"prompt=a", JSON, "the body is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[]", JSON, "the body is JSON, but [] is not an object with fields such as prompt"),
        (b'"a"', JSON, 'the body is JSON, but "a" is not an object with fields such as prompt'),
        (b'{"prompt": "caf\xe9"}', JSON, "the body is not utf-8 (byte 0xe9 at 15); send it in UTF-8"),
        (b"\xff", JSON, "the body is not utf-8 (byte 0xff at 0); send it in UTF-8"),
        (b"[" * 100_000, JSON, "the body is not read: its lists or objects are nested too deeply"),
        (b'{"seed": ' + b"5" * 5000 + b"}", JSON, "the body is not JSON: Exceeds the limit (4300 digits) for integer"),
        (
            gzip.compress(b'{"prompt": "a"}', mtime=0),
            JSON,
            "the body is compressed (gzip), which this server does not read;",
        ),
        (b"\x28\xb5", JSON | {"Content-Encoding": "zstd"}, "the body is compressed (zstd), which this server does not"),
        (b'{"prompt": "a"}', {}, "the body has the Content-Type ''; send JSON, with the header Content-Type: app"),
        (
            b'{"prompt": "a"}',
            {"Content-Type": "application/x-www-form-urlencoded"},
            "the body has the Content-Type 'application/x-www-form-urlencoded'; send JSON, with",
        ),
        (b'{"prompt": "' + b"\\ud800" + b'"}', JSON, "prompt: contains half of a surrogate pair"),
    ],
)
def test_a_body_that_is_not_read_says_why(body: bytes, headers: dict[str, str], message: str, running: Running) -> None:
    refused = 'pipeline_requests_total{outcome="refused"}'
    count = running.metric(refused)
    for path in ("/v1/completions", "/tokenize"):
        found = requests.post(f"{running.url}{path}", data=body, headers=headers, timeout=PATIENCE_S)
        error = found.json()["error"]
        assert (found.status_code, error["type"]) == (400, "invalid_request_error")
        assert error["message"].startswith(message)
    assert running.metric(refused) == count + 1


def test_no_token_left_fails_alone_and_says_so(running: Running) -> None:
    body = {"prompt": "a", "stop_token_ids": list(range(300)), "min_tokens": 3}
    found = running.post(**body)
    assert found.status_code == 400
    assert "leave no token to draw" in found.json()["error"]["message"]
    lines = running.post(**body, stream=True).text
    assert "leave no token to draw" in json.loads(lines.removeprefix("data: "))["error"]["message"]


def test_a_choice_that_fails_leaves_the_others_and_says_why(running: Running) -> None:
    """Both allowed tokens stand in the first prompt, and no token may come again."""
    refused = 'pipeline_requests_total{outcome="refused"}'
    before = running.metric(refused)
    asked = {
        **{"prompt": [[5, 6], [7]], "allowed_token_ids": [5, 6], "no_repeat_ngram_size": 1},
        **{"min_tokens": 2, "max_tokens": 2, "seed": 1},
    }
    found = running.post(**asked)
    assert found.status_code == 200
    failed, whole = found.json()["choices"]
    assert (failed["finish_reason"], whole["finish_reason"]) == ("error", "length")
    assert failed["error"]["message"].startswith("the decoding parameters leave no token to draw")
    assert "error" not in whole
    assert len(whole["text"]) > 0
    assert found.json()["usage"]["completion_tokens"] == 2
    chunks = [event["choices"][0] for event in events(running.post(**asked, stream=True))]
    assert [chunk["error"] for chunk in chunks if chunk["finish_reason"] == "error"] == [failed["error"]]
    assert "".join(chunk["text"] for chunk in chunks if chunk["index"] == 1) == whole["text"]
    assert running.metric(refused) == before + 2


def test_a_fault_of_the_engine_in_one_request_is_counted_and_ends_no_other(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed, append = 'pipeline_requests_total{outcome="failed"}', Continuation.append
    before = running.metric(failed)

    def fail(self: Continuation, token_id: int) -> None:
        if self.params.seed == 77:
            raise IndexError("a bug")
        append(self, token_id)

    monkeypatch.setattr(Continuation, "append", fail)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(running.post, prompt="The lamp", **ENDLESS)
        found = running.post(prompt="a", seed=77, n=2)
        assert (found.status_code, found.json()["error"]["type"]) == (500, "server_error")
        assert other.result().json()["usage"]["completion_tokens"] > 20
    assert running.metric(failed) == before + 1
    assert "IndexError: a bug" in caplog.text
    assert running.post(prompt="a").status_code == 200


@pytest.mark.parametrize("temperature", [1e39, 1e308])
def test_any_temperature_is_answered(temperature: float, running: Running) -> None:
    found = running.post(prompt="a", temperature=temperature, min_tokens=5, max_tokens=8, no_repeat_ngram_size=2)
    assert found.status_code == 200
    assert found.json()["usage"]["completion_tokens"] >= 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_character_that_token_ids_begin_is_completed(
    stream: bool, running: Running, generator: TextGenerator
) -> None:
    ids = generator.tokenizer.encode("a€").ids
    last = ids[-1]
    asked = {"prompt": ids[:-1], "logit_bias": {str(last): 100}, "max_tokens": 1, "echo": True, "stream": stream}
    for echo, expected in ((True, "a€"), (False, "€")):
        found = running.post(**{**asked, "echo": echo})
        chunks = [event["choices"][0] for event in events(found)] if stream else found.json()["choices"]
        assert "".join(chunk["text"] for chunk in chunks) == expected


def test_a_client_has_its_share(tiny_engine_folder: Path) -> None:
    """A client is its key."""
    access = Access(keys=("one", "two"))
    with running_server(tiny_engine_folder, max_queue=4, slots_per_client=1, access=access) as running:

        def ask(key: str, **body: object) -> requests.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return requests.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE_S)

        endless = {**ENDLESS, "max_tokens": 100_000, "context_overflow": "slide", "stream": True, "prompt": "a"}
        held = [
            requests.post(
                f"{running.url}/v1/completions",
                json=endless,
                headers={"Authorization": "Bearer one"},
                stream=True,
                timeout=PATIENCE_S,
            )
            for _ in range(2)
        ]
        # However it spells the header.
        body, headers = {"prompt": "a"}, {"Authorization": "bEARER  one"}
        found = requests.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE_S)
        assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
        assert found.json()["error"]["message"].startswith("this client's share of the queue is full")
        assert ask("two", prompt="a", max_tokens=5).status_code == 200
        for one in held:
            one.close()


def test_large_texts_take_turns_and_small_ones_pass() -> None:
    begun, end = threading.Semaphore(0), threading.Event()

    def work(size: int) -> int:
        if size > 10:
            begun.release()
            assert end.wait(PATIENCE_S)
        return size

    async def run() -> None:
        large = [asyncio.ensure_future(in_thread(10**6, work, 10**6)) for _ in range(20)]
        assert await asyncio.to_thread(begun.acquire, timeout=PATIENCE_S)
        assert [await in_thread(5, work, size) for size in range(10)] == list(range(10))
        assert not any(one.done() for one in large)
        end.set()
        assert await asyncio.gather(*large) == [10**6] * 20

    asyncio.run(run())


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(), inner, max_size=4),
    )
)
def test_json_in_parts_is_json(value: Any) -> None:
    for part in (1, 2, 500):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.serving.completions.PART", part)
            assert asyncio.run(to_json(value)) == json.dumps(value)


def test_others_are_answered_while_a_large_answer_is_written() -> None:
    async def run() -> tuple[int, str]:
        turns, writing = 0, asyncio.ensure_future(to_json({"a": [{"b": list(range(5000))}]}))
        while not writing.done():
            turns += 1
            await asyncio.sleep(0)
        return turns, await writing

    turns, text = asyncio.run(run())
    assert turns > 5
    assert json.loads(text) == {"a": [{"b": list(range(5000))}]}


def test_the_end_of_a_long_text_slides_as_all_of_it(running: Running, generator: TextGenerator) -> None:
    """Half of the context is read, and so only the text's end encoded."""
    longest = max(map(len, generator.tokenizer.get_vocab()))
    text = "The lamp on Gull Rock went out, and the tide came in. " * (2 * longest)
    assert len(text) > 64 * longest
    params = SamplingParams(temperature=0.7, max_new_tokens=9, seed=5, context_overflow="slide")
    (expected,) = generator.complete([text], [params])
    asked = {"temperature": 0.7, "top_p": 1, "max_tokens": 9, "seed": 5, "context_overflow": "slide"}
    assert running.post(prompt=text, **asked).json()["choices"][0]["text"] == expected.text
    assert running.post(prompt=text, echo=True, **asked).json()["choices"][0]["text"] == text + expected.text


def test_a_body_that_is_too_large_is_refused(running: Running) -> None:
    found = running.post(prompt="a" * 3_000_000)
    assert found.status_code == 413

    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"a" * 100_000
        yield b'"}'

    headers = {"Content-Type": "application/json"}
    unsized = requests.post(f"{running.url}/v1/completions", data=chunks(), headers=headers, timeout=PATIENCE_S)
    assert unsized.status_code == 413


def test_a_client_that_disconnects_frees_its_slot(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = running.served.current.generator.engine.scheduler
    step = scheduler.step

    def slow_step() -> None:
        # The request must not end before the client disconnects, however slow the client is.
        time.sleep(0.05)
        step()

    monkeypatch.setattr(scheduler, "step", slow_step)
    before = running.metric('pipeline_requests_total{outcome="cancelled"}')
    long = {"prompt": "The lamp", "max_tokens": 60, "n": 12, "ignore_eos": True}
    for number, stream in enumerate((True, False), start=1):
        body = json.dumps({**long, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            wait_for(lambda: running.metric("pipeline_cache_slots_used") == SLOTS)
        expected = before + number
        wait_for(lambda expected=expected: running.metric('pipeline_requests_total{outcome="cancelled"}') == expected)  # type: ignore[misc]
        wait_for(lambda: running.metric("pipeline_cache_slots_used") == 0)
        wait_for(lambda: running.metric("pipeline_queue_length") == 0)


def test_tokens_of_prompts_that_are_not_read_again_are_counted(running: Running) -> None:
    name = "pipeline_reused_prompt_tokens_total"
    shared = "A lamp on the rock that nobody had lit."
    first = running.post(prompt=f"{shared} Then", max_tokens=2, ignore_eos=True).json()
    before = running.metric(name)
    again = running.post(prompt=f"{shared} When", max_tokens=2, ignore_eos=True).json()
    assert 16 <= running.metric(name) - before < again["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens"] < 60


def test_metrics_are_there_for_prometheus(running: Running) -> None:
    names = ("pipeline_generated_tokens_total", "pipeline_prompt_tokens_total")
    first = "pipeline_time_to_first_token_seconds_count"
    between = "pipeline_time_between_tokens_seconds_count"
    completed = 'pipeline_requests_total{outcome="completed"}'
    before = {name: running.metric(name) for name in (*names, first, between, completed)}
    usage = running.post(prompt="The lamp", **ENDLESS).json()["usage"]
    wait_for(lambda: running.metric(completed) == before[completed] + 1)
    assert running.metric(names[0]) == before[names[0]] + usage["completion_tokens"]
    assert running.metric(names[1]) == before[names[1]] + usage["prompt_tokens"]
    assert running.metric(first) == before[first] + 1
    assert running.metric(between) > before[between]
    assert running.metric("pipeline_cache_slots") == SLOTS
    info = 'pipeline_model_info{name="engine",precision="float32",provider="cpu",version=""}'
    assert running.metric(info) == 1
    refused = 'pipeline_requests_total{outcome="refused"}'
    count = running.metric(refused)
    running.post(prompt=5)
    running.post(prompt="a", top_p=5)
    assert running.metric(refused) == count + 2


def test_health_and_readiness_are_reported(running: Running) -> None:
    assert requests.get(f"{running.url}/health", timeout=PATIENCE_S).json() == {"status": "alive"}
    assert requests.get(f"{running.url}/ready", timeout=PATIENCE_S).json() == {"status": "ready"}
    running.served.draining = True
    try:
        assert requests.get(f"{running.url}/ready", timeout=PATIENCE_S).status_code == 503
        assert running.post(prompt="a").status_code == 503
    finally:
        running.served.draining = False


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/", "/docs", "/openapi.json"])
def test_head_is_answered_as_get_without_the_body(path: str, running: Running) -> None:
    found, whole = (ask(f"{running.url}{path}", timeout=PATIENCE_S) for ask in (requests.head, requests.get))
    assert (found.status_code, found.content) == (200, b"")
    assert found.headers["Content-Type"] == whole.headers["Content-Type"]


def test_head_of_a_path_that_takes_only_post_is_refused(running: Running) -> None:
    assert requests.head(f"{running.url}/v1/completions", timeout=PATIENCE_S).status_code == 405


@pytest.mark.parametrize("prefix", ["/llm", ""], ids=["kept", "removed"])
def test_behind_a_proxy_with_a_path_prefix_all_is_there(prefix: str, tiny_engine_folder: Path) -> None:
    """Some proxies remove the prefix before they pass a request on, and others keep it."""
    with running_server(tiny_engine_folder, root_path="/llm") as running:
        own = f"{running.url}{prefix}"
        client = OpenAI(base_url=f"{own}/v1", api_key="none", max_retries=0)
        assert client.completions.create(model="engine", prompt="The lamp", max_tokens=3).choices[0].text
        assert running.metric('pipeline_requests_total{outcome="completed"}') == 1
        requests.post(f"{own}/v1/completions", data=b"{", headers=JSON, timeout=PATIENCE_S)
        assert running.metric('pipeline_requests_total{outcome="refused"}') == 1
        page = requests.get(f"{own}/docs", timeout=PATIENCE_S).text
        assert "'/llm/openapi.json'" in page
        script = re.search(r'src="(/llm/[^"]+\.js)"', page)
        assert script is not None
        for path in ("", "/", "/openapi.json", script[1].removeprefix("/llm")):
            assert requests.get(f"{own}{path}", timeout=PATIENCE_S).status_code == 200
        description = requests.get(f"{own}/openapi.json", timeout=PATIENCE_S).json()
        assert description["servers"] == [{"url": "/llm"}]


def test_the_page_asks_at_its_own_address() -> None:
    """It has no address that starts at the root of the host, which is another's behind a proxy with a prefix."""
    page, _ = playground()
    assert not re.findall(r"""(?:href|src|action)=["']/|fetch\(["'`]/|location\.origin\}""", page)


@pytest.mark.parametrize(
    ("given", "path"), [("", ""), ("/", ""), ("/llm", "/llm"), ("/llm/", "/llm"), ("/a/b-1/", "/a/b-1")]
)
def test_a_root_path_has_no_slash_at_its_end(given: str, path: str) -> None:
    assert Address(root_path=given).root_path == path


@pytest.mark.parametrize("given", ["llm", "http://example.org/llm", "/a b", "/a?b", "//a"])
def test_what_is_no_root_path_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"^--root-path: .* is not a path that starts with a slash, such as /llm$"):
        Address(root_path=given)


def test_the_documentation_loads_nothing_from_elsewhere(running: Running) -> None:
    page = requests.get(f"{running.url}/docs", timeout=PATIENCE_S).text
    assert "http://" not in page
    assert "https://" not in page


def test_the_page_may_run_its_own_script_alone(running: Running) -> None:
    found = requests.get(f"{running.url}/", timeout=PATIENCE_S)
    page, policy = playground()
    assert found.text == page
    assert found.headers["Content-Security-Policy"] == policy
    assert "unsafe" not in policy


def test_a_full_queue_says_when_to_try_again(tiny_engine_folder: Path) -> None:
    with running_server(tiny_engine_folder, max_queue=0) as running:
        statuses = set()
        blocking = {"prompt": "The lamp", "max_tokens": 60, "n": SLOTS, "ignore_eos": True, "stream": True}
        with requests.post(f"{running.url}/v1/completions", json=blocking, stream=True, timeout=PATIENCE_S) as held:
            assert held.status_code == 200
            for _ in range(50):
                found = running.post(prompt="a", n=SLOTS, max_tokens=60)
                statuses.add(found.status_code)
                if found.status_code == 429:
                    assert int(found.headers["Retry-After"]) >= 1
                    assert found.json()["error"]["code"] == "queue_full"
                    break
        assert running.metric('pipeline_requests_total{outcome="rejected"}') == (429 in statuses)


def test_a_request_times_out(tiny_engine_folder: Path) -> None:
    sliding = {**ENDLESS, "max_tokens": 100_000, "context_overflow": "slide"}
    with running_server(tiny_engine_folder, limits=Limits(timeout_s=0.3)) as running:
        found = running.post(prompt="The lamp", **sliding)
        assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
        *_, last = running.post(prompt="The lamp", **sliding, stream=True).text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        wait_for(lambda: running.metric("pipeline_cache_slots_used") == 0)
        assert running.metric('pipeline_requests_total{outcome="timed_out"}') == 2


def test_a_server_may_limit_the_length(tiny_engine_folder: Path) -> None:
    with running_server(tiny_engine_folder, limits=Limits(max_tokens=5)) as running:
        assert running.post(prompt="a", ignore_eos=True).json()["usage"]["completion_tokens"] == 5
        assert running.post(prompt="a", max_tokens=6).status_code == 400


def test_a_request_without_a_key_is_refused(tiny_engine_folder: Path) -> None:
    with running_server(tiny_engine_folder, access=Access(keys=("one", "two"))) as running:
        for path in ("/v1/models", "/v1/models/engine", "/metrics"):
            assert requests.get(f"{running.url}{path}", timeout=PATIENCE_S).status_code == 401
            for key in ("one", "two"):
                given = {"Authorization": f"Bearer {key}"}
                assert requests.get(f"{running.url}{path}", headers=given, timeout=PATIENCE_S).status_code == 200
        for path in ("/v1/completions", "/tokenize", "/detokenize"):
            found = requests.post(f"{running.url}{path}", json={"prompt": "a"}, timeout=PATIENCE_S)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/health", "/ready", "/", "/docs", "/openapi.json"):
            assert requests.get(f"{running.url}{path}", timeout=PATIENCE_S).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f"{running.url}/v1", api_key="three").models.list()


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_API_KEYS", " one, two ,")
    assert keys_from_environment() == ("one", "two")
    monkeypatch.delenv("PIPELINE_API_KEYS")
    assert keys_from_environment() == ()


def test_metrics_may_be_open_while_the_rest_is_not(tiny_engine_folder: Path) -> None:
    with running_server(tiny_engine_folder, access=Access(keys=("one",), open_metrics=True)) as running:
        assert running.metric("pipeline_cache_slots") == SLOTS


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("https://example.org/", "https://example.org"),
        ("HTTPS://Example.org:443", "https://example.org"),
        ("http://localhost:80/", "http://localhost"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000/", "http://[::1]:3000"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
        ("*", "*"),
    ],
)
def test_an_origin_is_spelled_as_browsers_send_it(given: str, sent: str) -> None:
    assert Access(origins=(given,)).origins == (sent,)


@pytest.mark.parametrize(
    "given",
    [
        *("example.org", "//example.org", "localhost:3000", "null"),
        *("https://example.org/app", "https://example.org?x=1", "https://example.org:port", "https://a@example.org"),
        *("https://*.example.org", "https://a.org,https://b.org", "https://["),
    ],
)
def test_what_no_browser_would_send_as_an_origin_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"^--cors-origin: .* is not an origin; write scheme, host and port"):
        Access(origins=(given,))


def test_other_origins_are_allowed_only_by_name(tiny_engine_folder: Path, running: Running) -> None:
    asking = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert (
        "Access-Control-Allow-Origin"
        not in requests.options(f"{running.url}/v1/completions", headers=asking, timeout=PATIENCE_S).headers
    )
    with running_server(tiny_engine_folder, access=Access(origins=("https://example.org/",))) as open_to:
        found = requests.options(f"{open_to.url}/v1/completions", headers=asking, timeout=PATIENCE_S)
        assert found.headers["Access-Control-Allow-Origin"] == "https://example.org"


@pytest.mark.parametrize("place", ["pipeline.serving.app.begin_call", "pipeline.serving.completions.Call.body"])
def test_a_bug_is_counted_once_and_read_by_other_origins(
    place: str, tiny_engine_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(place, fail)
    with running_server(tiny_engine_folder, access=Access(origins=("https://example.org",))) as running:
        body = {"prompt": "a", "max_tokens": 2}
        headers = {"Origin": "https://example.org"}
        found = requests.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE_S)
        assert found.status_code == 500
        assert found.json()["error"]["message"] == "internal error; the server's log has it"
        assert found.headers["Access-Control-Allow-Origin"] == "https://example.org"
        assert running.metric('pipeline_requests_total{outcome="failed"}') == 1
        assert running.metric('pipeline_requests_total{outcome="cancelled"}') == 0
    assert "ZeroDivisionError: a bug" in caplog.text


@pytest.mark.parametrize("digits", [5000, 30])
def test_a_length_of_thousands_of_digits_is_too_large(digits: int) -> None:
    found = BodyLimit(refuse_app, Limits(body_bytes=100))
    scope = {"type": "http", "headers": [(b"content-length", b"5" * digits)]}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(found(scope, never_receive, send))
    assert sent[0]["status"] == 413


async def refuse_app(*_: Any) -> None:
    raise AssertionError("the body is read")


async def never_receive() -> Any:
    raise AssertionError("the body is read")


@pytest.mark.parametrize("scoring", [{}, {"echo": True, "max_tokens": 0, "logprobs": 1, "context_overflow": "slide"}])
def test_a_text_that_cannot_fit_is_refused_without_encoding_it(
    scoring: dict[str, Any], running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = running.served.current.longest_token_characters

    def encode(*_: object) -> None:
        raise AssertionError("encodes a text that cannot fit")

    monkeypatch.setattr("pipeline.serving.completions.text_prompt", encode)
    found = running.post(prompt="a" * (64 * longest + 1), **scoring)
    assert found.status_code == 400
    advice = "" if scoring else ", or set context_overflow to slide"
    message = f"prompt: at least 65 tokens do not fit in the context of 64; shorten it{advice}"
    assert found.json()["error"]["message"] == message


def test_a_text_of_the_longest_token_may_fit(running: Running, generator: TextGenerator) -> None:
    longest = max(generator.tokenizer.get_vocab(), key=len)
    assert running.post(prompt=longest, max_tokens=2).status_code == 200
    assert running.served.current.longest_token_characters == len(longest)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        *(("127.0.0.1", True), ("127.0.0.1:8000", True), ("[::1]:8000", True), ("localhost:80", True)),
        *(("LOCALHOST", True), ("localhost.", True), ("tales.localhost", True), ("10.0.0.5:8000", True)),
        *(("llm.example.org", True), ("LLM.example.org:443", True)),
        *(("example.org", False), ("evil.example:8000", False), ("127.0.0.1.evil.example", False), ("", False)),
        *(("localhost.evil.example", False), ("a@localhost", True), ("localhost@evil.example", False), ("[::1", False)),
    ],
)
def test_a_name_is_local_an_address_or_allowed(host: str, allowed: bool) -> None:
    assert Access(hosts=("LLM.example.org",)).allows_host(host) == allowed


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("me", False)],
)
def test_an_address_is_reached_from_this_machine_alone_or_not(host: str, loopback: bool) -> None:
    assert Address(host).is_loopback == loopback


def test_a_page_that_reaches_the_server_under_its_own_name_is_refused(tiny_engine_folder: Path) -> None:
    with running_server(tiny_engine_folder, checks_host=True) as running:
        for path in ("/", "/v1/models", "/health"):
            found = requests.get(f"{running.url}{path}", headers={"Host": "evil.example:8000"}, timeout=PATIENCE_S)
            assert found.status_code == 403
            assert found.json()["error"]["message"].startswith("Host: 'evil.example:8000' is not a name of this server")
        assert running.post(prompt="a", max_tokens=1).status_code == 200


@pytest.mark.parametrize("reads_again", [False, True])
def test_a_client_that_does_not_read_its_stream_is_timed_out(
    reads_again: bool, tiny_engine_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reads_again:
        monkeypatch.setattr("pipeline.serving.completions.LAST_EVENT_SECONDS", 0.1)
    served, metrics = served_folder(tiny_engine_folder)
    app = create_app(served, metrics, Limits(timeout_s=0.5), Access())
    served.start()
    asked = {**ENDLESS, "prompt": "a", "stream": True, "max_tokens": 100_000, "context_overflow": "slide"}
    body = json.dumps(asked).encode()
    sent: list[bytes] = []

    async def ask() -> None:
        timed_out = asyncio.get_running_loop().time() + 0.6
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if len(sent) == 3:
                await (asyncio.sleep(timed_out - asyncio.get_running_loop().time()) if reads_again else receive())

        headers = [(b"content-type", b"application/json")]
        await app(
            {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers,
             "asgi": {"version": "3.0", "spec_version": "2.4"}},
            receive,
            send,
        )  # fmt: skip

    asyncio.run(asyncio.wait_for(ask(), PATIENCE_S))
    wait_for(lambda: served.current.worker.running == 0)
    served.close()
    assert 'pipeline_requests_total{outcome="timed_out"} 1.0' in metrics.text().decode()
    assert (b"the request took longer than 0.5 s" in b"".join(sent)) == reads_again


def test_a_body_that_does_not_arrive_is_timed_out(tiny_engine_folder: Path) -> None:
    with running_server(tiny_engine_folder, limits=Limits(timeout_s=0.5)) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b'Content-Length: 50\r\n\r\n{"prompt": '
            )
            answer = b"".join(iter(lambda: slow.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body did not arrive within 0.5 s" in answer
        assert running.metric('pipeline_requests_total{outcome="timed_out"}') == 1
