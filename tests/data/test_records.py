"""Files of records: each has a document in a field, and none is read as prose."""

import json

import pytest

from mixhead.data.text import text_source
from mixhead.errors import MixheadError

ROWS = [{"text": "one — two", "other": "eins"}, {"text": "three\nfour", "other": "drei"}]


def written(tmp_path, name):
    contents = {
        ".jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
        ".ndjson": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
        ".json": json.dumps(ROWS),
        ".tsv": 'text\tother\n"one — two"\teins\n"three\nfour"\tdrei\n',
        ".csv": 'text,other\n"one — two",eins\n"three\nfour",drei\n',
    }
    file = tmp_path / name
    file.write_text(contents[file.suffix.lower()], encoding="utf-8", newline="")
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "A.JSONL"])
def test_documents_are_the_field_text_or_the_one_that_is_named(name, tmp_path):
    if name.isupper():
        (tmp_path / name).write_text(json.dumps(ROWS[0]))
        assert text_source(tmp_path / name) == ["one — two"]
        return
    file = written(tmp_path, name)
    assert text_source(file) == ["one — two", "three\nfour"]
    assert text_source(f"{file}:other") == ["eins", "drei"]


def test_strings_are_documents_and_empty_ones_are_left_out(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(["one", "", {"text": None}, {"text": " "}, {"text": "two"}]))
    assert text_source(file) == ["one", "two"]


def test_documents_may_be_long(tmp_path):
    long = "word " * 100_000
    (tmp_path / "a.csv").write_text(f'text\n"{long}"\n')
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long}))
    assert text_source(tmp_path / "a.csv") == text_source(tmp_path / "a.jsonl") == [long]


def test_prose_with_another_ending_stays_prose(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text('{"text": "one"}')
    assert text_source(file) == ['{"text": "one"}']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', "Line 2 of .*a.jsonl is no JSON"),
        (
            "a.jsonl",
            '{"prompt": "a", "answer": "b"}',
            r"no text in a field 'text' \(its fields: prompt, answer\): name",
        ),
        ("a.jsonl", '{"text": {"a": 1}}', "no text in a field 'text'"),
        ("a.jsonl", "17\n", "no text in a field 'text'"),
        ("a.json", "[" * 100_000, "is no JSON"),
        ("a.json", "[]", "No record of .* says anything"),
        ("a.csv", "a,b\n1,2\n", "its fields: a, b"),
    ],
)
def test_records_of_no_use_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(MixheadError, match=message):
        text_source(tmp_path / name)
