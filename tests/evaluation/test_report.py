import re
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder

import pytest

from pipeline.evaluation.report import (
    COLUMNS,
    LABELS,
    WALL,
    Column,
    Part,
    Report,
    mark_spans,
    render_report,
    steps_off,
)

FIGURES = [column for group in COLUMNS.values() for column in group]
VOID = {"meta", "link", "br", "img"}
DRAWN = ("hand_set", "tuned", "guarded", "greedy", "sampling", "untuned_base")


class Parser(HTMLParser):
    """A page as a tree; fails where an element is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.builder, self.open = TreeBuilder(), [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        self.open.append(tag)
        if tag in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data: str) -> None:
        if len(self.open) > 1:
            self.builder.data(data)


def tree(page: str) -> Element:
    parser = Parser()
    parser.feed(page)
    parser.close()
    return parser.builder.close()


def text(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def of_class(root: Element, name: str) -> list[Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


def row(start: float) -> dict[str, Any]:
    """Figures of which no two are alike."""
    own = {column.name: start + index / 8 for index, column in enumerate(FIGURES)}
    return own | {"longest_copy_tokens": round(start) + 40, "distance_low": start - 0.5, "distance_high": start + 0.5}


SCALES = {
    "rep_2": 0.05,
    "perplexity": 0.1,
    "mean_copy_tokens": 0.2,
    "looping_share": 0.25,
    "form_share": 0.1,
    "invented_words": 2.0,
    "mauve": 0.1,
}


CHOICE = {
    "kept": "tuned",
    "tuned_excess": 0.0,
    "hand_set_excess": 0.0,
    "difference": -3.25,
    "difference_low": -5.0,
    "difference_high": -1.5,
}
PEOPLE = {name: value for name, value in row(9).items() if not name.startswith(("distance", "excess"))} | {
    "mauve": None
}
DETAILS: dict[str, Any] = {
    "protocol": {"samples": 2, "copy_tokens": 10, "repeat_tokens": 4, "guard_tokens": 14, "split": "test"},
    "documents": {
        "base": {"bits_per_byte": 1.6, "perplexity": 60.0},
        "finetuned": {"bits_per_byte": 1.2, "perplexity": 30.0},
    },
    "systems": {"human": PEOPLE, **{name: row(index + 2) for index, name in enumerate(DRAWN)}},
    "scales": SCALES,
    "choice": CHOICE,
}
DECODINGS = {"tuned": {"temperature": 0.9, "min_p": 0.02}, "hand_set": {"temperature": 0.8, "top_k": 50}}
TRIALS = [
    {
        "number": index,
        "state": state,
        "too_wild": wild,
        "too_tame": tame,
        "on_front": front,
        "preset": preset,
        "prompts": 2,
        "excess": 0.0,
        "distance": 9.0,
        "final": None,
        "edges": ["temperature"] if index == 0 else [],
    }
    for index, (state, wild, tame, front, preset) in enumerate(
        [
            ("complete", 1.0, 4.0, True, "balanced, faithful"),
            ("complete", 3.0, 2.0, True, "adventurous"),
            ("complete", 3.0, 5.0, False, None),
            ("pruned", 90.0, 3.0, False, None),
        ]
    )
]


def sample(system: str, **given: Any) -> dict[str, Any]:
    return {
        "system": system,
        "prompt": "Once",
        "text": f" upon a time, says {system}.",
        "tokens": 12,
        "finish_reason": "stop",
        "longest_copy_tokens": 7,
        "looping": False,
        "copied_spans": [],
        "repeated_spans": [],
        "seed": None if system == "human" else 1,
        "decoding": None if system == "human" else DECODINGS.get(system, DECODINGS["hand_set"]),
        **given,
    }


def page(**given: Any) -> str:
    report: dict[str, Any] = {
        "details": DETAILS,
        "samples": [sample(name) for name in ("human", *DRAWN)],
        "trials": TRIALS,
        "train_losses": [(1, 4.5), (2, 4.0), (3, 3.5)],
        "validation_losses": [(0, 4.25), (2, 3.875), (3, 4.125)],
        "data_md5": "c0ffee.dir",
        "base_md5": None,
    }
    return render_report(Report(**{**report, **given}))


def scores(root: Element) -> dict[str, list[Element]]:
    """The cells of each row of the table of scores, by the row's name."""
    (table,) = of_class(root, "scores")
    return {text(found.findall(".//b")[0]): found.findall("td") for found in table.findall("./tbody/tr")}


def choice_in_page(**choice: Any) -> str:
    return text(of_class(tree(page(details={**DETAILS, "choice": {**CHOICE, **choice}})), "summary")[0])


def test_the_same_report_gives_the_same_bytes() -> None:
    assert page() == page()


