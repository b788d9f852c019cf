import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_project import Project, make_project

from pipeline.__main__ import main
from pipeline.advice import learning_rate as command
from pipeline.advice.learning_rate import RangeTest, render, run_range_test, take_step
from pipeline.advice.range_test import rising_rates
from pipeline.errors import UserError
from pipeline.params.finetune import FinetuneParams, LoraParams
from pipeline.stages import tokenize
from pipeline.tokens import load_tokens, tokenizer_sha256
from pipeline.training.model import load_trainable
from pipeline.training.optimizer import build_optimizer
from pipeline.training.packing import PackedSteps

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def project(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after `dvc repro tokenize`. Do not write to its `out/base` and `out/tokenize`."""
    project = make_project(tmp_path_factory.mktemp("project"), tiny_checkpoint)
    project.run(tokenize, "out/prepare", "out/base", "out/tokenize")
    return project


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.precision.supports_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def found(project: Project, rates: np.ndarray, **changes: object) -> RangeTest:
    params = project.params.finetune.model_copy(update=changes)
    return run_range_test(project.out / "tokenize", project.out / "base", params, rates)


def test_the_command_suggests_a_rate_and_changes_nothing_else(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in project.root.rglob("*") if file.is_file()}
    with project.entered():
        main(["find-learning-rate", "--steps", "40", "--highest", "1"])
    output = capsys.readouterr()
    *table, summary, _, line = output.out.splitlines()
    assert table[0].split() == ["rate", "loss", "smoothed"]
    assert len(table) > 5
    assert summary.startswith("the smoothed loss is three quarters down at ")
    rate = float(line.removeprefix("dvc exp run -S finetune.learning_rate="))
    assert 1e-5 < rate < 1
    assert "step 4 of 40: rate " in output.err
    after = {file: file.stat().st_mtime_ns for file in project.root.rglob("*") if file.is_file()}
    out = project.out / "learning-rate"
    assert {file: time for file, time in after.items() if before.get(file) != time}.keys() == {
        out / "curve.csv",
        out / "curve.svg",
    }
    assert "<svg" in (out / "curve.svg").read_text()
    with (out / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "learning_rate", "loss", "base_loss", "smoothed_loss"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(rising_rates(1e-6, 1, 40)[: len(rows)])
    # The rate is so low at first that the model is still the base; dropout differs.
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[0]["base_loss"]), rel=0.1)


def test_a_step_is_the_same_in_parts(project: Project) -> None:
    base, params = project.out / "base", project.params.finetune.model_copy(update={"dropout": 0.0})
    tokens = load_tokens(project.out / "tokenize" / "train", tokenizer_sha256(base))
    losses = []
    for parts in (1, 3):
        model = load_trainable(base, params)
        optimizer = build_optimizer(model, params)
        steps = PackedSteps(tokens, context_length=64, batch_tokens=300, epochs=3, seed=1, parts=parts)
        model.train()
        losses.append([take_step(model, steps, step, optimizer, params) for step in range(6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_the_same_seed_gives_the_same_losses(project: Project) -> None:
    rates = rising_rates(1e-4, 1e-2, 12)
    first, second = (found(project, rates) for _ in range(2))
    assert first.losses.tolist() == second.losses.tolist()
    assert found(project, rates, seed=2).losses.tolist() != first.losses.tolist()


def test_a_rate_of_next_to_nothing_leaves_the_base_as_it_is(project: Project) -> None:
    test = found(project, rising_rates(1e-12, 1e-11, 12), dropout=0.0)
    assert test.losses == pytest.approx(test.base_losses, rel=1e-5)


def test_every_step_has_a_loss_however_small_steps_are(project: Project) -> None:
    test = found(project, rising_rates(1e-6, 1e-5, 12), batch_tokens=1)
    assert len(test.losses) == 12
    assert (test.losses > 1).all()


def test_a_base_without_a_finite_loss_is_named(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.out / "base", tmp_path / "base")
    model = load_trainable(tmp_path / "base", project.params.finetune)
    torch.nn.init.constant_(model.transformer.ln_f.weight, torch.nan)
    model.save_pretrained(str(tmp_path / "base"))
    with pytest.raises(UserError, match=r"base: its loss is not finite before any training"):
        run_range_test(
            project.out / "tokenize", tmp_path / "base", project.params.finetune, rising_rates(1e-6, 1e-3, 12)
        )


def test_the_test_ends_where_it_diverges(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.advice.range_test.DIVERGED", 1.1)
    test = found(project, rising_rates(1e-3, 1e3, 60), max_grad_norm=1e6)
    assert test.is_diverged
    assert 1 < len(test.rates) < 60
    assert len(test.rates) == len(test.losses) == len(test.base_losses)
    assert np.isfinite(test.losses).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"layer_decay": 0.5, "frozen_layers": 1},
        {"lora": LoraParams(rank=2, alpha=4, dropout=0.0, modules=["c_attn"])},
        {"label_smoothing": 0.1, "unlikelihood": 0.5, "gradient_checkpointing": True},
    ],
)
def test_it_trains_as_the_parameters_say(project: Project, changes: dict[str, object]) -> None:
    rates = rising_rates(1e-3, 1e-2, 12)
    plain, changed = found(project, rates), found(project, rates, **changes)
    assert np.isfinite(changed.losses).all()
    assert changed.losses.tolist() != plain.losses.tolist()


def test_layers_keep_their_share_of_the_rate(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[float]] = []

    def note(
        model: object, steps: object, step: int, optimizer: torch.optim.Optimizer, params: FinetuneParams
    ) -> float:
        groups.append(sorted({group["lr"] for group in optimizer.param_groups}))
        return 1.0

    monkeypatch.setattr(command, "take_step", note)
    found(project, np.array([1.0, 10.0]), layer_decay=0.5)
    assert groups == [pytest.approx([0.25, 0.5, 1.0]), pytest.approx([2.5, 5.0, 10.0])]


@pytest.mark.parametrize("missing", ["tokenize", "base"])
def test_inputs_that_are_missing_are_one_line(
    missing: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(project.root / "params.yaml", tmp_path)
    for name in {"tokenize", "base"} - {missing}:
        shutil.copytree(project.out / name, tmp_path / "out" / name)
    with Project(tmp_path).entered(), pytest.raises(SystemExit) as caught:
        main(["find-learning-rate"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: out/{missing}: is missing; run `dvc repro tokenize` first\n"
    assert not (tmp_path / "out" / "learning-rate").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lowest", "0"), "--lowest: 0 must be more than 0 and less than --highest, 0.1"),
        (("--lowest", "1"), "--lowest: 1 must be more than 0 and less than --highest, 0.1"),
        (("--highest", "nan"), "--lowest: 1e-06 must be more than 0 and less than --highest, nan"),
        (("--steps", "11"), "--steps: 11 are too few; take at least 20"),
    ],
)
def test_an_option_out_of_range_is_one_line(
    options: tuple[str, ...], message: str, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    with project.entered(), pytest.raises(SystemExit):
        main(["find-learning-rate", *options])
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_loss_that_falls_nowhere_is_an_error() -> None:
    rates, flat = rising_rates(1e-6, 1e-1, 30), np.full(30, 3.0)
    with pytest.raises(UserError, match=r"^the loss does not fall at any rate from 1e-06 to 0.1 \(out/curve.csv\); "):
        render(RangeTest(rates, flat, flat, span=3, is_diverged=False), Path("out"))
