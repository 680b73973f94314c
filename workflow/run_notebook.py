"""One papermill call: execute a notebook with parameters, show its progress, clean it, put it in its place.

Run by Snakemake (`script:`), which provides the global `snakemake`.
"""

import re
import sys
from pathlib import Path

import nbformat
import papermill
from filelock import FileLock, Timeout
from nbstripout import strip_output

from saelib import paths

#: What papermill and Jupyter write into metadata that is different in every run.
NOISE = [
    "metadata.papermill", "metadata.language_info", "metadata.widgets", "cell.metadata.papermill", "cell.metadata.execution",
]  # fmt: skip


def run(stem: str, parameters: dict, output: Path) -> None:
    """Execute ``notebooks/<stem>.ipynb`` into `output`. A failed run leaves ``<stem>.failed.ipynb`` beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    running = output.with_suffix(".failed.ipynb")
    lock = FileLock(output.with_suffix(".lock"), blocking=False)  # freed by the system even when we are killed
    try:
        lock.acquire()
    except Timeout:
        sys.exit(f"error: another process is running {output}; wait for it or stop it")
    papermill.execute_notebook(
        paths.NOTEBOOKS / f"{stem}.ipynb",
        running,
        parameters=parameters,
        cwd=paths.NOTEBOOKS,
        kernel_name="python3",
        progress_bar={"desc": stem},
        extra_arguments=["--IPKernelApp.log_level=40"],  # else each kernel warns about its local connection
        stderr_file=sys.stderr,
    )
    clean(running)
    running.replace(output)


def clean(path: Path) -> None:
    """Keep outputs and counts, drop metadata noise; a progress bar's many states become its last one."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = list(filter(None, map(last_state, joined(cell.outputs))))
    strip_output(notebook, keep_output=True, keep_count=True, keep_id=True, extra_keys=NOISE)
    nbformat.write(notebook, path)


def joined(outputs: list) -> list:
    """Neighbouring pieces of the same stream as one."""
    result = []
    for output in outputs:
        if result and output.output_type == "stream" and result[-1].get("name") == output.name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def last_state(output):
    """What a terminal would show of a stream after all carriage returns, without bars that did not end; None for nothing."""
    if output.output_type != "stream":
        return output
    lines = [re.sub(r"\s+$", "", line.rstrip("\r").rpartition("\r")[2]) for line in output.text.split("\n")]
    if output.name != "stdout":  # one bar below another moves the cursor, and leaves both half way
        lines = [line for line in lines if line and "\x1b[A" not in line and not re.search(r"\b\d?\d%\|", line)]
    output.text = "\n".join(lines)
    return output if output.text.strip() else None


if __name__ == "__main__":
    run(snakemake.params.stem, snakemake.params.parameters, Path(snakemake.output.notebook).resolve())  # noqa: F821
