"""The search tool: what is read of a corpus, how it is cut, what is found."""

import asyncio
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtpo.tools import ToolSet
from gtpo.tools.corpus import _split, read_passages
from gtpo.tools.search import PassageIndex
from gtpo.tools.words import words_of
from gtpo.types import ToolCall, ToolResult, ToolStatus

ROWS = [
    {"title": "Ulm", "text": "The minster of Ulm has the tallest steeple.", "tags": ["church", "tower"]},
    {"title": "Bonn", "text": "Beethoven was born in Bonn.", "tags": []},
    {"title": "Kiel", "text": "Kiel has a canal to the North Sea.", "height": 3},
]


def search(table: dict[str, object], *queries: str) -> list[ToolResult]:
    tools = ToolSet(["search"], {"search": table})
    return asyncio.run(tools.toolbox(None).execute([ToolCall("search", {"query": query}) for query in queries]))


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.jsonl.gz", "c.json.gz"])
def test_every_form_of_a_file_reads_the_same(tmp_path: Path, name: str) -> None:
    text = json.dumps(ROWS) if ".json." in f"{name}." else "\n\n".join(map(json.dumps, ROWS))
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_passages(path, fields=["text"], max_chars=99) == [row["text"] for row in ROWS]
    assert read_passages(path, fields=["title", "tags", "height"], max_chars=99) == [
        "title: Ulm\ntags: church, tower",
        "title: Bonn",
        "title: Kiel\nheight: 3",
    ]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name, text in (("b.md", "second"), ("a/z.txt", "first"), ("c.py", "no text"), ("d.txt", " ")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_passages(tmp_path, fields=["text"], max_chars=99) == ["a/z.txt\nfirst", "b.md\nsecond"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", '{"text": "a"}\n{"text":', r"c\.jsonl:2 is not JSON"),
        ("c.jsonl", '{"body": "a"}', r"c\.jsonl:1 must have one of the fields text, got body"),
        ("c.jsonl", "[1]", r"c\.jsonl:1 must hold an object, got list"),
        ("c.json", "{}", r"must hold a list of objects, got dict"),
        ("c.json", "[]", "corpus must hold some text, got none"),
        ("c.jsonl", '{"text": "a"}\n{"text": "\udce9"}', r"c\.jsonl:2 must be text in UTF-8, got the byte 0xe9"),
        ("c.json", '[{"text": "\udcff"}]', r"c\.json must be text in UTF-8, got the byte 0xff"),
        ("c.jsonl", '{"text": ' + "9" * 5000 + "}", r"c\.jsonl:1 is not JSON: Exceeds the limit"),
        ("c.jsonl.gz", "no gzip", r"c\.jsonl\.gz is no whole gzip file: Not a gzipped file"),
        ("c.csv", "a", r"corpus must be a folder, or a \.jsonl or \.json file"),
    ],
)
def test_a_corpus_that_cannot_be_read_names_file_and_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    # half a surrogate pair stands for a byte that is no UTF-8
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_passages(tmp_path / name, fields=["text"], max_chars=99)


