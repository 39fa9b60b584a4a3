import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.config.yaml_source import MAX_BYTES, Node, parse, read

HERE = Path("p.yaml")


def told(text: str) -> list[str]:
    return [str(problem) for problem in parse(text, HERE)[1]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # YAML 1.1 reads text
        ("010", 10),  # YAML 1.1 reads 8
        ("0o17", 15),
        ("0x1F", 31),
        ("-7", -7),
        ("+.5", 0.5),
        ("5.", 5.0),
        ("no", "no"),  # YAML 1.1 reads False
        ("1_000", "1_000"),  # YAML 1.1 reads 1000
        ("12:30", "12:30"),  # YAML 1.1 reads 750
        ("2026-11-20", "2026-11-20"),
        ("'12'", "12"),
        ('"true"', "true"),
        ("True", True),
        ("~", None),
        ("", None),
        ("inf", "inf"),
    ],
)
def test_scalars_are_those_of_the_core_schema_of_yaml_1_2(text: str, value: object):
    node, problems = parse(f"a: {text}", HERE)

    assert problems == ()
    assert isinstance(node, Node)
    assert node.plain() == {"a": value}
    assert type(node.keys["a"].plain()) is type(value)


def test_every_value_and_key_knows_its_line_and_column():
    node, _ = parse("a: 1\nb:\n  - {c: 2}\n", HERE)

    assert node is not None
    _, found = node.at(("b", 0, "c"))
    assert (found.place.line, found.place.column) == (3, 9)
    assert found.key_place is not None
    assert (found.key_place.line, found.key_place.column) == (3, 6)


def test_an_alias_stands_for_the_value_of_its_anchor():
    node, problems = parse("a: &x {b: [1]}\nc: *x\nd: [*x]\n", HERE)

    assert problems == ()
    assert node is not None
    assert node.plain() == {"a": {"b": [1]}, "c": {"b": [1]}, "d": [{"b": [1]}]}


def test_a_replaced_value_changes_no_other_use_of_its_alias():
    node, _ = parse("a: &x {b: 1}\nc: *x\n", HERE)
    new, _ = parse("2", "c.b=2")

    assert node is not None
    assert new is not None
    assert node.replace_at(("c", "b"), new).plain() == {"a": {"b": 1}, "c": {"b": 2}}


def test_all_that_is_not_plain_data_is_told_at_once():
    text = "a: !!str 12\nb: !python/object:os.system [ls]\na: 3\n1: x\nc: .nan\nd: 1e999\ne: 99999999999999999999\n"

    assert told(text) == [
        "p.yaml:1:4: tags are not allowed, got 'tag:yaml.org,2002:str'; write the plain value",
        "p.yaml:2:4: tags are not allowed, got '!python/object:os.system'; write the plain value",
        "p.yaml:3:1: duplicate key 'a', first given on line 1",
        "p.yaml:4:1: a key must be text; put it in quotes",
        "p.yaml:5:4: a number must be finite, got .nan",
        "p.yaml:6:4: a number must be finite, got 1e999",
        "p.yaml:7:4: an integer must fit in 64 bits, got 99999999999999999999",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1:1: must hold a value, got nothing"),
        ("# only this\n", "1:1: must hold a value, got nothing"),
        ("a: 1\n---\nb: 1\n", "2:1: must be one document, got a second one"),
        ("a: &x [*x]\n", "1:8: alias *x contains itself"),
        ("a: *x\n", "1:4: alias *x has no anchor &x before it"),
        ("a:\n\tb: 1\n", "2:1: while scanning for the next token, found character '\\t' that cannot start any token; "),
        ("a: b: c\n", "1:5: mapping values are not allowed here"),
        ("a: [1\n", "2:1: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("a: x\0y\n", "1:5: a character that YAML does not allow, code point 0x0"),
        ('a: "\\0"\n', "1:4: text must not hold the character NUL"),
        ('a: "\\ud800"\n', "1:4: text must be Unicode, got half of a surrogate pair"),
        ('a: "\\UFFFFFFFF"\n', "1:1: must be YAML, but: "),
        ("%YAML 1.1\n---\na: no\n", "2:1: must be YAML 1.2; remove the %YAML line"),
        ("? [a, b]\n: 1\n", "1:3: a key must be text; put it in quotes"),
    ],
)
def test_a_text_at_fault_is_told_with_its_position(text: str, problem: str):
    assert [line.startswith(f"p.yaml:{problem}") for line in told(text)] == [True], told(text)


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a0: &a0 1\n" + "".join(f"a{i}: &a{i} {'[' * 20}*a{i - 1}{']' * 20}\n" for i in range(1, 100))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "must hold at most 20000 values, aliases expanded"),
        ("a: [" + "1," * 100_000 + "]", "must hold at most 20000 values, aliases expanded"),
        ("[" * 20_000, "must be nested at most 40 deep, aliases expanded"),
        ("{a: " * 20_000, "must be nested at most 40 deep, aliases expanded"),
        ("- " * 20_000, "must be nested at most 40 deep, aliases expanded"),
        (CHAIN, "must be nested at most 40 deep, aliases expanded"),
    ],
    ids=["alias bomb", "long list", "deep flow lists", "deep flow mappings", "deep block lists", "aliases in aliases"],
)
def test_a_bomb_is_refused_before_it_is_built(text: str, problem: str):
    start = time.process_time()

    assert told(text)[0].endswith(problem)
    assert time.process_time() - start < 2  # built in full, the bombs take minutes or end in a RecursionError


def test_nesting_of_forty_and_no_more_is_accepted():
    assert told("[" * 40 + "]" * 40) == []
    assert told("[" * 41 + "]" * 41) != []


def test_a_file_over_the_limit_is_refused_before_it_is_parsed(tmp_path: Path):
    file = tmp_path / "p.yaml"
    file.write_bytes(b"[" * MAX_BYTES)
    assert "must be nested" in str(read(file)[1][0])

    file.write_bytes(b"[" * (MAX_BYTES + 1))
    assert [problem.message for problem in read(file)[1]] == ["must be at most 256 kB"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: 1\nb: \xff\n", "2:4: must be UTF-8 text, got byte 0xff"),
        ("ä: 1\n".encode("utf-16"), "1:1: must be UTF-8 text, got byte 0xff"),
        (b"a: 1\n<<<<<<< HEAD\nb: 1\n=======\nb: 2\n>>>>>>> theirs\n", "2:1: merge-conflict marker '<<<<<<<'"),
    ],
)
def test_a_file_that_is_no_text_is_told_with_its_position(tmp_path: Path, content: bytes, problem: str):
    file = tmp_path / "p.yaml"
    file.write_bytes(content)

    assert [str(found).startswith(f"{file}:{problem}") for found in read(file)[1]] == [True]


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path):
    file = tmp_path / "p.yaml"
    file.write_text("name: x\n", encoding="utf-8-sig")

    node, problems = read(file)

    assert problems == ()
    assert node is not None
    assert node.plain() == {"name": "x"}


def test_a_missing_file_and_a_directory_are_told(tmp_path: Path):
    assert str(read(tmp_path / "none.yaml")[1][0]) == f"{tmp_path / 'none.yaml'}: no such file"
    assert str(read(tmp_path)[1][0]) == f"{tmp_path}: is a directory, not a file"


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from("ab1 \n\t-:,[]{}&*!|>'\"#%?.~\\\0\ud800é"), max_size=40))
def test_any_text_gives_a_value_or_a_problem(text: str):
    node, problems = parse(text, HERE)

    assert (node is not None) or problems
