"""docs/cluster.md: its scripts and manifests are well formed, and the commands in them exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from limner.cli.program import app

TEXT = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)[^\n]*\n(.*?)```", TEXT, re.DOTALL)
SCRIPTS = [block for language, block in BLOCKS if language == "bash"]
MANIFESTS: list[dict[str, Any]] = [
    manifest for language, block in BLOCKS if language == "yaml" for manifest in yaml.safe_load_all(block)
]


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return manifest["spec"]["template"]["spec"]["containers"] if manifest["kind"] == "Job" else []


def commands() -> list[list[str]]:
    """Every `limner COMMAND ...` of the scripts and manifests."""
    lines = [line for script in SCRIPTS for line in script.replace("\\\n", " ").replace("'\n", "\n").splitlines()]
    lines += [shlex.join(c["command"]) if c["command"][0] != "bash" else c["command"][2]
              for manifest in MANIFESTS for c in containers(manifest)]  # fmt: skip
    found = [re.search(r"(?:^|-m )limner ((?:train|sample) .*)", line.strip()) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


def test_every_command_is_understood() -> None:
    """Parsed as the command line would, and not run."""
    group: Any = typer.main.get_command(app)
    assert len(commands()) == 10
    for name, *rest in commands():
        context = group.commands[name].make_context(name, list(rest))
        assert context.params["out"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_well_formed(script: str) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    made = subprocess.run([bash, "-n"], input=script, text=True, capture_output=True, check=False)
    assert made.returncode == 0, made.stderr


def test_manifests_hang_together() -> None:
    """Mounts have their volumes, names agree, indexed jobs have as many completions as parts."""
    assert [manifest["kind"] for manifest in MANIFESTS] == ["Job", "Service", "Job", "Job"]
    for manifest in MANIFESTS:
        for container in containers(manifest):
            volumes = {volume["name"] for volume in manifest["spec"]["template"]["spec"]["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    service, nodes = MANIFESTS[1], MANIFESTS[2]
    assert service["spec"]["selector"]["job-name"] == nodes["metadata"]["name"]
    assert nodes["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    command = containers(nodes)[0]["command"]
    assert int(command[command.index("--nnodes") + 1]) == nodes["spec"]["completions"] == nodes["spec"]["parallelism"]
    parts = MANIFESTS[3]
    assert f"INDEX/{parts['spec']['completions']}" in containers(parts)[0]["command"][2]
