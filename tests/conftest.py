"""Settings that must stand before torch is imported, and a browser."""

import os
import signal

import pytest

# Small tensors are faster on one thread a process, and the processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# What a shell starts in the background ignores Ctrl-C, and so would all it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def backward_passes_after_forks():
    """Ranks that a test forks can differentiate, whatever tests ran before.

    Autograd's engine starts with the first backward pass, and once torch.compile is
    loaded it starts threads that no fork survives.
    """
    import torch

    torch.ones((), requires_grad=True).backward()


@pytest.fixture(autouse=True)
def own_process_of_wandb(monkeypatch):
    """What a test starts has a W&B process of its own, not that of an earlier test."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """A browser window, where there is a browser."""
    from browsing import Reader

    reader = Reader(tmp_path_factory.mktemp("profile"))
    yield reader
    reader.driver.quit()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of comparison pages."""
    from comparisons import four_variants, hostile
    from many_runs import many_seeds

    from lit_resnorm.compare.page import write_page

    folder = tmp_path_factory.mktemp("pages")
    write_page(four_variants(), folder / "four.html")
    write_page(hostile(), folder / "hostile.html")
    seeds = many_seeds(seeds=10, points=300, quantities=3)
    write_page(seeds, folder / "seeds.html")
    write_page(many_seeds(variants=2, seeds=3, points=30), folder / "few.html")
    return folder


@pytest.fixture
def quiet(reader, folder):
    """A window of usual size; no error in its console, nothing asked for but pages."""
    reader.look()
    reader.complaints(), reader.requests()
    yield
    assert reader.complaints() == []
    # chrome: and the like is what the browser shows in a new window
    start = (folder.as_uri(), "data:", "about:", "blob:null", "chrome")
    assert [url for url in reader.requests() if not url.startswith(start)] == []
