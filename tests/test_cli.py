"""The command `keras-moe`, called as a function and as a process."""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import keras_moe
from keras_moe import cli

ROOT = pathlib.Path(__file__).parent.parent


def printed(capsys, *arguments):
    """What a command that succeeds prints."""
    assert cli.main([*arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def failure(capsys, *arguments):
    """The one line on stderr of a command that fails."""
    try:
        status = cli.main([*arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1
    return err


def cells(text):
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_plan(capsys):
    out = printed(capsys, "plan", "mixtral_8x7b")
    assert out == f"{keras_moe.plan('mixtral_8x7b')}\n"


def test_plan_with_options(capsys):
    out = printed(
        capsys,
        *("plan", "mixtral_8x7b", "--batch-size", "4", "--sequence-length", "512"),
        *("--dtype", "mixed_bfloat16", "--optimizer", "lion", "--json"),
    )
    expected = keras_moe.plan("mixtral_8x7b", 4, 512, "mixed_bfloat16", "lion")
    assert json.loads(out) == expected.to_dict()


def test_plan_for_a_mesh(capsys):
    arguments = ["plan", "mixtral_8x7b", "--batch-size", "32"]
    arguments += ["--mesh", "batch=4,expert=8", "--platform", "tpu"]
    mesh = {"batch": 4, "expert": 8}
    expected = keras_moe.plan("mixtral_8x7b", 32, mesh=mesh, platform="tpu")
    assert printed(capsys, *arguments) == f"{expected}\n"
    assert json.loads(printed(capsys, *arguments, "--json")) == expected.to_dict()


def test_plan_of_a_folder(capsys):
    folder = ROOT / "presets" / "mixtral_tiny_en"
    assert printed(capsys, "plan", str(folder)).startswith(f"{folder}: 1 sequence of")


def test_list(capsys):
    head, *rows = cells(printed(capsys, "list"))
    assert head == ["preset", "parameters", "a token's", "weights", "licence"]
    assert [row[0] for row in rows] == [r.name for r in keras_moe.list_presets()]
    assert [
        "mixtral_8x7b",
        "46.7 B",
        "12.88 B",
        "mistralai/Mixtral-8x7B-v0.1",
        "Apache-2.0",
    ] in rows
    assert ["glam_64b_64e", "1.162 T", "96.6 B", "none"] in rows


def test_list_of_a_family(capsys):
    names = [row[0] for row in cells(printed(capsys, "list", "--family", "mixtral"))]
    assert names[1:] == ["mixtral_8x22b", "mixtral_8x7b", "mixtral_tiny_en"]


def test_list_as_json(capsys):
    records = json.loads(printed(capsys, "list", "--family", "deepseek_moe", "--json"))
    assert [r["family"] for r in records] == ["deepseek_moe"] * len(records)
    found = {r["name"]: r for r in records}
    assert found["deepseek_moe_16b"]["weights"] == "deepseek-ai/deepseek-moe-16b-base"
    total = keras_moe.plan("deepseek_moe_16b").total_parameters
    assert found["deepseek_moe_16b"]["total_parameters"] == total


@pytest.mark.parametrize(
    "arguments,parts",
    [
        ([], ["keras-moe: error:", "VERB"]),
        (["pln"], ["keras-moe: error:", "'pln'", "plan"]),
        (["plan"], ["keras-moe plan: error:", "PRESET"]),
        (["plan", "mixtral_8x7b", "--batch-size", "two"], ["--batch-size", "'two'"]),
        (["plan", "mixtral_8x7b", "--batchsize", "2"], ["--batchsize"]),
        (
            ["plan", "mixtral_8x7b", "--batch-size", "0"],
            ["keras-moe plan: error: `batch_size` must be", "batch_size=0"],
        ),
        (["plan", "mixtral_8x7b", "--dtype", "int3"], ["`dtype` must be one of"]),
        (["plan", "mixtral_8x7b", "--optimizer", "x"], ["`optimizer` must be one of"]),
        (
            ["plan", "mixtral_8x70b"],
            ["keras-moe plan: error: `preset` must be one of", "'mixtral_8x70b'"],
        ),
        (["plan", "mixtral_8x7b", "--mesh", "8"], ["--mesh", "batch=4", "'8'"]),
        (["plan", "mixtral_8x7b", "--mesh", "expert=2,expert=4"], ["--mesh"]),
        (
            ["plan", "mixtral_8x7b", "--mesh", "expert=3", "--batch-size", "3"],
            ["keras-moe plan: error:", "'expert'", "3 devices", "Received: 8"],
        ),
        (["plan", "."], ["keras-moe plan: error: `preset` must hold `config.json`"]),
        (
            ["list", "--family", "mistral"],
            ["keras-moe list: error: `family` must be one of", "family='mistral'"],
        ),
    ],
    ids=str,
)
def test_errors_are_one_line(capsys, monkeypatch, tmp_path, arguments, parts):
    monkeypatch.chdir(tmp_path)
    line = failure(capsys, *arguments)
    assert re.search(".*".join(map(re.escape, parts)), line)


def test_an_error_of_several_lines_becomes_one(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{\n")
    assert "must be valid JSON" in failure(capsys, "plan", str(tmp_path))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help(capsys, verb):
    with pytest.raises(SystemExit) as exit:
        cli.main([verb, "--help"])
    assert exit.value.code == 0
    assert "--json" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert verb in capsys.readouterr().out


def test_the_command_is_installed_as_this_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = importlib.metadata.EntryPoint(
        "keras-moe", project["scripts"]["keras-moe"], "console_scripts"
    )
    assert entry.load() is cli.main


def run(*command, **options):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


def test_as_a_module():
    done = run(sys.executable, "-m", "keras_moe", "plan", "glam_64b_64e")
    assert done.returncode == 0
    assert done.stdout == f"{keras_moe.plan('glam_64b_64e')}\n"
    failed = run(sys.executable, "-m", "keras_moe", "plan", "nothing")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert "Traceback" not in failed.stderr
    line = failed.stderr.splitlines()[-1]
    assert line.startswith("keras-moe plan: error: `preset` must be one of")


def test_a_reader_that_stops_is_no_error():
    code = f"{sys.executable} -m keras_moe list --json | head -c 1"
    done = run("sh", "-c", code)
    assert done.stdout == "["
    assert "Broken" not in done.stderr and "Traceback" not in done.stderr
