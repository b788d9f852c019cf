"""Choosing presets among the trials of a search: the winner, and of those that are nearly as good the two ends."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.decoding import SamplingParams
from pipeline.evaluation.search import Values
from pipeline.evaluation.trials import Final, Trial
from pipeline.params.tune import RangeParams, SpaceParams

PRESET_DISTANCE = 3.0
"""A preset may be this many times as far from people as the winner."""
PRESET_EXCESS = 2.0
"""A preset may have this many times the winner's excess: none if the winner has no more faults than people."""


def choose_presets(trials: Sequence[Trial], finals: Mapping[int, Final]) -> dict[str, int]:
    """Return the number of each preset's trial.

    `balanced` is the best finalist: the one with the fewest faults above people's level and, of equal ones, the nearest
    to people. Of the complete trials with at most `PRESET_EXCESS` times its faults and `PRESET_DISTANCE` times its
    distance, `faithful` is the tamest and `adventurous` the least tame. If no other trial is left, both are the winner.
    """
    winner = min(finals, key=lambda number: finals[number])
    good = [
        trial
        for trial in trials
        if trial.state == "complete"
        and trial.excess <= PRESET_EXCESS * trials[winner].excess
        and trial.distance <= PRESET_DISTANCE * trials[winner].distance
    ]
    tamest = max(good, key=lambda trial: trial.too_tame - trial.too_wild)
    least_tame = min(good, key=lambda trial: trial.too_tame - trial.too_wild)
    return {"balanced": winner, "faithful": tamest.number, "adventurous": least_tame.number}


def front_of(trials: Sequence[Trial]) -> list[Trial]:
    """Return the complete trials that no other beats in both kinds of faults, from the least tame on."""
    complete = [trial for trial in trials if trial.state == "complete"]
    return [complete[index] for index in pareto_front([(trial.too_tame, trial.too_wild) for trial in complete])]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point dominates, in the order of the first number.

    A point dominates another if neither of its numbers is larger and one is smaller. Of equal points all are on the
    front, or none.
    """
    order = sorted(range(len(points)), key=lambda index: points[index])
    front: list[int] = []
    for index in order:
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def edges_of(values: Values, space: SpaceParams) -> list[str]:
    """Return the searched parameters that have the lowest or the highest value of their range.

    The best value may be outside. An end that turns the filter off is no edge: there is nothing beyond it.
    """
    neutral = SamplingParams()
    return [
        name
        for name, tried in space
        if isinstance(tried, RangeParams) and values[name] in tried.ends() and values[name] != getattr(neutral, name)
    ]


def rows_of(
    trials: Sequence[Trial], finals: Mapping[int, Final], presets: Mapping[str, int], space: SpaceParams
) -> list[dict[str, Any]]:
    """Return the rows of `trials.json`: each trial, its place among the others, its final figures and its presets."""
    front = {trial.number for trial in front_of(trials)}
    return [
        {
            **asdict(trial),
            "edges": edges_of(trial.values, space),
            "on_front": trial.number in front,
            "final": finals[trial.number]._asdict() if trial.number in finals else None,
            "preset": ", ".join(name for name, number in presets.items() if number == trial.number) or None,
        }
        for trial in trials
    ]
