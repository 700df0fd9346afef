"""What tests of several files ask for by name."""

import pytest

from sparse_dit.backends.cpu import library
from sparse_dit.inputs import load_pipeline
from sparse_dit.resources import shipped
from tests.helpers.places import PLACES, Alone, in_process, in_thread

SLOW = (  # files of a minute or so; the worker that got one of them last would end alone
    "gpu_without_gpu/test_triton.py",
    "backends/test_flex.py",
    "backends/test_cpu_kernel_native.py",
    "search/test_shares.py",
    "eval/test_frontier.py",
    "test_documents.py",
    "backends/test_cpu_kernel_fuzz.py",
    "integrations/test_diffusers_suites.py",
    "integrations/test_quantised.py",
    "bench/test_gpu_benchmark.py",
    "gpu_without_gpu/test_pretended_device.py",
    "integrations/test_together.py",
    "search/test_models.py",
    "search/test_two.py",
    "search/test_engine.py",
    "test_imports.py",
    "test_tiny_wan.py",
    "bench/test_bench.py",
    "eval/test_report_plan.py",
    "eval/test_report.py",
    "serve/test_browser.py",
    "cli/test_cli.py",
)


def pytest_collection_modifyitems(items):
    """Slow files come first: `--no-loadscope-reorder` hands files out in this order."""
    places = {name: place for place, name in enumerate(SLOW)}

    def place(item):
        return places.get(item.nodeid.partition("::")[0].removeprefix("tests/"), len(SLOW))

    items.sort(key=place)


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("fresh"):
        metafunc.fixturenames.append("place")
        metafunc.parametrize("place", PLACES)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs a test marked `fresh` where its parameter `place` says."""
    place = pyfuncitem.funcargs.get("place", "here")
    if place == "new thread":
        names = pyfuncitem._fixtureinfo.argnames
        in_thread(lambda: pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
        return True
    if place == "new process" and not any(
        isinstance(plugin, Alone) for plugin in pyfuncitem.config.pluginmanager.get_plugins()
    ):
        log = pyfuncitem._request.getfixturevalue("tmp_path") / "alone.txt"
        in_process(pyfuncitem.nodeid, pyfuncitem.config.rootpath, log)
        return True
    return None


@pytest.fixture(params=library.LIBRARY.runnable if library.LIBRARY else [None])
def variant(request):
    """Each variant of the CPU kernel that this machine runs, forced while the test runs."""
    if library.LIBRARY is None:
        pytest.skip(library.PROBLEM)
    before = library.LIBRARY.variant
    library.LIBRARY.use_variant(request.param)
    yield request.param
    library.LIBRARY.variant = before


@pytest.fixture(scope="session")
def short_model(tmp_path_factory):
    """Folder of the embedded model with two of its six layers: what doesn't ask for pictures is soon done."""
    folder = tmp_path_factory.mktemp("short") / "model"
    pipe = load_pipeline(str(shipped("tiny_wan")), "cpu", "float32")
    pipe.transformer.blocks = pipe.transformer.blocks[:2]
    pipe.transformer.register_to_config(num_layers=2)
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def short_pipe(short_model):
    """The pipeline in that folder."""
    return load_pipeline(short_model, "cpu", "float32")
