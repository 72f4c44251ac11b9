"""Carry out a notebook where it stands and keep what it shows: python scripts/tour.py examples/tour.ipynb"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

PATIENCE_S = 1200


def carried_out(notebook: Path) -> Any:
    """The notebook with its outputs, run by this Python in its own folder. CellExecutionError for a cell that fails."""
    content = nbformat.read(notebook, as_version=4)
    where = {"metadata": {"path": str(notebook.parent)}}
    NotebookClient(content, timeout=PATIENCE_S, kernel_name="python3", resources=where).execute()
    for cell in content.cells:
        cell.metadata.pop("execution", None)  # when each cell ran
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _kept(output)) is not None]
    content.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return content


def _kept(output: Any) -> Any:
    """Results and what was printed, pictures as PNG alone; None for progress and warnings: they tell of the machine."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if output.output_type != "execute_result":
        return None
    output.data.pop("image/jpeg", None)
    return output


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        nbformat.write(carried_out(path), path)