def test_every_number_of_the_table_is_that_of_the_metrics() -> None:
    table = scores(tree(page()))
    assert list(table) == [system.label for system in LABELS.values()]
    for name, system in LABELS.items():
        own = (
            {**DETAILS["systems"][name], "distance": 0.0, "excess": 0.0}
            if name == "human"
            else DETAILS["systems"][name]
        )
        for column, cell in zip(FIGURES, table[system.label], strict=True):
            value = own[column.name]
            expected = ["–" if value is None else f"{value:.{column.decimals}f}"]
            if column.name == "distance" and name != "human":
                expected += [f"{own['distance_low']:.2f}", "–", f"{own['distance_high']:.2f}"]
            assert re.findall(r"[\d.–]+", text(cell)) == expected


def test_a_row_or_an_interval_that_is_missing_is_left_out() -> None:
    systems = {name: dict(DETAILS["systems"][name]) for name in ("human", "hand_set", "tuned", "untuned_base")}
    for name in ("distance_low", "distance_high", "mauve"):
        del systems["hand_set"][name]
    table = scores(tree(page(details={**DETAILS, "systems": systems})))
    assert list(table) == ["People", "Hand-set", "Tuned", "Base"]
    assert text(table["Hand-set"][1]) == f"{row(2)['distance']:.2f}"
    mauve = [column.name for column in FIGURES].index("mauve")
    assert (text(table["Hand-set"][mauve]), table["Hand-set"][mauve].get("class")) == ("–", "mauve ")


@pytest.mark.parametrize(
    ("name", "own", "human", "steps"),
    [
        ("rep_2", 0.2, 0.1, 2.0),
        ("rep_2", 0.05, 0.1, -1.0),
        ("base_perplexity", 60.0 * 2.718281828, 60.0, 10.0),
        ("mean_copy_tokens", 15, 7, 3.4657359),  # twice as long, one added
        ("mean_copy_tokens", 2, 7, 0.0),
        ("looping_share", 0.5, 0.0, 2.0),
        ("looping_share", 0.0, 0.5, 0.0),
        ("mauve", 0.8, 1.0, -2.0),
        ("finished_share", 0.4, 0.5, -2.0),  # no part of the distance
        ("form_share", 0.5, 0.75, -2.5),
        ("form_share", 0.75, 0.5, 0.0),
        ("finished_share", 0.001, 0.0, 0.5),  # a scale is 0.002 at least
        ("longest_copy_tokens", 15, 7, 3.4657359),  # as the mean is compared
        ("longest_copy_tokens", 5, 7, 0.0),
    ],
)
def test_how_far_off_a_figure_is(name: str, own: float, human: float, steps: float) -> None:
    assert steps_off(figure(name), own, human, SCALES) == pytest.approx(steps)


def figure(name: str) -> Column:
    return next(column for column in FIGURES if column.name == name)


def test_near_and_far_are_told_without_colour_too() -> None:
    own = {**DETAILS["systems"], "human": row(1), "hand_set": row(1)}
    own["hand_set"] |= {"rep_2": own["human"]["rep_2"] + 0.1, "distinct_2": own["human"]["distinct_2"] * 0.5}
    cells = scores(tree(page(details={**DETAILS, "systems": own})))["Hand-set"]
    shown = {column.name: cell for column, cell in zip(FIGURES, cells, strict=True)}
    found = {
        name: (shown[name].get("class", "").split()[1], text(shown[name]))
        for name in ("rep_2", "distinct_2", "self_bleu")
    }
    assert found == {
        "rep_2": ("off", f"↑ {own['hand_set']['rep_2']:.3f} off, above"),
        "distinct_2": ("far", f"↓↓ {own['hand_set']['distinct_2']:.3f} far, below"),
        "self_bleu": ("near", f"{own['hand_set']['self_bleu']:.3f}"),
    }


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (1.2, "Fine-tuning improved the model from 1.600 to 1.200 bits per byte of unseen text, 25.0 % less."),
        (
            2.0,
            "Fine-tuning did not help: the model went from 1.600 to 2.000 bits per byte of unseen text, 25.0 % more.",
        ),
    ],
)
def test_what_was_learned_is_said(bits: float, said: str) -> None:
    documents = {**DETAILS["documents"], "finetuned": {"bits_per_byte": bits, "perplexity": 30.0}}
    (heading,) = tree(page(details={**DETAILS, "documents": documents})).iter("h1")
    assert text(heading) == said


def test_faults_decide_the_choice_and_it_is_said() -> None:
    assert choice_in_page(hand_set_excess=1.5) == (
        "The tuned decoding is kept: its samples have no more faults than people’s, those of the hand-set one 1.5 "
        "above it."
    )
    assert choice_in_page(kept="hand_set", tuned_excess=2.0, hand_set_excess=0.5) == (
        "The hand-set decoding is kept: its samples have faults 0.5 above people’s level, those of the tuned one 2.0 "
        "above it."
    )


