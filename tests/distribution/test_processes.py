"""Two processes of two devices each, against one process of four."""

import json
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.distribution import worker

PROCESSES = 2
LIMIT = 300
# The guide says a hundred seconds; the rest is for a busy machine.
LEFT_ALONE = 200
ROOT = pathlib.Path(__file__).parents[2]


def run(folder, what):
    """Runs the worker in two processes; returns their exit codes, results, errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.distribution.worker", address]
    started = [
        subprocess.Popen(
            [*command, str(PROCESSES), str(index), str(folder), what],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(PROCESSES)
    ]
    try:
        last = started[-1].communicate(timeout=LIMIT)[1]
        first = started[0].communicate(timeout=LEFT_ALONE)[1]
        errors = [first, last]
    finally:
        for process in started:
            process.kill()
    results = [folder / f"{what}_{index}.json" for index in range(PROCESSES)]
    results = [json.loads(p.read_text()) if p.exists() else None for p in results]
    return [process.returncode for process in started], results, errors


@pytest.fixture(scope="module")
def of_one_process():
    """The model after training, losses, and what `evaluate` says."""
    worker.distribute(PROCESSES * worker.DEVICES)
    model = worker.make()
    x, y = worker.data()
    losses = worker.fit(model, x, y)
    evaluated = model.evaluate(x, y, worker.BATCH, verbose=0)
    return model.get_weights(), losses, evaluated, worker.loads(model)


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    codes, results, errors = run(folder, "train")
    assert codes == [0, 0], errors[0]
    return folder, results


def test_they_train_as_one_process_does(of_one_process, of_two_processes):
    _, losses, evaluated, loads = of_one_process
    for result in of_two_processes[1]:
        np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)
        np.testing.assert_allclose(result["evaluated"], evaluated, rtol=1e-5)
        np.testing.assert_allclose(result["loads"], loads, atol=1e-6)


@pytest.mark.parametrize("devices", [None, 2, 8])
def test_one_process_reads_what_they_saved(of_one_process, of_two_processes, devices):
    keras.distribution.set_distribution(None)
    if devices:
        worker.distribute(devices)
    model = worker.make()
    model.load_weights(of_two_processes[0] / "checkpoints")
    for got, expected in zip(model.get_weights(), of_one_process[0], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_they_say_what_they_cannot_do(of_two_processes):
    folder, results = of_two_processes
    for result in results:
        assert set(result["refused"]) == {
            "predict",
            "generate",
            "save",
            "save_weights",
            "save_to_preset",
            "export_to_transformers",
        }
        for method, said in result["refused"].items():
            assert f"`{method}` works in one process" in said
            assert "OrbaxCheckpoint" in said
    written = {path.name for path in folder.iterdir()}
    assert written == {"checkpoints", "train_0.json", "train_1.json"}


def test_the_other_ends_when_one_is_killed_and_both_go_on(of_one_process, tmp_path):
    codes, results, errors = run(tmp_path, "killed")
    assert codes[1] == -9 and codes[0] not in (0, None)
    assert results == [None, None]
    assert "heartbeat timeout" in errors[0] or "Connection closed by peer" in errors[0]

    codes, results, errors = run(tmp_path, "resume")
    assert codes == [0, 0], errors[0]
    losses = of_one_process[1]
    for result in results:
        first = result["first"]
        assert 0 < first <= worker.KILLED_IN
        np.testing.assert_allclose(result["losses"], losses[first:], rtol=1e-5)
