import re
import zipfile
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import KINDS, damaged

from lit_resnorm.cli import main
from lit_resnorm.runs.checkpoints import load_checkpoint
from lit_resnorm.runs.directories import best_checkpoint

PLAIN = [
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.logger", "false", "--data.num_train", "64"),
]
FIT = [
    *("fit", "--model", "LitMLP", "--model.depth", "2", "--model.width", "8"),
    *(*PLAIN, "--trainer.max_epochs", "1"),
]
CHECKPOINTS = Path("runs/LitMLP/a/checkpoints")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of a run, as bytes."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*FIT, "--run", "a"]) == 0
        return (CHECKPOINTS / "last.ckpt").read_bytes()


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def equal(one, other):
    """Say whether two checkpoints hold the same, to the bit."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
            if one.ndim
            else torch.equal(one, other)
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def outcome(path):
    """Return what a checkpoint holds, or why it was refused."""
    try:
        return load_checkpoint(path), ""
    except ValueError as error:
        return None, str(error)


def test_a_damaged_checkpoint_is_refused_or_loads_what_was_saved(whole, tmp_path):
    path = tmp_path / "whole.ckpt"
    path.write_bytes(whole)
    saved = load_checkpoint(path)
    assert equal(saved, torch.load(path, weights_only=True))
    refused = dict.fromkeys((kind.__name__ for kind in KINDS), 0)
    for name, content in damaged(whole, 300):
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(content)
        loaded, reason = outcome(path)
        if loaded is None:
            assert reason.startswith(f"--ckpt_path {path}: it")
            assert "\n" not in reason
            more = "more than tensors" in reason
            assert more == (b"pathlib" in content or b"posix" in content), name
            refused[name.partition("-")[0]] += 1
        else:
            assert equal(loaded, saved), name
        path.unlink()
    assert not Path("ran").exists()
    assert all(refused.values())


def test_a_weight_that_the_disk_lost_is_named_and_the_last_whole_one_offered(
    whole, capsys
):
    assert main([*FIT, "--run", "a"]) == 0
    (path,) = CHECKPOINTS.glob("epoch*.ckpt")
    (CHECKPOINTS / "before.ckpt").write_bytes(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
        place = path.read_bytes().index(archive.read(part))
    content = bytearray(path.read_bytes())
    content[place : place + 512] = bytes(512)
    path.write_bytes(content)
    for option, words in (
        ("--ckpt_path", [*FIT, "--trainer.max_epochs", "2"]),
        ("--checkpoint", ["diagnose", *PLAIN]),
    ):
        capsys.readouterr()
        assert main([*words, option, str(path)]) == 2
        (line,) = (
            one for one in capsys.readouterr().err.splitlines() if "Seed set" not in one
        )
        assert f"{option} {path}: it is damaged ({part.filename} is not" in line
        whole_one = CHECKPOINTS / "before.ckpt"
        assert line.endswith(f"the newest whole one beside it is {whole_one}")
    # `last` passes over it
    more = [*FIT, "--trainer.max_epochs", "2", "--run", "a", "--ckpt_path", "last"]
    assert main(more) == 0


def test_a_checkpoint_that_can_not_be_gone_on_from_is_named(whole, capsys):
    Path("whole.ckpt").write_bytes(whole)
    for key, value in {
        "optimizer_states": None,
        "lr_schedulers": 5,
        "loops": {"fit_loop": {}},
        "callbacks": [1],
        "pytorch-lightning_version": "?",
        "epoch": "first",
    }.items():
        checkpoint = load_checkpoint(Path("whole.ckpt"))
        assert key in checkpoint
        checkpoint[key] = value
        Path("odd.ckpt").unlink(missing_ok=True)
        torch.save(checkpoint, "odd.ckpt")
        capsys.readouterr()
        status = main([*FIT, "--ckpt_path", "odd.ckpt", "--trainer.max_epochs", "2"])
        lines = capsys.readouterr().err.splitlines()
        if key != "epoch":  # which Lightning doesn't read
            assert status == 2, key
            assert re.search("--ckpt_path odd.ckpt: ", lines[-1]), key
            assert not list(Path("runs").rglob("history.jsonl"))


def test_last_and_best_of_a_run_that_holds_more_than_tensors_take_the_option(
    whole, capsys
):
    assert main([*FIT, "--run", "a"]) == 0
    for path in CHECKPOINTS.glob("*.ckpt"):
        if not path.is_symlink():
            # not load_checkpoint, whose tensors would stay in the file
            checkpoint = torch.load(path, weights_only=True)
            torch.save({**checkpoint, "own": Path("x")}, path)
    more = [*FIT, "--run", "a", "--trainer.max_epochs", "2", "--ckpt_path"]
    for word in ("last", "best"):
        capsys.readouterr()
        assert main([*more, word]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "more than tensors and plain values (pathlib." in line
    assert main([*more, "last", "--weights_only", "false"]) == 0


def test_what_a_checkpoint_says_of_the_best_one_may_be_anything(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    odd = [5, [1], {1: 2}, {"ModelCheckpoint": 5}]
    names = (5, "../../x", "")
    odd += [{"ModelCheckpoint{}": {"best_model_path": name}} for name in names]
    for callbacks in odd:
        checkpoint = {"state_dict": {}, "callbacks": callbacks}
        torch.save(checkpoint, folder / "last.ckpt")
        with pytest.raises(ValueError, match="has no best checkpoint"):
            best_checkpoint(tmp_path)


def test_a_checkpoint_without_checksums_is_read(whole):
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"state_dict": {"a": torch.arange(5)}}, "plain.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    checkpoint = load_checkpoint(Path("plain.ckpt"))
    assert checkpoint["state_dict"]["a"].tolist() == [0, 1, 2, 3, 4]
