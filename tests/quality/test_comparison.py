"""Sets of samples compared with people's texts."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.quality.comparison import (
    MAUVE_SEEDS,
    Human,
    SampleFigures,
    compare,
    measure_people,
    measure_sample,
    measure_set,
)
from pipeline.quality.distance import EMPTY_EXCESS, distance
from pipeline.quality.diversity import distinct_n
from pipeline.quality.faults import fault_rates, find_faults
from pipeline.quality.jackknife import jackknife_interval, leave_each_out
from pipeline.quality.mauve import mauve_of_buckets, sort_in_buckets
from pipeline.quality.repetition import is_looping, rep_n
from pipeline.quality.self_bleu import self_bleu
from pipeline.quality.zipf import zipf_coefficient

RULES = {"loop_ngram_tokens": 4, "loop_repeats": 3, "in_form": True}
FAULTS = find_faults("The lomp was lit.", prompt="", lexicon=frozenset({"the", "was", "lit"}), finished=True)


def texts(seed: int, exponent: float = 1.4, count: int = 8) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.zipf(exponent, size=int(size)).clip(max=300).tolist() for size in rng.integers(40, 60, count)]


def measured(ids: Sequence[Sequence[int]], seed: int = 0) -> list[SampleFigures]:
    rng = np.random.default_rng(seed)
    return [
        measure_sample(
            own, faults=FAULTS, copy_tokens=index, logprob=-3.0 * len(own) - index, state=rng.normal(size=5), **RULES
        )
        for index, own in enumerate(ids)
    ]


@pytest.fixture
def human() -> Human:
    return measure_people(measured(texts(1)))


def test_a_sample_by_hand() -> None:
    found = measure_sample([1, 2, 1, 2, 1, 2], faults=FAULTS, copy_tokens=3, logprob=-6.0, state=np.ones(2), **RULES)
    assert found.rep == pytest.approx((3 / 5, 2 / 4, 1 / 3))
    assert found.looping
    assert found.in_form
    assert not measure_sample(
        [1, 2, 1, 2, 1], faults=FAULTS, copy_tokens=3, logprob=-6.0, state=np.ones(2), **RULES
    ).looping


def test_figures_of_a_set_are_those_of_its_texts() -> None:
    ids = [*texts(2), [7, 7, 7, 7, 7, 7]]
    scores = measure_set(measured(ids))
    assert asdict(scores) == pytest.approx(
        {
            **{f"rep_{n}": np.mean([rep_n(own, n) for own in ids]) for n in (2, 3, 4)},
            **{f"distinct_{n}": distinct_n(ids, n) for n in (1, 2, 3)},
            "zipf": zipf_coefficient(ids),
            "self_bleu": self_bleu(ids, 4),
            "perplexity": math.exp(3 + sum(range(9)) / sum(map(len, ids))),
            "mean_tokens": np.mean([len(own) for own in ids]),
            **asdict(fault_rates([FAULTS])),
            "mean_copy_tokens": 4.0,
            "looping_share": np.mean([is_looping(own, 4, 3) for own in ids]),
            "form_share": 1.0,
            "mauve": None,
        }
    )


def test_people_are_at_no_distance_from_themselves(human: Human) -> None:
    found = compare(human.samples, human, intervals=True)
    assert found.figures == replace(human.figures, mauve=1.0)
    assert found.interval() == pytest.approx((0, 0, 0), abs=1e-9)


def test_distance_is_that_of_the_scores_with_mauve(human: Human) -> None:
    own = measured(texts(2), seed=2)
    found = compare(own, human)
    features = [np.stack([sample.state for sample in side]) for side in (own, human.samples)]
    mauves = [mauve_of_buckets(sort_in_buckets(*features, seed=seed)) for seed in MAUVE_SEEDS]
    expected = replace(measure_set(own), mauve=np.mean(mauves))
    assert found.figures == expected
    assert found.distance == distance(expected, human.figures, human.scales)


def test_intervals_leave_each_prompt_out_of_samples_and_people(human: Human) -> None:
    # All states are equal: MAUVE is 1 whichever is left out.
    one = [replace(sample, state=np.ones(5)) for sample in human.samples]
    near, far = ([replace(sample, state=np.ones(5)) for sample in measured(texts(seed, 1.2))] for seed in (2, 3))
    people = measure_people(one)

    def statistic(pairs: list[tuple[SampleFigures, SampleFigures]]) -> float:
        own = replace(measure_set([pair[0] for pair in pairs]), mauve=1.0)
        return distance(own, measure_set([pair[1] for pair in pairs]), people.scales).total

    first, second = (compare(own, people, intervals=True) for own in (near, far))
    pairs = [list(zip(own, one, strict=True)) for own in (near, far)]
    totals = [statistic(own) for own in pairs]
    without = [np.array(leave_each_out(own, statistic)) for own in pairs]
    assert first.interval() == pytest.approx(jackknife_interval(totals[0], without[0]))
    expected = jackknife_interval(totals[0] - totals[1], without[0] - without[1])
    assert first.difference(second) == pytest.approx(expected)


def test_a_set_does_not_differ_from_itself(human: Human) -> None:
    found = compare(measured(texts(2)), human, intervals=True)
    assert found.difference(found) == (0, 0, 0)


def test_a_form_that_no_text_of_people_has_is_left_out() -> None:
    people = [replace(sample, in_form=False) for sample in measured(texts(1))]
    human = measure_people(people)
    assert (human.has_form, human.figures.form_share) == (False, None)
    found = compare(measured(texts(2)), human, intervals=True)
    assert found.figures.form_share is None
    assert "form_share" not in human.scales
    assert "form_share" not in found.distance.excesses
    assert all(math.isfinite(value) for value in found.interval())
    some = measure_people([*people[:-1], replace(people[-1], in_form=True)])
    assert (some.has_form, some.figures.form_share) == (True, 1 / 8)
    without = compare([replace(sample, in_form=False) for sample in measured(texts(2))], some)
    assert (without.figures.form_share, "form_share" in without.distance.excesses) == (0, True)


def test_intervals_exist_only_if_asked_for(human: Human) -> None:
    with pytest.raises(ValueError, match="without intervals"):
        compare(human.samples, human).interval()


def test_the_first_prompts_alone(human: Human) -> None:
    part = human.first(5)
    assert part.figures == measure_set(human.samples[:5])
    assert len(part.without) == 5


def test_what_cannot_be_compared_is_an_error(human: Human) -> None:
    with pytest.raises(UserError, match="7 samples cannot be compared with 8 texts"):
        compare(human.samples[:7], human)
    with pytest.raises(UserError, match="1 text of people is too little"):
        measure_people(human.samples[:1])
    with pytest.raises(UserError, match=r"^people's texts: none of them has a token after its prompt"):
        measure_people(measured([[], []]))


@pytest.mark.parametrize("empty", [[[]] * 8, [[1], *[[]] * 7]], ids=["all", "all but one"])
def test_empty_samples_are_measured(human: Human, empty: list[list[int]]) -> None:
    found = compare(measured(empty), human, intervals=True)
    assert all(math.isfinite(value) for value in (*asdict(found.figures).values(), *found.interval()))
    assert (found.distance.excess >= EMPTY_EXCESS) == (empty[0] == [])
    # All but one of people's texts may be empty, too.
    silent = measure_people(measured([*[[]] * 7, [1]]))
    assert math.isfinite(compare(measured(empty), silent, intervals=True).distance.score)
