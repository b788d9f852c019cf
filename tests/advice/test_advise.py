import csv
import math
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.advice import advise as command
from pipeline.advice.advise import Point, advise, run_advise
from pipeline.advice.learning_curve import PowerLaw
from pipeline.errors import UserError
from pipeline.files import read_json

EVALUATIONS = 8
TOKENS = [10_000, 20_000, 40_000, 80_000]
STEEP = PowerLaw(2.0, 40.0, 0.3)
"""Twice 80,000 tokens are worth 40 · 80,000^-0.3 · (1 - 2^-0.3) = 0.254 nats, four times 0.206 more."""
FLAT = PowerLaw(3.0, 1000.0, 1.0)
"""Twice 80,000 tokens are worth 1000 / 160,000 = 0.006 nats."""


def point(
    tokens: int, best: float, *, base: float = 6.0, best_at: int = 8, late_fall: float = 0.01, ended_at: int = 8
) -> Point:
    """A training of 100 steps per evaluation; its loss falls to `best` at one of them, then rises."""
    curve = [(0, base)]
    for evaluation in range(1, ended_at + 1):
        # Before the best, the loss falls by `late_fall` per two evaluations.
        ahead = (best_at - evaluation) * late_fall / 2 if evaluation <= best_at else (evaluation - best_at) * 0.1
        curve.append((100 * evaluation, best + ahead))
    return Point(tokens / TOKENS[-1], tokens, curve)


def points(law: PowerLaw, tokens: list[int] = TOKENS, **whole: object) -> list[Point]:
    """Points on a law; `whole` sets the options of the last."""
    losses = law.loss(tokens).tolist()
    *shares, all_tokens = tokens
    small = [point(count, loss) for count, loss in zip(shares, losses, strict=False)]
    return [*small, point(all_tokens, losses[-1], **whole)]  # type: ignore[arg-type]


def test_what_a_point_says_of_its_training() -> None:
    found = point(80_000, 3.0, best_at=5, late_fall=0.4)
    assert (found.base_loss, found.best_step, found.best_evaluation, found.steps) == (6.0, 500, 5, 800)
    assert found.best_loss == pytest.approx(3.0)
    # From evaluation 6, at 3.1, to the end, at 3.3.
    assert found.late_fall == pytest.approx(-0.2)
    assert point(80_000, 3.0, late_fall=0.4).late_fall == pytest.approx(0.4)
    assert Point(1.0, 80_000, [(0, 6.0), (100, 3.0)]).late_fall == 0.0


@pytest.mark.parametrize(
    ("losses", "late_fall"),
    [
        ([3.0], 0.0),
        # Half of the last half, three quarters of the last third, the last quarter, one and a half of the last sixths.
        ([3.4, 3.0], 0.2),
        ([3.8, 3.4, 3.0], 0.3),
        ([4.2, 3.8, 3.4, 3.0], 0.4),
        ([5.0, 4.6, 4.2, 3.8, 3.4, 3.0], 0.6),
        ([5.0, 4.6, 4.2, 3.2, 3.1, 3.0], 0.15),
    ],
)
def test_the_late_fall_is_that_of_the_last_quarter(losses: list[float], late_fall: float) -> None:
    curve = [(0, 6.0), *((100 * number, loss) for number, loss in enumerate(losses, start=1))]
    assert Point(1.0, 80_000, curve).late_fall == pytest.approx(late_fall)


def test_more_data_where_a_doubling_is_worth_it() -> None:
    advice = advise(points(STEEP), EVALUATIONS)
    assert advice.action == "more data"
    assert [(prediction.factor, prediction.tokens) for prediction in advice.predictions] == [(2, 160_000), (4, 320_000)]
    assert [prediction.loss for prediction in advice.predictions] == pytest.approx(
        STEEP.loss([160_000, 320_000]), abs=0.01
    )
    loss = advice.predictions[1].loss
    (sentence,) = advice.sentences
    assert sentence.startswith("More data: 4 times the text, 320,000 tokens, should lower the loss by 0.4")
    assert sentence.endswith(f" to {loss:.3f}, a perplexity of {math.exp(loss):.1f}.")


def test_twice_the_data_where_the_second_doubling_is_not_worth_it() -> None:
    # 30 nats · 10,000 / tokens: twice 80,000 are worth 0.025 nats, the next doubling half of it.
    advice = advise(points(PowerLaw(3.0, 4000.0, 1.0)), EVALUATIONS)
    assert advice.action == "more data"
    assert advice.sentences[0].startswith(
        "More data: 2 times the text, 160,000 tokens, should lower the loss by 0.025 "
    )


def test_stop_where_a_doubling_is_not_worth_it() -> None:
    advice = advise(points(FLAT), EVALUATIONS)
    assert advice.action == "stop"
    assert "2 times the text, 160,000 tokens, should lower the loss by 0.006 to 3.00" in advice.sentences[0]


def test_stop_where_more_text_raises_the_loss() -> None:
    rising = [point(tokens, loss) for tokens, loss in zip(TOKENS, (3.0, 3.1, 3.2, 3.3), strict=True)]
    assert advise(rising, EVALUATIONS).action == "stop"