def test_the_page_begins_with_the_first_samples_that_ship() -> None:
    own = [sample("tuned", prompt=f"Prompt {index}") for index in range(3)]
    rows = [*(sample("human", prompt=f"Prompt {index}") for index in range(3)), *own]
    (lead,) = of_class(tree(page(samples=rows)), "lead")
    found = [text(sheet) for sheet in of_class(lead, "sheet")]
    assert found == [f"Prompt {index} upon a time, says tuned." for index in range(2)]


def test_a_winner_at_an_edge_is_said() -> None:
    assert "The winner is at the end of the range that was tried: temperature." in text(tree(page()))


def test_the_choice_is_said() -> None:
    assert choice_in_page() == (
        "The tuned decoding is kept: its samples are 3.25 nearer to people’s texts than those of the hand-set decoding "
        "(95 % interval: 1.50 to 5.00 nearer)."
    )
    assert choice_in_page(kept="hand_set", difference=-0.5, difference_low=-2.0, difference_high=1.0) == (
        "The hand-set decoding is kept: samples of the tuned one are 0.50 nearer to people’s texts, which may be "
        "chance (95 % interval: 2.00 nearer to 1.00 farther)."
    )
    assert choice_in_page(kept="hand_set", difference=2.0, difference_low=1.0, difference_high=3.0) == (
        "The hand-set decoding is kept: samples of the tuned one are 2.00 farther from people’s texts (95 % "
        "interval: 1.00 to 3.00 farther)."
    )


@pytest.mark.parametrize(("kept", "label"), [("tuned", "Tuned"), ("hand_set", "Hand-set")])
def test_the_decoding_that_is_kept_is_marked(kept: str, label: str) -> None:
    root = tree(page(details={**DETAILS, "choice": {**CHOICE, "kept": kept}}))
    assert [text(found) for found in root.iter("th") if of_class(found, "tag")] == [
        f"{label} kept {LABELS[kept].meaning}",
        f"{label} kept",
    ]


def test_without_losses_there_is_no_chart_of_them() -> None:
    root = tree(page(train_losses=[], validation_losses=[]))
    assert [found.get("aria-label", "")[:6] for found in root.iter("svg")] == ["Trials"]
    assert "No validation losses were recorded." in text(root)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([(0, 4.0), (5, 3.0), (9, 3.5)], "is lowest, 3.000, at step 5, of 9: more steps made it worse."),
        ([(0, 4.0), (5, 3.5), (9, 3.0)], "is lowest, 3.000, at step 9, the last evaluation: it was still falling."),
        ([(0, 3.0), (5, 3.5)], "was never below that of the base, 3.000: the model learned nothing."),
    ],
)
def test_the_best_step_is_said(losses: Sequence[tuple[int, float]], said: str) -> None:
    assert f"The validation loss {said}" in text(tree(page(validation_losses=losses)))


def test_the_charts_tell_what_they_show_and_share_no_id() -> None:
    root = tree(page())
    loss, search = root.iter("svg")
    assert loss.get("aria-label") == ("Training and validation loss; the lowest validation loss is 3.875, at step 2")
    assert "balanced, faithful: too wild 1.00, too tame 4.00" in search.get("aria-label", "")
    assert {"balanced, faithful", "adventurous"} <= {text(found) for found in search.iter("text")}
    ids = [found.get("id") for found in root.iter() if found.get("id")]
    assert len(ids) == len(set(ids))


def test_trials_beyond_the_plot_are_counted() -> None:
    assert "4 trials, of which 1 were pruned" in text(tree(page()))
    assert "Outside the plot: 1." in text(tree(page()))


def test_both_decodings_stand_side_by_side() -> None:
    (table,) = of_class(tree(page()), "decodings")
    rows = {text(found[0]): found for found in table.findall("./tbody/tr")}
    assert {name: [text(cell) for cell in found[1:]] for name, found in rows.items() if name != "distance"} == {
        "temperature": ["0.8", "0.9"],
        "top_k": ["50", "0"],
        "min_p": ["0", "0.02"],
    }
    assert [cell.get("class") for cell in rows["top_k"][1:]] == [None, "unset"]


