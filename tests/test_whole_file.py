import pytest

from sparse_dit.whole_file import whole_file, whole_folder


def test_a_file_appears_whole_with_its_folder(tmp_path):
    path = tmp_path / "new" / "a.json"
    with whole_file(path) as partial:
        partial.write_text("half")
        assert not path.exists() and partial.suffix == ".json"
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_if_writing_fails(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as partial:
        partial.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_and_keeps_what_it_does_not_replace(tmp_path):
    folder = tmp_path / "above" / "model"
    (tmp_path / "above" / ".model.partial" / "left over").mkdir(parents=True)
    with whole_folder(folder) as partial:
        (partial / "weights").write_text("old")
        assert not folder.exists()
    (folder / "card").write_text("card")
    with whole_folder(folder) as partial:
        (partial / "weights").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "weights": "new",
        "card": "card",
    }
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as partial:
        (partial / "weights").write_text("broken")
        raise KeyboardInterrupt
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
