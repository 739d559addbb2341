"""Google Colab: where results go there, and what a notebook needs before it can run alone in a fresh runtime."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path("/content/mi-workbench")  # where the notebooks' first cell puts the repository
DRIVE = Path("/content/drive")
FOLDER = "mi-workbench"  # in the reader's Drive
RUNNING = "MI_UTILS_COLAB"  # set while earlier notebooks run, whose own first cell then has nothing to do


def prepare(notebook: str, to_drive: bool = False) -> None:
    """Choose the folder for results, run the notebooks that this one builds on, and say what it will run on.

    Every Colab notebook has a machine of its own, on which nothing of the earlier ones is left. Those whose results
    ``notebook`` needs are run first, with their default parameters; what is finished on the Drive is not run again.

    Args:
        notebook: its name, such as "03_implementation".
        to_drive: mount the reader's Drive (Colab asks) and keep results and runs there, in ``mi-workbench/build``.
            Otherwise they are lost with the runtime.

    Raises:
        RuntimeError: an earlier notebook failed.
    """
    if os.environ.get(RUNNING):
        return
    home = CHECKOUT / "notebooks"
    if to_drive:
        from google.colab import drive

        drive.mount(str(DRIVE))
        home = DRIVE / "MyDrive" / FOLDER
        home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)  # results are saved from the working directory upwards, see course.study_folder
    _run_predecessors(notebook, (home if to_drive else CHECKOUT) / "build")
    _tell_device()


def _run_predecessors(notebook: str, build: Path) -> None:
    from mi_utils import course

    folder = CHECKOUT / "notebooks"
    needed = course.predecessors(course.Notebook.read(course.find_notebook(notebook, folder)))
    if not needed:
        return
    plan = course.plan_course([each.name for each in needed], output=build, folder=folder)
    waiting = [step.notebook.name for step in plan.steps if not step.finished]
    if waiting:
        print(f"First {' and '.join(waiting)}, whose results this notebook builds on …")
    os.environ[RUNNING] = "1"
    try:
        results = course.run_course(plan)
    finally:
        del os.environ[RUNNING]
    if failed := [entry for entry in results if entry.status != "done"]:
        raise RuntimeError(f"{failed[0].notebook} {failed[0].status}: {failed[0].message}")


def _tell_device() -> None:
    import torch

    from mi_utils import compute

    if compute.pick_device().type == "cuda":
        print(f"Runs on the GPU: {torch.cuda.get_device_name()}.")
    else:
        print("Runs on the CPU, which is enough for smallworld. For larger models: Runtime, Change runtime type, GPU.")
