"""Files become clean documents in three splits."""

import json
import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from untidy_tales import END, NAMES, START, tale, write_tales

from pipeline.corpus.preparation import prepare
from pipeline.errors import UserError
from pipeline.params.prepare import PrepareParams
from pipeline.params.whole import load_params

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml").prepare
SPLITS = ("train", "validation", "test")


def read_documents(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: [json.loads(line) for line in (out / f"{split}.jsonl").open(encoding="utf-8")] for split in SPLITS}


def read_report(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


@pytest.fixture
def params() -> PrepareParams:
    return PARAMS.model_copy(update={"validation_share": 0.3, "test_share": 0.3})


def test_untidy_tales_come_out_clean_and_once(tmp_path: Path, params: PrepareParams) -> None:
    write_tales(tmp_path / "data")
    prepare(tmp_path / "data", tmp_path / "out", params)
    documents = [document for split in read_documents(tmp_path / "out").values() for document in split]
    assert sorted(document["text"] for document in documents) == sorted(tale(name) for name in NAMES)
    assert all(list(document) == ["id", "title", "text", "source"] for document in documents)
    assert len({document["id"] for document in documents}) == len(NAMES)
    titles = {document["source"]: document["title"] for document in documents}
    assert titles["1.txt:2"] == "The Lamp of Banny"
    assert titles["2.jsonl:1"] == "Fanny"


def test_report_counts_every_row_and_names_every_duplicate(tmp_path: Path, params: PrepareParams) -> None:
    write_tales(tmp_path / "data")
    prepare(tmp_path / "data", tmp_path / "out", params)
    report = read_report(tmp_path / "out")
    assert report["rows"] == 25
    assert report["kept"] == 20
    assert report["dropped"] == {"empty": 1, "fragment": 1, "exact_duplicate": 2, "near_duplicate": 1}
    assert (report["notices"], report["page_marks"]) == (2, 15)
    for counts in (report, *report["files"].values()):
        assert counts["rows"] == counts["kept"] + sum(counts["dropped"].values())
    assert report["files"]["4.txt"]["wrap_columns"] in (71, 72)
    assert report["files"]["4.txt"]["encoding"] == "utf-8"
    duplicates = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").open(encoding="utf-8")]
    assert [(entry["source"], entry["repeats"], entry["reason"]) for entry in duplicates] == [
        ("1.txt:6", "1.txt:1", "exact_duplicate"),
        ("2.jsonl:6", "1.txt:2", "near_duplicate"),
        ("3.csv:6", "2.jsonl:3", "exact_duplicate"),
    ]
    for split, documents in read_documents(tmp_path / "out").items():
        assert report["splits"][split] == {
            "documents": len(documents),
            "words": sum(len(document["text"].split()) for document in documents),
            "bytes": sum(len(document["text"].encode()) for document in documents),
        }


PIECES = ["One two three. ", "four &amp; five ", "<p>six</p>", "â€œseven.", "e\u0301\u200b", "   ", "\r\n", "\n\n\n"]
LINES = [
    "***",
    "[page 7]",
    "[Transcriber's Note: x]",
    "\nProduced by Jane Roe\n",
    START,
    END,
    "*** END OF PART ONE ***",
    "a<|endoftext|><|startoftext|>b",
]
PARTS = st.sampled_from([*PIECES, *(f"\n{line}\n" for line in LINES), "\n" + 11 * ("word " * 14 + "\n")])


@settings(max_examples=60)
@given(st.lists(PARTS, max_size=40).map("".join))
def test_every_character_is_kept_or_dropped_by_a_rule(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "out"
        write_tales(data)
        (data / "5.txt").write_bytes(text.encode())
        (data / "6.jsonl").write_text(json.dumps({"text": text}) + "\n")
        (data / "7.md").write_bytes(b"---\ntitle: T\n---\n" + text.encode())
        params = PARAMS.model_copy(update={"validation_share": 0.3, "test_share": 0.3, "piece_words": 10})
        prepare(data, out, params)
        files = read_report(out)["files"]
        kept = Counter[str]()
        for documents in read_documents(out).values():
            for document in documents:
                kept[document["source"].partition(":")[0]] += len(document["text"])
        for name, file in files.items():
            assert file["characters"]["read"] == file["characters"]["kept"] + sum(
                file["characters"]["dropped"].values()
            )
            assert file["characters"]["kept"] == kept[name]
        for name in ("1.txt", "4.txt", "5.txt", "7.md"):
            assert files[name]["characters"]["read"] == len((data / name).read_text())
        assert files["6.jsonl"]["characters"]["read"] == len(text)


def test_a_part_that_ends_is_not_lost(tmp_path: Path, params: PrepareParams) -> None:
    words = [f"w{number}" for number in range(36_000)]
    parts = [" ".join(words[start : start + 12_000]) for start in (0, 12_000, 24_000)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "book.txt").write_text("\n*** END OF PART ONE ***\n".join(parts))
    prepare(tmp_path / "data", tmp_path / "out", params)
    texts = " ".join(document["text"] for split in read_documents(tmp_path / "out").values() for document in split)
    assert set(words) <= set(texts.split())
    assert texts.count("END OF PART ONE") == 2


def test_same_input_gives_the_same_bytes_in_any_number_of_processes(
    tmp_path: Path, params: PrepareParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.corpus.preparation.CHUNK_CHARACTERS", 1000)
    write_tales(tmp_path / "data")
    for out, workers in (("one", 1), ("again", 1), ("three", 3)):
        prepare(tmp_path / "data", tmp_path / out, params, workers=workers)
    for name in (*(f"{split}.jsonl" for split in SPLITS), "duplicates.jsonl", "report.json"):
        contents = {(tmp_path / out / name).read_bytes() for out in ("one", "again", "three")}
        assert len(contents) == 1, name


def test_a_ray_cluster_writes_the_same_bytes(
    tmp_path: Path, params: PrepareParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the extra ray)")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipeline.corpus.preparation.CHUNK_CHARACTERS", 1000)
    write_tales(tmp_path / "data")
    prepare(tmp_path / "data", tmp_path / "local", params, workers=1)
    prepare(tmp_path / "data", tmp_path / "ray", params.model_copy(update={"executor": "ray"}), workers=2)
    for name in (*(f"{split}.jsonl" for split in SPLITS), "duplicates.jsonl", "report.json"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes(), name
    (tmp_path / "data" / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        prepare(tmp_path / "data", tmp_path / "ray", params.model_copy(update={"executor": "ray"}), workers=2)


def test_added_documents_move_none(tmp_path: Path, params: PrepareParams) -> None:
    write_tales(tmp_path / "data")
    prepare(tmp_path / "data", tmp_path / "before", params)
    (tmp_path / "data" / "0.jsonl").write_text("".join(json.dumps({"text": tale(f"New{n}")}) + "\n" for n in range(30)))
    prepare(tmp_path / "data", tmp_path / "after", params)
    before, after = read_documents(tmp_path / "before"), read_documents(tmp_path / "after")
    for split in SPLITS:
        assert {document["id"] for document in before[split]} <= {document["id"] for document in after[split]}


def test_verse_keeps_its_lines(tmp_path: Path, params: PrepareParams) -> None:
    speech = "Full fathom five thy father lies;\nOf his bones are coral made;\nThose are pearls that were his eyes:"
    verse = "\n\n".join(f"Ariel {number}:\n{speech}" for number in range(200))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "verse.txt").write_text(verse + "\n")
    loose = params.model_copy(update={"near_duplicate": params.near_duplicate.model_copy(update={"jaccard": 0.999})})
    prepare(tmp_path / "data", tmp_path / "out", loose.model_copy(update={"piece_words": 60}))
    documents = [document for split in read_documents(tmp_path / "out").values() for document in split]
    documents.sort(key=lambda document: int(document["source"].partition(":")[2]))
    assert "\n\n".join(document["text"] for document in documents) == verse


def test_short_pieces_of_running_text_are_no_fragments(tmp_path: Path, params: PrepareParams) -> None:
    (tmp_path / "data").mkdir()
    for number in range(30):
        (tmp_path / "data" / f"{number}.txt").write_text(f"Note {number}.\n")
    assert prepare(tmp_path / "data", tmp_path / "out", params).outcomes == {"kept": 30}


def test_corpus_too_small_to_split_leaves_only_the_report(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("One short note.\n")
    (tmp_path / "data" / "b.jsonl").write_text('{"text": "Too short."}\n' * 3 + '{"text": ""}\n')
    with pytest.raises(
        UserError,
        match=r"data: 1 documents of 5 rows, too few to split: .* would be empty; dropped 1 empty, 3 fragment "
        r"\(by file: .*report\.json\); add text",
    ):
        prepare(tmp_path / "data", tmp_path / "out", PARAMS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]
    report = read_report(tmp_path / "out")
    assert report["files"]["b.jsonl"]["dropped"]["fragment"] == 3


def test_unreadable_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        prepare(tmp_path / "data", tmp_path / "out", PARAMS)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_markdown_notes_are_documents_with_their_titles(tmp_path: Path, params: PrepareParams) -> None:
    (tmp_path / "data").mkdir()
    matter = "---\ntitle: Note {}\ntags: [harbour]\n---\n"
    body = "Morning\n-------\n\n{0}one {0}two.\n\nEvening\n-------\n\n{0}three.\n"
    for number in range(30):
        (tmp_path / "data" / f"{number}.md").write_text(matter.format(number) + body.format(f"w{number}"))
    report = prepare(tmp_path / "data", tmp_path / "out", params)
    assert report.outcomes == {"kept": 30}
    assert "characters of front matter" in report.describe_dropped()
    documents = [document for split in read_documents(tmp_path / "out").values() for document in split]
    assert {document["title"]: document["text"] for document in documents} == {
        f"Note {number}": body.format(f"w{number}").strip() for number in range(30)
    }
    file = read_report(tmp_path / "out")["files"]["7.md"]
    assert file["characters"]["dropped"]["front_matter"] == len(matter.format(7))
    assert file["characters"]["read"] == len((tmp_path / "data" / "7.md").read_text())


def test_files_in_code_pages_are_named_with_their_encodings(tmp_path: Path, params: PrepareParams) -> None:
    russian = [
        f"Жил-был царь номер {number}, и было у него три сына; он шёл по берегу моря и пел." for number in range(40)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes("\n***\n".join(russian[:30]).encode("windows-1251"))
    (tmp_path / "data" / "b.csv").write_bytes(
        "\n".join(["text", *(f'"{text}"' for text in russian[30:])]).encode("koi8-r")
    )
    (tmp_path / "data" / "c.txt").write_text("Plain.")
    loose = params.model_copy(update={"near_duplicate": params.near_duplicate.model_copy(update={"jaccard": 0.999})})
    report = prepare(tmp_path / "data", tmp_path / "out", loose)
    assert report.describe_encodings() == "koi8-r: b.csv; windows-1251: a.txt"
    documents = [document for split in read_documents(tmp_path / "out").values() for document in split]
    assert {document["text"] for document in documents} == {*russian, "Plain."}
    unmatched = loose.model_copy(update={"encoding": {"*.md": "koi8-r"}})
    with pytest.raises(UserError, match=r"prepare\.encoding: '\*\.md' matches no file of the data"):
        prepare(tmp_path / "data", tmp_path / "out", unmatched)


@pytest.mark.parametrize(
    "value", ["koi9", "base64", "unicode_escape", 3, {"*": "koi9"}, {"*": None}, {1: "cp1251"}, True]
)
def test_parameter_that_is_no_encoding_is_an_error(value: Any) -> None:
    with pytest.raises(ValueError, match="encoding"):
        PrepareParams.model_validate({**PARAMS.model_dump(), "encoding": value})


def test_harbour_tales_are_330_each_whole_and_once(tmp_path: Path) -> None:
    data = ROOT / "data"
    if not (data / "volume-1.txt").exists():
        pytest.skip("the harbour tales are not at data/ (dvc pull data.dvc)")
    report = prepare(data, tmp_path / "out", PARAMS)
    assert report.outcomes == {"kept": 330, "empty": 1, "fragment": 6, "exact_duplicate": 20, "near_duplicate": 15}
    texts = [document["text"] for split in read_documents(tmp_path / "out").values() for document in split]
    assert len(set(texts)) == 330
    whole = re.compile(r"# [^\n]+\n\n(?:[^\n]+\n\n){3,6}They say in Lanternmouth: [^\n]+")
    assert [text for text in texts if not whole.fullmatch(text)] == []
    assert set(re.findall(r"[^ -~\n]|[<>&{}\[\]]|  |â", "".join(texts))) == {"—"}


HAN = "我们去了北京天气很好说话来回大小上下"
THAI = "กขคงจฉชซญดตถทนบปผพมยรลวสหอ"


def write_rows(data: Path, texts: list[str]) -> None:
    data.mkdir()
    (data / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize(
    "letters", [HAN, THAI, "កខគឃងចឆជឈញដឋឌឍណត", "ကခဂဃငစဆဇဈညဋဌဍဎဏတ"], ids=["Han", "Thai", "Khmer", "Myanmar"]
)
def test_texts_without_spaces_are_no_fragments(letters: str, tmp_path: Path, params: PrepareParams) -> None:
    numbers = random.Random(1)
    texts = ["".join(numbers.choices(letters, k=200)) for _ in range(40)]
    write_rows(tmp_path / "data", [*texts, letters[:9]])
    report = prepare(tmp_path / "data", tmp_path / "out", params)
    assert report.outcomes == {"kept": 40, "fragment": 1}
    assert sum(size.words for size in report.splits.values()) == 40 * 200


def test_near_duplicates_without_spaces_are_found(tmp_path: Path, params: PrepareParams) -> None:
    numbers = random.Random(1)
    texts = ["".join(numbers.choices(HAN, k=200)) for _ in range(40)]
    write_rows(tmp_path / "data", [*texts, texts[0] + "。好", texts[1][:90] + "好" + texts[1][91:]])
    report = prepare(tmp_path / "data", tmp_path / "out", params)
    assert report.outcomes == {"kept": 40, "near_duplicate": 2}


def test_sentences_that_differ_in_vowel_signs_are_all_kept(tmp_path: Path, params: PrepareParams) -> None:
    places = ["मंदिर", "घर", "बगीचे", "नदी", "बाज़ार", "गाँव", "खेत", "पुल"]
    pairs = [(first, second) for first in places for second in places if first != second]
    texts = [
        f"{first} के पास वह रोज़ सुबह {comes} है और {second} की ओर {goes} है।"
        for first, second in pairs
        for comes, goes in (("आता", "जाता"), ("आती", "जाती"), ("आते", "जाते"))
    ]
    write_rows(tmp_path / "data", texts)
    exact = params.model_copy(update={"near_duplicate": params.near_duplicate.model_copy(update={"jaccard": 1.0})})
    report = prepare(tmp_path / "data", tmp_path / "out", exact)
    assert report.outcomes == {"kept": len(texts)}


def test_chats_and_code_come_out_as_they_are(tmp_path: Path, params: PrepareParams) -> None:
    numbers = random.Random(2)
    words = ["door", "ferry", "cloud", "letter", "market", "gull", "oven", "baker", "harbour"]
    nicks = ("Mark", "Link", "q", "Map", "anna", "b", "s", "Title", "p")
    chats = [
        "\n".join(f"<{numbers.choice(nicks)}> {' '.join(numbers.choices(words, k=9))}" for _ in range(8))
        for _ in range(30)
    ]
    code = [
        f"template <typename T>\nclass Box{index} {{\n  std::map<s, q> table_;\n"
        f"  std::vector<b> {numbers.choice(words)}_;\n"
        f"  if (x <a> y && a<b>(c)) {{ return Option<object>({' + '.join(numbers.choices(words, k=9))}); }}\n"
        f'  // &amp; stays &lt;here&gt;\n  const html = "<div class=\'x\'>" + name{index} + "</div>";\n}};'
        for index in range(30)
    ]
    write_rows(tmp_path / "data", [*chats, *code])
    report = prepare(tmp_path / "data", tmp_path / "out", params)
    texts = {document["text"] for split in read_documents(tmp_path / "out").values() for document in split}
    assert texts == {*chats, *code}
    assert report.files[0].repairs.removed["markup"] == 0


def test_markup_is_counted_by_file_and_a_parameter_keeps_it(tmp_path: Path, params: PrepareParams) -> None:
    write_tales(tmp_path / "data")
    prepare(tmp_path / "data", tmp_path / "out", params)
    counts = {
        name: file["characters"]["dropped"]["markup"] for name, file in read_report(tmp_path / "out")["files"].items()
    }
    assert {name: count for name, count in counts.items() if count} == {"2.jsonl": 60}
    kept = prepare(tmp_path / "data", tmp_path / "out", params.model_copy(update={"strip_markup": False}))
    assert all(file.repairs.removed["markup"] == 0 for file in kept.files)
    assert "<p>" in (tmp_path / "out" / "train.jsonl").read_text()


def test_output_of_datatrove_is_read(tmp_path: Path, params: PrepareParams) -> None:
    # As its JsonlWriter and ParquetWriter write documents, which have an id and metadata of any depth.
    texts = [tale(f"Peer{number}") for number in range(40)]
    rows = [
        {"text": text, "id": f"f/{number}", "metadata": {"file_path": "f", "token_count": number, "tags": ["a"]}}
        for number, text in enumerate(texts)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    pq.write_table(pa.Table.from_pylist(rows[20:]), tmp_path / "data" / "00001.parquet")
    report = prepare(tmp_path / "data", tmp_path / "out", params)
    assert report.outcomes == {"kept": 40}
    documents = [document for split in read_documents(tmp_path / "out").values() for document in split]
    assert sorted(document["text"] for document in documents) == sorted(texts)
