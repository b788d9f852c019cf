"""`benchmarks/decodings.py` on the toy project: samples for a blind reading, in the order that `tune` would give."""

from pathlib import Path

from toy_project import Project

from benchmarks.decodings import COLUMNS, run
from pipeline.files import read_jsonl


def test_the_ladder_draws_every_prompt_and_orders_the_decodings(project: Project, tmp_path: Path) -> None:
    table = run(project.root, tmp_path / "samples.jsonl", samples=3).splitlines()
    rows = list(read_jsonl(tmp_path / "samples.jsonl"))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    assert {"greedy", "T0.6", "T1.2", "hand_set", "tuned", "tuned_best_of_4"} < set(systems)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in rows[:3]] * len(systems)
    assert table[0].split() == ["decoding", "excess", "distance", *COLUMNS]
    ranks = [tuple(map(float, line.split()[1:3])) for line in table[1:-1]]
    assert ranks == sorted(ranks)
    order = [line.split()[0] for line in table[1:-1]]
    assert table[-1] == "--against " + ",".join(f"{name}={rank}" for rank, name in enumerate(order, start=1))
