"""What a command writes in the end: tried at its start, and never lost."""

import os
import signal
from pathlib import Path

import pytest

from sparse_dit.outputs import MOVED, Outputs, check_writable, rescued
from sparse_dit.whole_file import uninterrupted, write_text


def beside(path):
    return [path.with_suffix(".safetensors")]


@pytest.fixture
def said():
    return []


@pytest.fixture
def outputs(said):
    return Outputs(replace=False, say=said.append)


REFUSED = {
    "a folder": ("folder.json", "--out: .*folder.json is a folder; give a file name in it"),
    "there already": ("there.json", "--out: .*there.json exists already: pass --force"),
    "left over beside": ("left.json", "--out: .*left.safetensors exists already: pass --force"),
    "under a file": ("there.json/x.json", "there.json is a file, so .* can't be made"),
    "another ending": ("x.txt", "--out must name a file that ends in .json, got 'x.txt'"),
    "no folder for files": ("/proc/x.json", "--out: /proc/x.json can't be written"),
    "too long": ("x" * 300 + ".json", "can't be written .File name too long"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_written_is_refused_at_the_start(case, tmp_path, outputs):
    name, words = REFUSED[case]
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "there.json").write_text("precious")
    (tmp_path / "left.safetensors").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=words) as caught:
        outputs.expect("--out", tmp_path / name, ".json", beside=beside)
    assert "Errno" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_leave_to_write_is_told_as_that(tmp_path, monkeypatch, outputs):
    def refused(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError, match=r"--out: .* can't be written \(Permission denied\)"):
        outputs.expect("--out", tmp_path / "x.json")


def test_checking_leaves_no_file_and_no_folder(tmp_path, outputs):
    outputs.expect("--out", tmp_path / "a" / "b" / "x.json", ".json", beside=beside)
    outputs.expect_folder("--report", tmp_path / "c", ["report.html"])
    assert list(tmp_path.iterdir()) == []


def test_two_options_do_not_name_one_file(tmp_path, outputs):
    outputs.expect("--out", tmp_path / "x.json", beside=beside)
    with pytest.raises(ValueError, match=r"--profile and --out would both write .*x\.safetensors"):
        outputs.expect("--profile", tmp_path / "x.safetensors", again=True)


def test_what_appeared_meanwhile_is_left_alone(tmp_path, outputs, said):
    path = tmp_path / "x.json"
    outputs.expect("--out", path, beside=beside)
    (tmp_path / "x.safetensors").write_text("another's")
    lies = outputs.write(path, lambda place: write_text(place, "mine"))
    assert lies == tmp_path / "x-2.json" and lies.read_text() == "mine"
    assert outputs.code == MOVED and outputs.lies(path) == lies and not path.exists()
    assert (tmp_path / "x.safetensors").read_text() == "another's"
    assert said == [
        f"{path} can't be written (x.safetensors exists by now): the result is in {lies}"
    ]


@pytest.mark.parametrize("left", ["the folder", "nothing but that for temporary files"])
def test_a_result_goes_on_to_where_it_can_be_written(left, tmp_path, monkeypatch, outputs, said):
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    path = tmp_path / "out" / "x.json"
    outputs.expect("--out", path)
    full = [tmp_path / "out"] + ([tmp_path / "here"] if left != "the folder" else [])

    def write(place):
        if place.parent in full:
            raise OSError(28, "No space left on device", str(place))
        write_text(place, "mine")

    lies = outputs.write(path, write)
    assert lies == (tmp_path / ("here" if left == "the folder" else "temporary")) / "x.json"
    assert lies.read_text() == "mine" and outputs.code == MOVED
    assert said == [f"{path} can't be written (No space left on device): the result is in {lies}"]


def test_what_can_be_written_nowhere_raises_the_first_reason(tmp_path, said):
    def write(place):
        raise OSError(28, f"no space for {place.name}", str(place))

    with pytest.raises(OSError, match=r"no space for x\.json"):
        rescued(tmp_path / "x.json", write, said.append)
    assert said == []


def test_what_is_written_again_stays_where_it_went(tmp_path, outputs, said):
    path = tmp_path / "x.json"
    path.mkdir()  # since the start
    for text in ("one row", "two rows"):
        lies = outputs.put(path, lambda place, text=text: write_text(place, text))
    assert lies == tmp_path / "x-2.json" and lies.read_text() == "two rows"
    assert len(said) == 1 and outputs.code == MOVED


def test_with_force_what_is_there_is_replaced(tmp_path, said):
    path = tmp_path / "x.json"
    path.write_text("old")
    outputs = Outputs(replace=True, say=said.append)
    outputs.expect("--out", path, ".json")
    assert outputs.write(path, lambda place: write_text(place, "new")) == path
    assert path.read_text() == "new" and outputs.code == 0 and said == []


def test_a_pipe_or_device_is_no_place_for_a_result(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is no regular file"):
        check_writable(tmp_path / "pipe", "--json")


def test_ctrl_c_waits_for_files_that_belong_together(monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = []
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("both files")
        assert done == ["both files"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
