"""The ten commands speak one language: same options, same defaults, help that ends with an example."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from typer.main import get_command

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(p.parent.name for p in ROOT.glob("packages/*/pyproject.toml"))


def leaves(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    children = getattr(command, "commands", {})
    if not children:
        yield " ".join(words), command
    for name, child in children.items():
        yield from leaves(child, (*words, name))


def commands() -> list[tuple[str, click.Command]]:
    apps = {name: importlib.import_module(f"{name.replace('-', '_')}.cli").app for name in NAMES}
    return [leaf for name, app in apps.items() for leaf in leaves(get_command(app), (name,))]


COMMANDS = dict(commands())


def options(words: str) -> dict[str, click.Parameter]:
    return {flag: option for option in COMMANDS[words].params for flag in option.opts}


@pytest.mark.parametrize("name", NAMES)
def test_every_demo_takes_the_same_options(name: str) -> None:
    found = options(f"{name} demo")
    assert str(found["--output"].default) == "out" and found["-o"] is found["--output"]
    assert found["--seed"].default == 0 and not found["--json"].default


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_prints_json_and_ends_its_help_with_an_example(words: str) -> None:
    assert "--json" in options(words)
    assert (COMMANDS[words].epilog or "").startswith(f"Example: {words.split()[0]} ")


@pytest.mark.parametrize("words", COMMANDS)
def test_an_option_has_one_name_and_one_default(words: str) -> None:
    found = options(words)
    if {"--out", "-o"} & set(found):
        assert found["--output"] is found["-o"], "what is written goes to --output, -o"
    if "--learning-rate" in found:
        assert "--lr" in found
    assert {"--gpu", "--cuda", "--outdir", "--random-seed"}.isdisjoint(found)
    assert "--seed" not in found or found["--seed"].default == 0
    assert "--device" not in found or found["--device"].default in ("auto", "cpu")
    assert "--resume" not in found or found["--resume"].default is False