def test_more_epochs_where_the_loss_still_fell() -> None:
    advice = advise(points(FLAT, late_fall=0.03), EVALUATIONS)
    assert advice.action == "more epochs"
    assert "the loss still fell by 0.030 in the last quarter" in advice.sentences[0]
    assert "2 times the text" in advice.sentences[1]
    # The advice on data still names the largest worthwhile amount.
    assert "4 times the text" in advise(points(STEEP, late_fall=0.03), EVALUATIONS).sentences[1]


def test_no_more_epochs_where_the_best_is_not_the_last() -> None:
    assert advise(points(FLAT, late_fall=0.5, best_at=7), EVALUATIONS).action == "stop"
    assert advise(points(STEEP, late_fall=0.5, best_at=7), EVALUATIONS).action == "more data"


def test_fine_tuning_that_is_worse_than_the_base_comes_first() -> None:
    advice = advise(points(STEEP, base=3.0, late_fall=0.5), EVALUATIONS)
    assert advice.action == "change the training"
    assert "and the base's is 3.000. Lower finetune.learning_rate" in advice.sentences[0]


def test_an_early_best_is_remarked_on() -> None:
    # Early stopping ended the training; the best is within half of the planned evaluations.
    advice = advise(points(STEEP, best_at=3, ended_at=6), EVALUATIONS)
    assert advice.action == "more data"
    assert advice.sentences[1].startswith("The best checkpoint came early, at evaluation 3 of 8: ")
    assert len(advise(points(STEEP, best_at=5), EVALUATIONS).sentences) == 1


def test_two_shares_say_nothing_of_more_data() -> None:
    advice = advise(points(STEEP, TOKENS[2:]), EVALUATIONS)
    assert (advice.action, advice.law, advice.predictions) == ("more shares", None, [])
    assert "at least 3 different amounts of text" in advice.sentences[0]
    advice = advise(points(STEEP, TOKENS[2:], late_fall=0.03), EVALUATIONS)
    assert advice.action == "more epochs"
    assert advice.sentences[1] == "Nothing is known about more data."


def test_three_shares_have_no_spread() -> None:
    advice = advise(points(STEEP, TOKENS[1:]), EVALUATIONS)
    assert [prediction.spread for prediction in advice.predictions] == [None, None]
    assert all(prediction.spread for prediction in advise(points(STEEP), EVALUATIONS).predictions)


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict[str, object]]]:
    """Replace DVC, and keep what it was asked to run."""
    ran: list[tuple[str, str, dict[str, object]]] = []
    losses = dict(zip((0.125, 0.25, 0.5, 1.0), points(STEEP), strict=True))
    monkeypatch.setattr(command, "run_experiment", lambda name, stage, params: ran.append((name, stage, params)))
    monkeypatch.setattr(command, "read_point", lambda share: losses[share])
    return ran


def test_the_command_runs_every_share_and_writes_what_it_found(
    experiments: list[tuple[str, str, dict[str, object]]], tmp_path: Path
) -> None:
    output = run_advise(tmp_path / "advise", [0.5, 0.125, 0.25], EVALUATIONS)
    assert experiments == [
        (f"advise-{share}", "finetune", {"finetune.train_share": share}) for share in (0.125, 0.25, 0.5, 1.0)
    ]
    lines = [line.split() for line in output.splitlines()]
    assert lines[0] == ["share", "tokens", "loss", "perplexity", "best", "step"]
    assert lines[1] == ["base", "6.000", "403.4"]
    loss = float(STEEP.loss(10_000))
    assert lines[2] == ["0.125", "10,000", f"{loss:.3f}", f"{math.exp(loss):.1f}", "800", "of", "800"]
    assert lines[7][:2] == ["2", "160,000"]
    assert "More data: 4 times the text" in output
    with (tmp_path / "advise" / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["share"] for row in rows] == ["0.125", "0.25", "0.5", "1.0", "2", "4"]
    assert float(rows[0]["validation_loss"]) == pytest.approx(loss)
    assert float(rows[-1]["fitted_loss"]) == pytest.approx(float(STEEP.loss(320_000)), abs=0.01)
    assert rows[-1]["validation_loss"] == ""
    advice = read_json(tmp_path / "advise" / "advice.json")
    assert advice["action"] == "more data"
    assert advice["law"]["exponent"] == pytest.approx(0.3, abs=0.01)
    assert advice["points"][0]["experiment"] == "advise-0.125"
    assert "<svg" in (tmp_path / "advise" / "curve.svg").read_text()


def test_all_of_the_text_is_always_among_the_shares(
    experiments: list[tuple[str, str, dict[str, object]]], tmp_path: Path
) -> None:
    output = run_advise(tmp_path / "advise", [0.5], EVALUATIONS)
    assert [name for name, _, _ in experiments] == ["advise-0.5", "advise-1.0"]
    assert "More shares: " in output
    assert read_json(tmp_path / "advise" / "advice.json")["law"] is None


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan])
def test_a_share_out_of_range_is_refused(share: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^--shares: {share} is out of range, must be in \(0, 1\]$"):
        run_advise(tmp_path, [0.5, share], EVALUATIONS)


def test_outside_of_a_project_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["advise"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: dvc.yaml: is not in this folder; go to the folder of the project\n"