def test_a_gzip_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode())[:-12])
    with pytest.raises(ValueError, match=r"c\.jsonl\.gz is no whole gzip file: "):
        read_passages(path, fields=["text"], max_chars=99)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, text in (("c.jsonl", json.dumps(ROWS[0])), ("c.json", json.dumps(ROWS[:1]))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_passages(tmp_path / name, fields=["text"], max_chars=99) == [ROWS[0]["text"]]


def test_texts_without_spaces_are_cut_at_sentences() -> None:
    assert list(_split("", "一二三四五。六七八九十。", 8)) == ["一二三四五。", "六七八九十。"]


@given(st.text(alphabet="ab .\n", max_size=300), st.integers(20, 40))
def test_passages_are_short_and_hold_all_words(text: str, max_chars: int) -> None:
    head = "file.txt\n"
    passages = list(_split(head, text, max_chars))
    assert all(len(passage) <= max_chars and passage.startswith(head.rstrip()) for passage in passages)
    if text.strip():
        assert "".join("".join(p.removeprefix(head) for p in passages).split()) == "".join(text.split())


def test_passages_of_one_object_share_its_first_field(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps([{"id": "A1", "text": "one two three four five six"}, {"id": "B" * 40, "text": "seven"}])
    )
    assert read_passages(path, fields=["id", "text"], max_chars=28) == [
        "id: A1\ntext: one two three",
        "id: A1\nfour five six",
        f"id: {'B' * 10}\ntext: seven",
    ]


def test_ranking_is_bm25_by_its_formula() -> None:
    passages = ["red cat", "red red dog bird", "cat cat mouse", "dog"]
    tokens = [passage.split() for passage in passages]
    mean_length = np.mean([len(words) for words in tokens])

    def score(words: list[str], query: str) -> float:
        total = 0.0
        for word in query.split():
            df = sum(word in other for other in tokens)
            tf = words.count(word)
            idf = np.log(1 + (len(tokens) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean_length))
        return total

    index = PassageIndex(passages)
    for query in ("red", "cat dog", "bird mouse red", "cat"):
        expected = sorted((i for i in range(4) if score(tokens[i], query) > 0), key=lambda i: -score(tokens[i], query))
        assert index.best(query, num=4) == [passages[i] for i in expected]


def test_equal_scores_keep_the_order_of_the_corpus() -> None:
    index = PassageIndex([f"twin number{i}" for i in range(50)] + ["other words"])
    assert index.best("twin", num=3) == ["twin number0", "twin number1", "twin number2"]


def test_as_a_tool(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    found, missed, faulty = search(
        {"corpus": str(path), "num_results": 2, "description": "Search cities."},
        "Where was Beethoven born?",
        "this which",
        "",
    )
    assert (found.status, found.text) == (ToolStatus.OK, "[1] Beethoven was born in Bonn.")
    assert missed.text == faulty.text == "No passage has a word of the query. Try other words."


PASSAGES = {
    "zh": "我们去年在北京大学学习。",
    "zh2": "南京在长江边，京剧很有名。",
    "ja": "東京タワーは高さ333メートルです。",
    "ko": "서울에서 부산까지 기차로 갑니다.",
    "th": "ภาษาไทยเป็นภาษาที่สวยงาม",
    "hi": "हिन्दी भारत की एक भाषा है।",
    "he": "עִבְרִית",
    "c": "C is a language, and so is R.",
    "7": "There are 7 days in a week; who counts them?",
    "accents": "Cafe\u0301 de la Paix",
    "wide": "ＡＢＣ株式会社",
    "song": "The Who sang of it.",
}


@pytest.mark.parametrize(
    ("query", "found"),
    [
        *[("北京", "zh"), ("東京タワー", "ja"), ("タワー", "ja"), ("서울", "ko"), ("부산", "ko"), ("ไทย", "th")],
        *[("हिन्दी", "hi"), ("भाषा", "hi"), ("C", "c"), ("c", "c"), ("R", "c"), ("7", "7"), ("7 days", "7")],
        *[
            ("café", "accents"),
            ("CAFÉ", "accents"),
            ("abc", "wide"),
            ("Abc株式", "wide"),
            ("the", "song"),
            ("京剧", "zh2"),
        ],
        *[("עִבְרִית", "he"), ("333", "ja"), ("大学", "zh"), ("学", "zh"), ("of it", "song")],
    ],
)
def test_words_of_any_script_and_length_are_found(query: str, found: str) -> None:
    assert PassageIndex(list(PASSAGES.values())).best(query, num=1) == [PASSAGES[found]]


def test_vowel_signs_are_a_part_of_their_word() -> None:
    # without them the one would be found by the letters of the other
    assert words_of("हिन्दी") == ["हिन्दी"] and PassageIndex(["हिन्दी", "हद"]).best("ह", num=2) == []
    assert words_of("x\u0301y") == ["x\u0301y"] and words_of("\u0301") == words_of("\ud800 !?→") == []


@given(st.text(st.characters()), st.text(st.characters()))
def test_a_passage_is_found_by_each_of_its_words(passage: str, other: str) -> None:
    index = PassageIndex([passage, other, "x"])
    for word in words_of(passage):
        assert passage in index.best(word, num=3)
    index.best(other, num=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_results": 0}, "tools.search: num_results must be at least 1, got 0"),
        ({"max_passage_chars": 5}, "tools.search: max_passage_chars must be at least 20, got 5"),
        ({"fields": []}, "tools.search: fields must name at least one field"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search({"corpus": str(tmp_path), **options})
