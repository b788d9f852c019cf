"""What the descriptions of runs say."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tracking.notes import (
    GAP,
    describe_evaluation,
    describe_finetuning,
    describe_search,
    how_to_make_again,
    number,
    set_section,
    table,
)

HEADINGS = st.sampled_from(["Fine-tuning", "Decoding", "Evaluation", "Registered"])
TEXTS = st.text("ab|*`#\n -", max_size=20).filter(lambda text: not re.search("^## ", text, re.MULTILINE))


@given(st.lists(st.tuples(HEADINGS, TEXTS)))
def test_a_section_is_replaced_by_a_newer_one_and_keeps_its_place(written: list[tuple[str, str]]) -> None:
    note = ""
    for heading, text in written:
        note = set_section(note, heading, text)
    newest = {heading: text.strip() for heading, text in written}
    assert note == "\n\n".join(f"## {heading}\n\n{text}" for heading, text in newest.items())


def test_what_somebody_wrote_in_a_note_stays() -> None:
    note = "Best so far!\n\n## Mine\n\none\n\n## Mine\n\ntwo"
    noted = set_section(note, "Decoding", "x")
    assert noted == f"{note}\n\n## Decoding\n\nx"
    assert set_section(noted, "Decoding", "y") == f"{note}\n\n## Decoding\n\ny"


def test_a_cell_breaks_no_table() -> None:
    assert table(["a"], [["x|y\nz"]]).splitlines()[-1] == f"| x\\|y z{GAP} |"


def test_figures_read_as_people_write_them() -> None:
    assert [number(1478.40708), number(1.5, 1), number(15, 0), number(None)] == ["1,478.407", "1.5", "15", "–"]
    assert table(["a", "b"], [[1, "x"]]) == f"| a{GAP} | b{GAP} |\n| --- | --- |\n| 1{GAP} | x{GAP} |"


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({"git.commit": "c0ffee", "git.dirty": "false"}, "`git checkout c0ffee && dvc repro` makes it again."),
        ({"git.commit": "c0ffee", "git.dirty": "true"}, "from commit `c0ffee` with changes that were not committed"),
        (
            {"git.commit": "c0ffee", "git.dirty": "true", "dvc.experiment": "two-epochs"},
            "`git checkout c0ffee && dvc exp apply two-epochs && dvc repro` makes it again.",
        ),
        ({}, "outside of git"),
        ({"git.commit": "c0ffee", "git.dirty": "false", "pipeline.restored": "true"}, "Recorded again from its files"),
    ],
)
def test_a_note_says_how_to_make_it_again(tags: dict[str, str], says: str) -> None:
    assert says in how_to_make_again(tags)


def test_a_fine_tuning_is_described() -> None:
    details = {"base_validation_loss": 4.3867, "validation_loss": 3.68318, "validation_perplexity": 39.77, "steps": 411}
    text = describe_finetuning({**details, "best_step": 343}, "finetune.epochs `5`", "Again.")
    assert text.splitlines()[::2] == [
        "Validation loss 4.387 of the base → **3.683** (perplexity 39.8), at step 343 of 411.",
        "Changed since the last commit of `dvc.lock`: finetune.epochs `5`.",
        "Again.",
    ]
    assert "Changed" not in describe_finetuning(details, "", "Again.")


def test_a_search_is_described() -> None:
    trials = [{"state": "complete"}, {"state": "pruned"}, {"state": "complete"}]
    scores = {"validation_excess": 2.328, "validation_distance": 25.41}
    text = describe_search(trials, scores, {"temperature": 0.9, "top_k": 50})
    assert text.startswith("3 trials, of which 1 were ended early. The winner: temperature 0.9, top_k 50. ")
    assert "has 2.3 faults above people's level; its distance from their texts is 25.4." in text


def test_an_evaluation_is_described() -> None:
    details = {
        "documents": {
            "base": {"bits_per_byte": 1.74117, "perplexity": 75.88},
            "finetuned": {"bits_per_byte": 1.47841, "perplexity": 39.48},
        },
        "choice": {"kept": "hand_set"},
        "systems": {"hand_set": {"excess": 11.16, "invented_words": 6.78, "distance": 23.1}},
    }
    lines = describe_evaluation(details, {"Report": "#/a", "Samples": "#/b"}).replace(GAP, "").splitlines()
    assert lines[2:4] == ["| bits per byte | 1.741 | 1.478 |", "| perplexity | 75.880 | 39.480 |"]
    assert "the hand-set one: 11.2 faults above people's level, 6.8 invented words per 1,000" in lines[5]
    assert lines[-1] == "[Report](#/a) · [Samples](#/b)"
