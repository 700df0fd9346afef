"""Plans by name: built-in ones, the hub, and what importing them brings."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sparse_dit.plan import Plan, PlanError, built_in, hub
from tests.helpers.plan_cases import GOLDEN, small


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Profiles with one built-in plan, and an empty working folder."""
    small().save_pretrained(tmp_path / "profiles" / "tiny-wan-1.3b")
    (tmp_path / "profiles" / "no-plan").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(hub, "shipped", lambda name: tmp_path / name)
    return tmp_path


def test_from_pretrained_takes_a_path_before_a_built_in_name(shelf):
    assert built_in() == ["tiny-wan-1.3b"]
    assert Plan.from_pretrained("tiny-wan-1.3b") == small()
    small(density=0.25).save_pretrained("tiny-wan-1.3b")
    assert Plan.from_pretrained("tiny-wan-1.3b").density == 0.25
    assert Plan.from_pretrained(Path("tiny-wan-1.3b") / "plan.json").density == 0.25


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../profiles/x",
        "no-plan",
        "a/../b",
        "a/b/c",
        "/etc/x",
        "a\\b",
        "x.json",
        "a/x.json",
    ],
)
def test_from_pretrained_refuses_what_is_no_name(name, shelf):
    with pytest.raises(PlanError, match=r"no plan|no such plan file") as caught:
        Plan.from_pretrained(name)
    assert "\n" not in str(caught.value)


class FakeHub(types.ModuleType):
    """As much of huggingface_hub as plans use, on a local folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder = folder
        self.HfApi = lambda: self

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        if not (self.folder / repo_id).exists():
            raise ConnectionError(f"no network\nfor {repo_id}")
        assert options["allow_patterns"] == ["plan.json", "plan.safetensors"]
        return str(self.folder / repo_id)

    def create_repo(self, repo_id: str, **_: Any) -> None:
        (self.folder / repo_id).mkdir(parents=True)

    def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> str:
        for file in Path(folder_path).iterdir():
            (self.folder / repo_id / file.name).write_bytes(file.read_bytes())
        return f"https://hub/{repo_id}/commit/1"


def test_plans_go_to_the_hub_and_come_back(shelf, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(shelf / "hub"))
    plan = Plan.load(GOLDEN)
    assert plan.push_to_hub("someone/wan-plan") == "https://hub/someone/wan-plan/commit/1"
    assert Plan.from_pretrained("someone/wan-plan") == plan
    with pytest.raises(PlanError, match="the hub didn't give it: ConnectionError: no network"):
        Plan.from_pretrained("someone/else")
    (shelf / "hub" / "someone" / "empty").mkdir()
    with pytest.raises(PlanError, match=r"must hold a plan\.json, and has none"):
        Plan.from_pretrained("someone/empty")
    with pytest.raises(PlanError, match=r"a hub id must be owner/name, got '\.\./x'"):
        plan.push_to_hub("../x")


def test_hub_names_need_the_hub_library(shelf, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PlanError, match="pip install huggingface_hub"):
        Plan.from_pretrained("someone/wan-plan")


# --- the module


def test_importing_plans_brings_no_host_library():
    code = (
        "import sys, sparse_dit.plan; "
        "print([m for m in ('diffusers', 'transformers', 'huggingface_hub', 'triton') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_plans_can_be_copied():
    plan = small()
    assert copy.deepcopy(plan) == plan and dataclasses.replace(plan, density=0.25) != plan