@pytest.mark.parametrize(
    ("copied", "repeated", "parts"),
    [
        ([], [], [("abcdefgh", False, False)]),
        ([[2, 4]], [], [("ab", False, False), ("cd", True, False), ("efgh", False, False)]),
        ([[0, 3], [3, 8]], [], [("abc", True, False), ("defgh", True, False)]),
        ([[1, 5]], [[3, 8]], [("a", False, False), ("bc", True, False), ("de", True, True), ("fgh", False, True)]),
        ([[0, 8]], [[2, 3]], [("ab", True, False), ("c", True, True), ("defgh", True, False)]),
        ([[2, 6]], [[2, 6]], [("ab", False, False), ("cdef", True, True), ("gh", False, False)]),
    ],
)
def test_spans_are_cut_where_they_start_and_end(
    copied: list[list[int]], repeated: list[list[int]], parts: list[tuple[str, bool, bool]]
) -> None:
    assert mark_spans("abcdefgh", copied, repeated) == [Part(*part) for part in parts]


def test_an_empty_text_has_no_parts() -> None:
    assert mark_spans("", [], []) == []


def texts(root: Element) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Of each sample its whole text, and the class and text of each span in it."""
    for found in of_class(root, "text"):
        yield "".join(found.itertext()), [(span.get("class", ""), "".join(span.itertext())) for span in found]


def test_spans_stand_where_they_are_in_the_text() -> None:
    body = "\n\n  Zwölf <b>&amp;\n «Boxkämpfer»  \r jagen 🦊 "
    spans = {"copied_spans": [[4, 9]], "repeated_spans": [[6, 13], [14, 15]]}
    root = tree(page(samples=[sample("human", text=body, **spans)]))
    assert list(texts(root)) == [
        (
            f"Once{body}",
            [
                ("asked", "Once"),
                ("copied", body[4:6]),
                ("copied repeated", body[6:9]),
                ("repeated", body[9:13]),
                ("repeated", body[14:15]),
            ],
        )
    ]


def test_samples_of_a_prompt_stand_side_by_side() -> None:
    samples = [
        sample(name, prompt=f"Prompt {index}", looping=name == "tuned", finish_reason="length", seed=index)
        for name in ("human", *DRAWN)
        for index in range(8)
    ]
    prompts = of_class(tree(page(samples=samples)), "prompt")
    assert [text(of_class(found, "title")[0]) for found in prompts] == [f"Prompt {index}" for index in range(8)]
    assert [found.get("open") for found in prompts] == [""] * 6 + [None] * 2
    for found in prompts:
        assert [text(heading) for heading in found.iter("h3")] == ["People", "Base", "Hand-set", "Tuned loops"]
        assert text(of_class(found, "counts")[0]) == "12 tokenslongest copy 7cut at the limit"


def test_samples_of_different_prompts_are_an_error() -> None:
    with pytest.raises(ValueError, match="different prompts: "):
        page(samples=[sample("human"), sample("tuned", prompt="Twice")])


def test_all_that_is_given_is_escaped() -> None:
    attack = """<script src="http://x">'&</script>"""
    samples = [
        sample(
            name, prompt=attack, text=attack, finish_reason=attack, copied_spans=[[0, 9]], decoding={"stop": [attack]}
        )
        for name in WALL
    ]
    attacked = page(
        details={**DETAILS, "protocol": {**DETAILS["protocol"], "split": attack}},
        samples=samples,
        trials=[{**TRIALS[0], "preset": attack}],
        data_md5=attack,
    )
    root = tree(attacked)
    assert list(root.iter("script")) == []
    # One of them leads the page, too.
    assert [whole for whole, _ in texts(root)] == [attack * 2] * (len(WALL) + 1)
    assert_alone(attacked.replace("http://x", ""))


def test_the_page_needs_no_network() -> None:
    whole = page()
    assert_alone(whole)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in whole


def assert_alone(whole: str) -> None:
    assert re.findall(r"https?:|<script|<link|<img|@import|url\((?!#)", whole) == []
    for found in tree(whole).iter():
        assert "src" not in found.attrib
        for name in ("href", "xlink:href"):
            assert found.get(name, "#").startswith("#")


def test_what_made_it_stands_at_the_end() -> None:
    lists = of_class(tree(page()), "lineage")
    shown = [{text(entry[0]): text(entry[1]) for entry in found} for found in lists]
    expected: list[Mapping[str, str]] = [
        {"data, md5": "c0ffee.dir"},
        {name: str(value) for name, value in DETAILS["protocol"].items()},
    ]
    assert shown == expected


def test_a_form_that_people_do_not_have_is_left_out_and_one_line_says_so() -> None:
    line = "samples.form_pattern is found in none of people’s texts"
    systems = {
        name: {figure: value for figure, value in own.items() if figure != "form_share"}
        for name, own in DETAILS["systems"].items()
    }
    lacking = page(details={**DETAILS, "systems": systems})
    assert lacking.count(line) == 1
    assert 'class="form_share' not in lacking
    assert line not in page()
    assert 'class="form_share' in page()
