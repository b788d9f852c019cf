"""Blind reading: the sheet hides the systems, and the score finds them again."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binom

from benchmarks import blind
from benchmarks.blind import Item, Reading, Wins
from pipeline.errors import UserError
from pipeline.files import read_json, write_csv, write_jsonl

SYSTEMS = ("calm", "wild", "people")
PROMPTS = [f"# Tale {number}\n\nThe lamp" for number in range(8)]


def write_samples(path: Path, *, per_prompt: int = 1, systems: tuple[str, ...] = SYSTEMS) -> Path:
    places = [(system, prompt, sample) for system in systems for prompt in PROMPTS for sample in range(per_prompt)]
    rows = [
        {"system": system, "prompt": prompt, "text": f" {SYSTEMS.index(system)}-{sample} of {prompt[:8]}.\n\nEnd"}
        for system, prompt, sample in places
    ]
    write_jsonl(path, rows)
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["blind.py", *map(str, arguments)])
    blind.main()


def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def fill_in(answers: Path, items: list[dict[str, Any]], best_first: tuple[str, ...]) -> None:
    """Answer as a reader who always has this order of the systems."""
    rows = [(item["item"], "".join("ABC"[item["order"].index(name)] for name in best_first)) for item in items]
    write_csv(answers, [("item", "order"), *rows])


def test_a_pair_is_prepared_read_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, key = write_samples(tmp_path / "samples.jsonl"), tmp_path / "sheet", tmp_path / "keys" / "key.json"
    call(monkeypatch, "prepare", out, "--samples", f"{file}:calm", f"{file}:wild", "--key", key)
    shown = capsys.readouterr()
    assert shown.err == "only 8 pairs, not 30: the systems share no more samples of the same prompt\n"
    assert shown.out.startswith("8 pairs of 8 prompts: ")
    assert sorted(path.name for path in out.iterdir()) == ["answers.csv", "sheet.md"]
    sheet = (out / "sheet.md").read_text(encoding="utf-8")
    assert not re.search("calm|wild|people|samples", sheet)
    items = read_json(key)["items"]
    for item in items:
        number = re.search(r"\d", item["prompt"]).group()
        texts = [
            f"### {item['item']} {letter}\n\n>  {SYSTEMS.index(system)}-0 of # Tale {number}.\n> \n> End\n"
            for letter, system in zip("AB", item["order"], strict=True)
        ]
        assert f"## {item['item']}\n\n> # Tale {number}\n> \n> The lamp\n\n" + "\n".join(texts) in sheet
    assert Counter(item["order"][0] for item in items) == {"calm": 4, "wild": 4}

    fill_in(out / "answers.csv", items, ("wild", "calm"))
    call(monkeypatch, "score", out / "answers.csv", key)
    assert capsys.readouterr().out.splitlines() == [
        "8 of 8 items answered",
        "calm preferred: 0, wild preferred: 8, ties: 0",
        "calm preferred in 0.0 % of the 8 without a tie (95 % interval 0.0 to 36.9 %, Clopper-Pearson)",
        "sign test, two-sided, without ties: p = 0.00781",
    ]


def test_a_set_is_ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file, out, key = write_samples(tmp_path / "samples.jsonl"), tmp_path / "sheet", tmp_path / "key.json"
    call(monkeypatch, "prepare", out, "--samples", file, "--prompts", 6, "--key", key)
    fill_in(out / "answers.csv", read_json(key)["items"], ("people", "calm", "wild"))
    capsys.readouterr()
    call(monkeypatch, "score", out / "answers.csv", key, "--against", "people=0,calm=7.5,wild=5")
    assert capsys.readouterr().out.splitlines() == [
        "6 of 6 items answered",
        "",
        "mean rank (95 % interval, jackknife over prompts)",
        "people  1.00 (1.00 to 1.00)",
        "calm    2.00 (2.00 to 2.00)",
        "wild    3.00 (3.00 to 3.00)",
        "",
        "how often the row was preferred to the column (the rest are losses and ties)",
        "        people  calm  wild",
        "people       -     6     6",
        "calm         0     -     6",
        "wild         0     0     -",
        "",
        "rank correlation of the mean ranks with the numbers, 3 systems: Spearman 0.50, Kendall 0.33",
    ]


def test_a_prompt_comes_again_with_other_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, key = write_samples(tmp_path / "x.jsonl", per_prompt=2), tmp_path / "sheet", tmp_path / "key.json"
    sources = [f"{file}:calm", f"{file}:wild"]
    call(monkeypatch, "prepare", out, "--samples", *sources, "--pairs", 10, "--key", key)
    items = read_json(key)["items"]
    assert {item["prompt"] for item in items[:8]} == set(PROMPTS)
    assert [item["sample"] for item in items] == [0] * 8 + [1] * 2
    assert capsys.readouterr().err == ""
    fill_in(out / "answers.csv", items, ("calm", "wild"))
    call(monkeypatch, "score", out / "answers.csv", key)
    assert "2 answers are to prompts that come again" in capsys.readouterr().out
    call(monkeypatch, "prepare", tmp_path / "once", "--samples", *sources, "--prompts", 10, "--key", tmp_path / "k")
    assert capsys.readouterr().err == "only 8 pairs, not 10: the systems share no more prompts\n"


def test_systems_of_one_name_are_named_by_their_files(tmp_path: Path) -> None:
    one, other = (write_samples(tmp_path / name, systems=("calm",)) for name in ("one.jsonl", "other.jsonl"))
    assert list(blind.read_systems([f"{one}:calm", str(other)])) == [f"{one}:calm", f"{other}:calm"]


def test_nothing_is_overwritten_and_the_key_is_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, key = write_samples(tmp_path / "samples.jsonl"), tmp_path / "sheet", tmp_path / "key.json"
    given = ("--samples", f"{file}:calm", f"{file}:wild", "--key")
    assert "where the reader would find it" in refuse(monkeypatch, capsys, "prepare", out, *given, out / "keys" / "key")
    key.write_text("mine")
    assert refuse(monkeypatch, capsys, "prepare", out, *given, key).endswith("exists already; name another file")
    assert key.read_text() == "mine"
    assert not out.exists()
    key.unlink()
    out.mkdir()
    assert refuse(monkeypatch, capsys, "prepare", out, *given, key).endswith("exists already; name a new folder")
    assert not key.exists()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["x.jsonl:calm", "x.jsonl:loud"], "--samples: x.jsonl holds no system 'loud'; it holds calm, wild, people"),
        (["x.jsonl:calm", "x.jsonl:calm"], "--samples: x.jsonl:calm comes twice"),
        (["x.jsonl:calm"], "--samples: takes 2 to 26 systems, there are 1"),
        (["none.jsonl:calm", "x.jsonl:calm"], "none.jsonl: No such file or directory"),
        (["bad.jsonl"], "bad.jsonl, line 2: is no JSON object with system, prompt and text"),
        (["empty.jsonl"], "empty.jsonl: is empty"),
        (["x.jsonl:calm", "apart.jsonl"], "--samples: calm, alone have no prompt in common"),
    ],
)
def test_samples_that_cannot_be_compared_are_refused(
    sources: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_samples(Path("x.jsonl"))
    row = {"system": "alone", "prompt": "Else", "text": "x"}
    write_jsonl(Path("apart.jsonl"), [row])
    write_jsonl(Path("bad.jsonl"), [row, {"system": "alone"}])
    Path("empty.jsonl").touch()
    line = refuse(monkeypatch, capsys, "prepare", "out", "--samples", *sources, "--key", "key")
    assert line == f"error: {message}"
    assert not Path("out").exists()
    assert not Path("key").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("number,order\n", "the first line must be `item,order`"),
        ("item,order\n1,AB\n2,\n", "misses the rows of the items 3;"),
        ("item,order\n1,\n2,\n3,\n", "no item is answered"),
        ("item,order\n1,AB\n1,AB\n", "line 3: item '1' is not in the key, or is here twice"),
        ("item,order\n1,AB\n2,A\n", "line 3: item 2: 'A' is no order; expected the letters A, B, once each"),
        ("item,order\n1,AA\n", "line 2: item 1: 'AA' is no order"),
        ("item,order\n1,A==B\n", "line 2: item 1: 'A==B' is no order"),
        ("item,order\n1,AC\n", "line 2: item 1: 'AC' is no order"),
    ],
)
def test_answers_that_are_none_are_refused(rows: str, message: str, tmp_path: Path) -> None:
    answers = tmp_path / "answers.csv"
    answers.write_text(rows)
    items = [Item(number, f"prompt {number}", 0, ("calm", "wild")) for number in (1, 2, 3)]
    with pytest.raises(UserError, match=re.escape(message)):
        blind.read_answers(answers, items)


def test_another_key_or_no_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_samples(tmp_path / "samples.jsonl")
    for seed in (1, 2):
        call(monkeypatch, "prepare", tmp_path / str(seed), "--samples", f"{file}:calm", f"{file}:wild",
             "--seed", seed, "--key", tmp_path / f"{seed}.json")  # fmt: skip
        fill_in(tmp_path / str(seed) / "answers.csv", read_json(tmp_path / f"{seed}.json")["items"], ("calm", "wild"))
    capsys.readouterr()
    answers = tmp_path / "1" / "answers.csv"
    assert "name the key of this sheet" in refuse(monkeypatch, capsys, "score", answers, tmp_path / "2.json")
    assert "is no key that `prepare` wrote" in refuse(monkeypatch, capsys, "score", answers, file)
    changed = read_json(tmp_path / "1.json")
    changed["items"][0]["order"].reverse()
    (tmp_path / "1.json").write_text(json.dumps(changed))
    assert "is no key that `prepare` wrote" in refuse(monkeypatch, capsys, "score", answers, tmp_path / "1.json")
    assert "takes three systems; this key has two" in refuse(
        monkeypatch, capsys, "score", tmp_path / "2" / "answers.csv", tmp_path / "2.json", "--against", "calm=1,wild=2"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calm=1,wild=2", "takes three systems at least, there are 2"),
        ("calm=1,loud=2", "'loud=2': expected NAME=VALUE with one of calm, people, wild"),
        ("calm=1,wild=low", "wild: 'low' is no number"),
        ("calm=1,wild=nan", "wild: nan is not finite"),
    ],
)
def test_numbers_to_compare_with_are_checked(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        blind.read_numbers(text, sorted(SYSTEMS))


def test_an_order_is_read_with_ties() -> None:
    order = ("calm", "wild", "people")
    assert blind.read_ranks("CAB", order) == {"people": 1, "calm": 2, "wild": 3}
    assert blind.read_ranks(" b = c > a ", order) == {"wild": 1.5, "people": 1.5, "calm": 3}
    assert blind.read_ranks("AB=C", order) == {"calm": 1, "wild": 2.5, "people": 2.5}
    assert blind.read_ranks("A=B=C", order) == dict.fromkeys(order, 2)


def test_wins_by_hand() -> None:
    # The probability of at most 3 or at least 7 heads in 10 tosses of a coin is (1 + 10 + 45 + 120) * 2 / 1024.
    found = Wins(7, 2, 3)
    assert found.sign_test() == pytest.approx(352 / 1024)
    # Clopper and Pearson's table for 7 of 10.
    assert found.share() == pytest.approx((0.7, 0.3475, 0.9333), abs=5e-5)
    assert Wins(0, 4, 0).sign_test() == 1


def test_mean_ranks_by_hand() -> None:
    readings = [Reading(prompt, {"calm": rank, "wild": 3 - rank}) for prompt, rank in (("a", 1), ("b", 2), ("c", 1.5))]
    # The standard deviation is 0.5; Student's t of 2 degrees of freedom is 4.3027 at 97.5 %.
    reach = 0.5 / 3**0.5 * 4.30265
    assert blind.rank_interval(readings, "calm") == pytest.approx((1.5, 1.5 - reach, 1.5 + reach), abs=1e-4)
    assert blind.count_wins(readings, "calm", "wild") == (1, 1, 1)
    with pytest.raises(UserError, match="takes answers for two prompts at least"):
        blind.rank_interval(readings[:1] * 2, "calm")


def test_rank_correlations_by_hand() -> None:
    # One of six pairs has the other order: tau is (5 - 1) / 6, and rho is 1 - 6 * 2 / (4 * 15).
    means = {"a": 1.1, "b": 2.0, "c": 2.9, "d": 4.0}
    assert blind.rank_correlations(means, {"a": 3, "b": 1, "c": 50, "d": 60}) == pytest.approx((0.8, 2 / 3))
    with pytest.raises(UserError, match="no rank correlation"):
        blind.rank_correlations(means, dict.fromkeys(means, 1.0))


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_interval_excludes_a_half_if_the_sign_test_does(wins: int, losses: int) -> None:
    assume(wins + losses > 0)
    found = Wins(wins, 0, losses)
    share, low, high = found.share()
    assert low <= share <= high
    assert (low > 0.5 or high < 0.5) == (found.sign_test() < 0.05)
    if wins > 0:
        assert binom.sf(wins - 1, wins + losses, low) == pytest.approx(0.025)
    if losses > 0:
        assert binom.cdf(wins, wins + losses, high) == pytest.approx(0.025)


@given(st.integers(2, 6), st.integers(1, 40), st.integers(), st.randoms(use_true_random=False))
def test_the_score_undoes_the_shuffle(size: int, count: int, seed: int, taste: random.Random) -> None:
    """A reader with a fixed taste gives each system its place, whatever the seed."""
    systems = [f"system {index}" for index in range(size)]
    orders = blind.draw_orders(systems, count, random.Random(seed))
    for place in range(size):
        times = Counter(order[place] for order in orders)
        assert all(times[name] in (count // size, -(-count // size)) for name in systems)
    best_first = taste.sample(systems, size)
    readings = [
        Reading("prompt", blind.read_ranks("".join("ABCDEF"[order.index(name)] for name in best_first), order))
        for order in orders
    ]
    for place, name in enumerate(best_first):
        assert blind.mean_rank(readings, name) == place + 1
        for worse in best_first[place + 1 :]:
            assert blind.count_wins(readings, name, worse) == (count, 0, 0)


@given(
    st.lists(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.text("xy"), max_size=3)), min_size=2, max_size=4),
    st.integers(1, 20),
    st.integers(),
    st.booleans(),
)
def test_only_samples_that_all_systems_have_are_chosen(
    systems: list[dict[str, list[str]]], count: int, seed: int, repeats: bool
) -> None:
    chosen = blind.choose_samples(systems, count, random.Random(seed), repeats=repeats)
    common = Counter({prompt: min(len(own.get(prompt, ())) for own in systems) for prompt in systems[0]})
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) == min(count, common.total() if repeats else sum(held > 0 for held in common.values()))
    assert all(len(own[prompt]) > sample for own in systems for prompt, sample in chosen)
    assert [sample for _, sample in chosen] == sorted(sample for _, sample in chosen)


@given(st.text())
def test_a_quotation_cannot_look_like_the_sheet(text: str) -> None:
    shown = blind.quote(text)
    assert shown == "(no text)" or all(line.startswith("> ") for line in shown.split("\n"))
    assert "\r" not in shown
