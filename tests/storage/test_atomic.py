"""A save that dies at any moment leaves the old adapter or the new one, for every reader."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from fastpeft import atomic

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
NAMES = [WEIGHTS, PICKLE, CONFIG]

OLD = {CONFIG: "old config", WEIGHTS: "old weights"}
CASES = {
    "both change": (OLD, {CONFIG: "new config", WEIGHTS: "new weights"}),
    "weights change": (OLD, {CONFIG: "old config", WEIGHTS: "new weights"}),
    "to a pickle": (OLD, {CONFIG: "new config", PICKLE: "new weights"}),
    "to a pickle, same config": (OLD, {CONFIG: "old config", PICKLE: "new weights"}),
    "first save": ({}, {CONFIG: "new config", WEIGHTS: "new weights"}),
    "weights without a config": ({WEIGHTS: "stray"}, {CONFIG: "new config", PICKLE: "new weights"}),
    "nothing changes": (OLD, OLD),
}
# Every call by which a save changes the file system; a kill can come before any of them.
CALLS = ["replace", "symlink", "link", "mkdir", "unlink", "rmdir", "fsync", "open"]


def seen(directory: Path) -> dict[str, str]:
    """What a reader finds; without a config it finds no adapter."""
    found = {name: (directory / name).read_text() for name in NAMES if (directory / name).exists()}
    return found if CONFIG in found else {}


def save(directory: Path, files: dict[str, str]) -> None:
    with atomic.staging(directory) as new:
        for name, text in files.items():
            (new / name).write_text(text)
        atomic.commit(directory, new, NAMES)


def prepare(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    (directory / "other.txt").write_text("stays")


def interrupt(monkeypatch, at: int, action) -> None:
    """Let `action` happen instead of the `at`-th change to the file system."""
    count = 0
    for name in CALLS:

        def patched(original, *args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                action()
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, functools.partial(patched, getattr(os, name)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("case", CASES)
def test_killed_before_every_step(tmp_path, case):
    old, new = CASES[case]
    outcomes = []
    for step in range(1, 1000):
        directory = tmp_path / str(step)
        prepare(directory, old)
        pid = os.fork()
        if pid == 0:  # the child dies without any clean-up
            with pytest.MonkeyPatch.context() as patch:
                interrupt(patch, step, lambda: os._exit(9))
                save(directory, new)
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        old_adapter = old if CONFIG in old else {}
        assert seen(directory) in (old_adapter, new), f"killed before step {step}"
        outcomes.append(seen(directory) == new)
        assert (directory / "other.txt").read_text() == "stays"
        # the next save works, and its own files are plain ones again
        again = {CONFIG: "third config", WEIGHTS: "third weights"}
        save(directory, again)
        assert seen(directory) == again
        assert not any((directory / name).is_symlink() for name in NAMES)
        if finished:
            break
    assert outcomes == sorted(outcomes)  # once new, never old again
    assert sorted(os.listdir(directory)) == sorted([CONFIG, WEIGHTS, "other.txt"])  # nothing is left lying about


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_at_every_step(tmp_path, case, error):
    old, new = CASES[case]

    def fail():
        raise error

    for step in range(1, 1000):
        directory = tmp_path / f"{step}"
        prepare(directory, old)
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, step, fail)
            try:
                save(directory, new)
            except (OSError, KeyboardInterrupt):
                finished = False
            else:
                finished = seen(directory) == new
        assert seen(directory) in (old if CONFIG in old else {}, new), f"error in step {step}"
        if finished and step > 60:
            break
    save(directory, new)
    assert seen(directory) == new


def test_a_save_by_another_process_is_left_alone(tmp_path):
    """Two ranks that both save must not tear each other's files away."""
    if atomic.fcntl is None:
        pytest.skip("needs locks")
    prepare(tmp_path / "a", OLD)
    with atomic.staging(tmp_path / "a") as mine:
        (mine / WEIGHTS).write_text("mine")
        save(tmp_path / "a", {CONFIG: "theirs", WEIGHTS: "theirs"})
        assert (mine / WEIGHTS).read_text() == "mine"


def test_without_symbolic_links_the_files_are_replaced_one_by_one(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("symbolic link privilege not held")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    prepare(tmp_path / "a", OLD)
    save(tmp_path / "a", CASES["both change"][1])
    assert seen(tmp_path / "a") == CASES["both change"][1]
    assert sorted(os.listdir(tmp_path / "a")) == sorted([CONFIG, WEIGHTS, "other.txt"])


SCRIPT = """
    import sys, torch
    import fastpeft
    from torch import nn
    torch.set_num_threads(1)
    directory = sys.argv[1]
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    config = fastpeft.LoraConfig(r=1, target_modules=["0", "1"])
    model = fastpeft.get_peft_model(model, config)
    for i in range(2, 100):
        model.add_adapter(f"r{i}", fastpeft.LoraConfig(r=i % 7 + 1, lora_alpha=i % 7 + 1, target_modules=["0", "1"]))
    print("ready", flush=True)
    while True:
        for i in range(2, 100):
            tensors = fastpeft.get_peft_model_state_dict(model, adapter_name=f"r{i}")
            fastpeft.storage.write_adapter(fastpeft.storage.Path(directory), model.peft_config[f"r{i}"], tensors)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_process_that_is_killed_while_it_saves(tmp_path):
    """End to end: adapters of changing rank are written over each other until the process is killed."""
    import json

    (tmp_path / "script.py").write_text("import fastpeft.storage\n" + textwrap.dedent(SCRIPT))
    directory = tmp_path / "adapter"
    for delay in (0.2, 0.43):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(directory)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert process.stdout is not None and process.stdout.readline().strip() == b"ready"
        deadline = time.monotonic() + 60
        while not (directory / CONFIG).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        rank = json.loads((directory / CONFIG).read_text())["r"]
        with safe_open(directory / WEIGHTS, "pt") as file:
            assert file.get_slice("base_model.model.0.lora_A.weight").get_shape() == [rank, 64]
