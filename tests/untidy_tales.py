"""A miniature of the harbour tales for tests: twenty tales in four files, with the faults that `prepare` repairs."""

import csv
import json
import textwrap
from pathlib import Path

START, END = (f"*** {edge} OF THE PROJECT GUTENBERG EBOOK TALES ***" for edge in ("START", "END"))
NAMES = [f"{letter}anny" for letter in "ABCDEFGHIJKLMNOPQRST"]


def tale(name: str) -> str:
    """Return a tale of 66 words, 61 of which occur in no other tale."""
    seen = " ".join(f"{name}{number}" for number in range(30))
    told = " ".join(f"{number}{name}" for number in range(30))
    return f"# The Lamp of {name}\n\n{seen}.\n\n{told}.\n\nThey say: it is so."


def write_tales(data: Path) -> None:
    """Write the files to a new folder."""
    data.mkdir()
    tales = {name: tale(name) for name in NAMES}
    (data / "README.md").write_text("# The card\n")
    noticed = "\n\n***\n\n".join([*(tales[name] for name in NAMES[:5]), tales[NAMES[0]].upper()])
    (data / "1.txt").write_text(f"Do not remove.\n{START}\n{noticed}\n{END}\nBelow.\n")
    rows = [{"title": name, "text": f"<p>{tales[name]}</p>".replace("\n\n", "</p><p>")} for name in NAMES[5:10]]
    rows += [{"title": "Retold", "text": tales[NAMES[1]].replace("Banny7 ", "")}, {"title": "Empty", "text": " "}]
    (data / "2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (data / "3.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "text"])
        writer.writerows([name, tales[name].replace("\n\n", "\r\n\r\n\r\n")] for name in [*NAMES[10:15], NAMES[7]])
    wrapped = [
        "\n\n[page 7]\n\n".join(textwrap.fill(part, 72) for part in tales[name].split("\n\n")) for name in NAMES[15:]
    ]
    (data / "4.txt").write_text("\n\n***\n\n".join([*wrapped, "# Torn\n\nThere was"]))
