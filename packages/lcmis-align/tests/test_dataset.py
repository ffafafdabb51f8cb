"""The official layout in and out, and files that are not it."""

import json

import pytest
from lcmis_align import Concept, ConceptPair, ConceptPlan, DataError, LCMisDataset, PlanError
from lcmis_align.concepts import bare

RECORD = {
    "prompt": "a tea cup of iced coke", "first_prompt": "a tea cup", "first_describe": "A cup.",
    "second_prompt": "iced coke", "second_describe": "Dark and fizzy.",
}  # fmt: skip


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=4, ensure_ascii=False) + "\n")
    return path


def test_what_is_read_is_written_back_the_same(tmp_path):
    official = {"prompt0": RECORD, "other key": {**RECORD, "prompt": "thé glacé", "note": [1, 2], "latent": "glass"}}
    path = write(tmp_path / "in.json", official)
    data = LCMisDataset.from_json(path)
    assert data.to_json(tmp_path / "out.json").read_text() == path.read_text() or (
        json.loads((tmp_path / "out.json").read_text()) == official
    )
    assert data.keys == ["prompt0", "other key"]
    assert data[1].extra == {"note": [1, 2]}
    assert data[1].latent == "glass"
    assert len(data) == 2
    assert [plan.prompt for plan in data] == ["a tea cup of iced coke", "thé glacé"]


def test_the_official_file_byte_for_byte(tmp_path):
    path = write(tmp_path / "in.json", {"prompt0": RECORD, "prompt1": {**RECORD, "prompt": "p"}})
    assert LCMisDataset.from_json(path).to_json(tmp_path / "out.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text", [
    json.dumps([RECORD, RECORD]), json.dumps(RECORD) + "\n" + json.dumps(RECORD) + "\n\n",
])  # fmt: skip
def test_lists_and_lines(tmp_path, text):
    data = LCMisDataset.from_json(write(tmp_path / "in.json", text))
    assert [plan.first.name for plan in data] == ["a tea cup"] * 2
    assert data.keys == ["prompt0", "prompt1"]


def test_one_line_of_lines(tmp_path):
    assert len(LCMisDataset.from_json(write(tmp_path / "in.jsonl", json.dumps(RECORD)))) == 1


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty"), ("   \n", "is empty"), ("{", "is no JSON"), ("[]", "holds list"), ("3", "holds int"),
    ('{"prompt0": 3}', "prompt0 is int"), (json.dumps({"prompt0": {"prompt": "x"}}), "first_prompt = None"),
    (json.dumps({"p": {**RECORD, "first_prompt": 4}}), "p has first_prompt = 4"),
    (json.dumps({"p": {**RECORD, "second_prompt": "A Tea Cup"}}), "both concepts"),
    (json.dumps({"p": {**RECORD, "prompt": " "}}), "the prompt of a plan"),
])  # fmt: skip
def test_files_that_are_no_prompt_files(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as error:
        LCMisDataset.from_json(write(tmp_path / "in.json", text))
    assert "\n" not in str(error.value)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        LCMisDataset.from_json(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="no text file"):
        LCMisDataset.from_json(tmp_path / "binary.json")


def test_duplicates_whatever_the_order():
    plans = [ConceptPlan(Concept(a), Concept(b), "p") for a, b in
             [("tea cup", "coke"), ("Coke", "a tea cup"), ("plate", "coke"), ("the Tea  Cup", "coke.")]]  # fmt: skip
    assert LCMisDataset(plans).duplicates() == [(0, 1), (0, 3)]


def test_the_released_layout_is_loaded_from_a_folder(tmp_path):
    folder = tmp_path / "pairs"
    (folder / "version1").mkdir(parents=True)
    (folder / "version1" / "human.json").write_text(json.dumps([RECORD]))
    assert LCMisDataset.load_hub(str(folder))[0].second.describe == "Dark and fizzy."


def test_the_hub_out_of_reach(monkeypatch):
    with pytest.raises(DataError, match="could not be loaded"):
        LCMisDataset.load_hub("nobody/nothing-here")


def test_concepts():
    assert ConceptPair("a Tea cup", "Coke").key == ConceptPair("the coke", "tea cup").key
    assert ConceptPair("x", "y").text == "x and y"
    assert bare("The  Tea-cup, please!") == "tea-cup please"
    for wrong in (lambda: Concept(" "), lambda: Concept(3), lambda: ConceptPair("x", ""), lambda: Concept("x", None),
                  lambda: ConceptPlan(Concept("a b"), Concept("c"), "p", latent="")):  # fmt: skip
        with pytest.raises(PlanError):
            wrong()
    with pytest.raises(DataError, match="1 keys for 0 plans"):
        LCMisDataset([], keys=["x"])
