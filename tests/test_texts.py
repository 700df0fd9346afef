"""Texts as people's editors write them: marks, ends of lines, characters that nobody sees."""

import pytest

from sparse_dit.generation import Case
from sparse_dit.inputs import read_prompts
from sparse_dit.plan import Plan
from sparse_dit.search.device_table import DeviceTable
from sparse_dit.texts import BOM
from tests.helpers.plan_cases import small


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompts.txt"


GOOD = {
    "mark before a prompt": f"{BOM}a red square\r\n# comment\r\na blue circle\r\n",
    "mark before a comment": f"{BOM}# mine\na red square\na blue circle",
    "files put together": f"{BOM}a red square\n{BOM}# more\n{BOM}a blue circle\n",
    "old line ends": "a red square\r\ra blue circle\r",
    "spaces around": "\t a red square \n\n  a blue circle\u3000\n \t\n",
}


@pytest.mark.parametrize("case", GOOD)
def test_prompts_are_the_lines_a_person_sees(case, file):
    file.write_bytes(GOOD[case].encode())
    assert read_prompts([], file) == ["a red square", "a blue circle"]


BAD = {
    "null": ("a\n\na cat\0dog\n", "line 3: .*U\\+0000 .NULL. as character 6"),
    "line separator": ("a cat\u2028next\n", "line 1: .*U\\+2028 .LINE SEPARATOR."),
    "next line": ("a cat\x85next\n", "line 1: .*U\\+0085 .NEXT LINE."),
    "form feed": ("a\na cat\x0cnext\n", "line 2: .*U\\+000C .FORM FEED."),
    "mark inside": (f"a cat{BOM}next\n", "line 1: .*U\\+FEFF .BYTE ORDER MARK."),
    "too long": ("x" * 70_000, "line 1: .*at most 65,536 characters, got 70,000"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_plan_could_note_is_refused_by_line(case, file):
    text, words = BAD[case]
    file.write_bytes(text.encode())
    with pytest.raises(ValueError, match=words):
        read_prompts([], file)
    with pytest.raises(ValueError, match="a prompt must"):
        read_prompts([text.strip()], None)
    with pytest.raises(ValueError, match="a prompt must"):
        Case(text)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("good\ncaf\xe9\n".encode("latin-1"), r"byte 8 \(0xe9\), in line 2, is not text"),
        ("good\n".encode("utf-16"), "but UTF-16; save it as UTF-8"),
    ],
)
def test_other_encodings_are_told_by_place(data, words, file):
    file.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_prompts([], file)


def test_every_prompt_that_is_taken_can_be_noted_in_a_plan(tmp_path):
    odd = "".join(chr(n) for n in range(0x3100) if not 0xD800 <= n <= 0xDFFF)
    kept = []
    for character in odd:
        try:
            kept.append(Case(f"a{character}b").prompt)
        except ValueError:
            continue
    assert len(kept) > 12_000
    plan = small(provenance={"cases": kept})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").provenance["cases"] == kept


def test_plans_and_device_tables_bear_a_byte_order_mark(tmp_path):
    small().save(tmp_path / "plan.json")
    DeviceTable.load("h100").save(tmp_path / "table.json")
    for name in ("plan.json", "table.json"):
        file = tmp_path / name
        file.write_bytes(BOM.encode() + file.read_bytes())
    assert Plan.load(tmp_path / "plan.json") == small()
    assert DeviceTable.load(tmp_path / "table.json") == DeviceTable.load("h100")
