"""The comparison with OpenVINO, with a stand-in for OpenVINO that says what it is asked to."""

import json
import sys

import pytest

from benchmarks.openvino_prefill import WAYS, main, table
from tests.helpers.language_plans import SLASH, plan_for
from tests.helpers.tiny_language_models import save_language_model, text

STAND_IN = """
from types import SimpleNamespace as Any

class SchedulerConfig: pass
class SparseAttentionMode: XATTENTION, TRISHAPE = "XATTENTION", "TRISHAPE"
def SparseAttentionConfig(**given): return given
def GenerationConfig(**given): return given

class ContinuousBatchingPipeline:
    def __init__(self, folder, config, device, props):
        assert folder == "exported" and device == "CPU" and props["INFERENCE_NUM_THREADS"] == 1
        self.sparse = getattr(config, "sparse_attention_config", None)
    def generate(self, prompts, configs):
        print("a line of OpenVINO's own")
        new = configs[0]["max_new_tokens"]
        digits = [c for c in prompts[0] if 48 <= c < 58][:5]
        lost = self.sparse and self.sparse["mode"] == "TRISHAPE"
        said = ([32] + (digits if not lost else [48] * 5) + [46] * new)[:new]
        return [Any(m_generation_ids=[said])]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "openvino_genai.py").write_text(STAND_IN)
    (tmp_path / "openvino.py").write_text("def Tensor(array): return array[0].tolist()\n")
    save_language_model(tmp_path)
    plan_for(text("llama")[0], SLASH).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_every_way_is_timed_and_asked(folder, monkeypatch, capsys):
    given = ["language-model", "--openvino-python", sys.executable, "--openvino-model", "exported"]
    more = ["--plan", "plan.json", "--text", "book.txt", "--lengths", "390", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["openvino_prefill.py", *given, *more])
    main()
    rows = json.loads((folder / "prefill.json").read_text())
    ways = ["torch", "exact", "plan plan", *WAYS]
    assert [row["way"] for row in rows if row.get("repeat") == 0] == ways
    assert all(row["seconds"] >= 0 for row in rows)
    densities = {row["way"]: row["density"] for row in rows if row["tokens"] == 390}
    assert densities["torch"] == 1 and 0 < densities["plan plan"] < 1
    assert densities["openvino dense"] is None
    found = {way: sum(r["found"] for r in rows if r["way"] == way and "found" in r) for way in ways}
    assert found["openvino dense"] == 3 and found["openvino TRISHAPE 128 + 384"] == 0
    shown = capsys.readouterr().out
    assert shown.endswith(table(rows) + "\n") and "0 of 3" in shown


def test_a_text_that_is_too_short_is_told(folder, monkeypatch):
    given = ["language-model", "--openvino-python", sys.executable, "--openvino-model", "exported"]
    monkeypatch.setattr(sys, "argv", ["openvino_prefill.py", *given, "--text", "book.txt"])
    with pytest.raises(SystemExit, match="the text has 400 tokens, --lengths asks for 2048"):
        main()
