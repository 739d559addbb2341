"""Command line: ``python -m mi_utils doctor | run | runs | evaluate | features | estimate | new-project | …``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mi_utils import course, project

app = typer.Typer(
    help="Run the course, check this machine, measure the embedded models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console()

STATUS_STYLE = {"done": "green", "failed": "red", "interrupted": "yellow", "running": "yellow"}

Model = Annotated[str | None, typer.Option(help="Embedded name, local folder or hub id (gpt2-small).")]
Output = Annotated[Path, typer.Option(help="Folder for results, relative to the repository.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best there is unless given.")]


def _refuse(error: Exception) -> typer.Exit:
    console.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
    return typer.Exit(2)


@app.command()
def run(
    notebooks: Annotated[
        list[str] | None, typer.Argument(help="Numbers (03), names or paths; all of them if none is given.")
    ] = None,
    model: Model = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="Seed for the notebooks.")] = None,
    output: Output = Path("build"),
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", help="A notebook parameter, name=value; repeatable."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run finished notebooks again.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds a single cell may take.")] = None,
) -> None:
    """Run notebooks in order; a run that was cut short goes on at its first unfinished notebook."""
    try:
        plan = course.plan_course(
            notebooks or (),
            model=model,
            device=device,
            seed=seed,
            output=output,
            parameters=course.parse_parameters(parameter or ()),
            fresh=fresh,
        )
    except course.CourseError as error:
        raise _refuse(error) from error

    waiting = [step.notebook.name for step in plan.steps if not step.finished]
    console.print(f"{len(waiting)} of {len(plan.steps)} notebooks to run, model {escape(plan.state.model)}.")
    try:
        results = _run_with_progress(plan, waiting, timeout)
    except KeyboardInterrupt:
        console.print("[yellow]Stopped.[/] The same command goes on at the first unfinished notebook.")
        raise typer.Exit(130) from None
    _print_summary(plan, results)
    if any(entry.status != "done" for entry in results):
        raise typer.Exit(1)


def _run_with_progress(plan: course.Plan, waiting: list[str], timeout: float | None) -> list[course.Entry]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:32s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        overall = progress.add_task("notebooks", total=len(waiting))
        bars: dict[str, Any] = {}

        def on_progress(name: str, cells: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name)
            progress.update(bars[name], completed=cells, total=total)
            if cells == total:
                progress.advance(overall)

        return course.run_course(plan, timeout=timeout, on_progress=on_progress)


def _print_summary(plan: course.Plan, results: list[course.Entry]) -> None:
    finished_before = {step.notebook.name for step in plan.steps if step.finished}
    table = Table("notebook", "seconds", "state", "")
    for entry in results:
        note = "finished earlier, see --fresh" if entry.notebook in finished_before else entry.message
        style = STATUS_STYLE.get(entry.status, "")
        table.add_row(
            entry.notebook,
            f"{entry.seconds:.1f}",
            f"[{style}]{entry.status}[/]" if style else entry.status,
            escape(note),
        )
    console.print(table)
    verdict = plan.state.verdict()
    if verdict is not None:
        console.print(f"Verdict of the study: [bold]{escape(verdict)}[/]")
    console.print(f"Results: {plan.build / 'index.html'}", soft_wrap=True, highlight=False)


@app.command()
def doctor(
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Check versions, device, memory and the embedded models' numbers; exit 1 when something is wrong."""
    healthy = _check_versions()
    healthy = _check_machine(device, dtype) and healthy
    console.print("[green]All is well.[/]" if healthy else "[red]Something is wrong; see the red lines.[/]")
    if not healthy:
        raise typer.Exit(1)


def _check_versions() -> bool:
    import sys
    from importlib import metadata

    from packaging.requirements import Requirement

    from mi_utils.compute import DISTRIBUTION

    table = Table("package", "installed", "wanted", "")
    healthy = sys.version_info >= (3, 11)
    mark = {True: "[green]ok[/]", False: "[red]wrong[/]"}
    table.add_row("python", sys.version.split()[0], ">=3.11", mark[healthy])
    try:
        wanted = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        console.print(f"[red]{DISTRIBUTION} is not installed: pip install -e . in the repository.[/]")
        return False
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = "missing"
        fits = installed != "missing" and requirement.specifier.contains(installed, prereleases=True)
        healthy = healthy and fits
        table.add_row(requirement.name, installed, str(requirement.specifier) or "any", mark[fits])
    console.print(table)
    return healthy


def _check_machine(device: str | None, dtype: str | None) -> bool:
    from mi_utils import compute, models

    try:
        chosen = compute.pick_device(device)
        precision = compute.pick_dtype(chosen, dtype)
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return False
    free = compute.available_memory(chosen) / 2**30
    precision_name = str(precision).removeprefix("torch.")
    console.print(f"Device {chosen}, {precision_name}, {free:.1f} GiB of memory free.")

    # half precision keeps about three digits of a log-probability; float32 differs by rounding order only
    tolerance = 1e-3 if precision_name == "float32" else 0.25
    names = [name for name in sorted(models.embedded_names()) if "-step" not in name]
    if not names:
        console.print("[red]No embedded model is installed.[/] `make train` makes them.")
        return False
    healthy = True
    for name in names:
        try:
            difference = models.check_canary(name, chosen, precision)
        except Exception as error:  # a doctor reports every kind of failure
            console.print(f"Canary {name}: [red]{escape(f'{type(error).__name__}: {error}')}[/]")
            healthy = False
            continue
        fits = difference <= tolerance
        healthy = healthy and fits
        state = "[green]ok[/]" if fits else "[red]wrong numbers on this device[/]"
        console.print(f"Canary {name}: stored log-probabilities differ by {difference:.1e} at most: {state}")
    return healthy


@app.command()
def evaluate(
    models: Annotated[list[str] | None, typer.Argument(help="Models to measure; every shipped seed if none.")] = None,
) -> None:
    """Measure the embedded models' behaviours on held-out prompts; exit 1 when one is below its bar."""
    from mi_utils.smallworld import evaluate as behaviours

    try:
        reached = behaviours.main(models or ())
    except ValueError as error:
        raise _refuse(error) from error
    if not reached:
        raise typer.Exit(1)


@app.command()
def features(
    model: Annotated[str, typer.Option(help="Embedded model, small enough to be searched here.")] = "smallworld",
    sae: Annotated[
        list[str] | None, typer.Option(help="Sparse autoencoder: shipped name or folder; repeatable.")
    ] = None,
) -> None:
    """Print which concepts single features stand for, beside two controls; exit 1 when it is below its bar."""
    from mi_utils import concepts

    try:
        reached = concepts.main(model, sae or ())
    except ValueError as error:
        raise _refuse(error) from error
    if not reached:
        raise typer.Exit(1)


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Embedded name, well-known name (gpt2-xl), folder or hub id.")],
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Tokens a prompt.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or int8.")] = "float32",
    task: Annotated[str, typer.Option(help="forward, cache, patching, sae, or all of them.")] = "all",
) -> None:
    """Estimate the memory a model needs before it is loaded, name the tool for its size, and say what fits here."""
    from mi_utils import compute, estimates

    device = compute.pick_device()
    try:
        shape = compute.known_shape(model) or _shape_of(model)
        tasks = estimates.TASKS if task == "all" else (task,)
        needs = [estimates.estimate(shape, each, batch=batch, seq=seq, dtype=dtype, device=device) for each in tasks]
    except (ValueError, RuntimeError) as error:  # ModelNotFound among them
        raise _refuse(error) from error
    choice = compute.choose_tool(shape)
    console.print(f"{shape.name}: {shape.n_parameters:,} parameters, {shape.n_layers} layers", highlight=False)
    console.print(f"Tool: [bold]{escape(choice.tool)}[/]. {escape(choice.reason)}")
    free = compute.available_memory(device)
    table = Table("task", "memory at its peak", f"of that, for ({dtype}, {batch} × {seq} tokens)", "here")
    for need in needs:
        parts = "\n".join(f"{name} {compute.format_bytes(size)}" for name, size in need.parts.items() if size)
        fits = "[green]fits[/]" if need.total < free else "[red]does not fit[/]"
        table.add_row(need.task, compute.format_bytes(need.total), parts, fits)
    console.print(table)
    console.print(f"{device} has {compute.format_bytes(free)} free.", highlight=False)
    if all(need.total < free for need in needs):
        return
    half = estimates.estimate(shape, needs[0].task, batch=batch, seq=seq, dtype="bfloat16").total
    console.print(
        f"Smaller: --dtype bfloat16 ({compute.format_bytes(half)} for {needs[0].task}) or int8, fewer prompts. Larger: "
        "device_map='auto' over several cards, or remote=True on NDIF (see notebook 18)."
    )


def _shape_of(model: str) -> Any:
    """Shape of a model that is not in the table, from its own configuration."""
    course.check_model(model)
    from transformers import AutoConfig

    from mi_utils import compute, models

    plain, _ = models.split_random(model, 0)
    return compute.ModelShape.from_config(AutoConfig.from_pretrained(models.resolve(plain)))


@app.command("new-project")
def new_project(
    directory: Annotated[Path, typer.Argument(help="Folder for the project; files that are there stay as they are.")],
    name: Annotated[str | None, typer.Option(help="Name; the folder's unless given.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to study.")] = None,
    question: Annotated[str | None, typer.Option(help="What you want to know about it, in one sentence.")] = None,
    tracking: Annotated[str | None, typer.Option(help="json, or wandb as well.")] = None,
    tool: Annotated[str | None, typer.Option(help="TransformerLens or nnsight; by the model's size.")] = None,
    train_sae: Annotated[bool | None, typer.Option(help="Pin SAELens, for training.")] = None,
    defaults: Annotated[bool, typer.Option("--defaults", help="Ask nothing.")] = False,
) -> None:
    """Make a project of your own from the template; asks for what is not given."""
    answers = {
        "name": name, "model": model, "question": question, "tracking": tracking, "tool": tool, "train_sae": train_sae,
    }  # fmt: skip
    try:
        if not defaults:
            answers |= _ask_for_missing(directory, answers)
        made = project.new_project(directory, answers)
    except project.ProjectError as error:
        raise _refuse(error) from error
    console.print(f"{len(made.written)} files written to {escape(str(directory))}", highlight=False, soft_wrap=True)
    if made.kept:
        console.print(f"Left as they were: {escape(', '.join(made.kept))}", highlight=False, soft_wrap=True)
    if made.written:
        steps = f"cd {directory} && git init && git add -A && git commit -m 'New project'", "make test"
        console.print("Next:", *(f"  {escape(step)}" for step in steps), sep="\n", highlight=False, soft_wrap=True)


def _ask_for_missing(directory: Path, answers: dict[str, Any]) -> dict[str, Any]:
    """Ask for what neither the command line nor an earlier project in the folder says; Enter takes the default."""
    texts = {
        "name": ("Name of the project", directory.resolve().name),
        "model": ("Model to study: embedded name, hub id or folder", "smallworld"),
        "question": ("What do you want to know about it? Enter for the course's question", ""),
        "tracking": ("Where runs are logged: json or wandb", "json"),
    }
    recorded = project.read_answers(directory)
    open_questions = {name: text for name, text in texts.items() if answers[name] is None and name not in recorded}
    asked = {name: typer.prompt(text, default=default) for name, (text, default) in open_questions.items()}
    return {name: answer for name, answer in asked.items() if answer}


@app.command()
def site(
    output: Annotated[Path, typer.Option(help="Folder of the site, relative to the repository.")] = Path("build/site"),
) -> None:
    """Render the stored notebooks and the texts as a static site; nothing is executed."""
    from mi_utils.site import build_site

    root = course.find_root() or course.find_root(Path(__file__).parent)
    try:
        if root is None:
            raise ValueError("No notebooks/ folder here or above. Change into the repository first.")
        target = output if output.is_absolute() else root / output
        pages = build_site(root, target)
    except ValueError as error:
        raise _refuse(error) from error
    console.print(f"{len(pages)} pages: {pages[0]}", soft_wrap=True, highlight=False)


@app.command()
def calibrate(
    short: Annotated[bool, typer.Option("--short", help="A few worlds of each family, in under a minute.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    output: Output = Path("build"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Run finished worlds again.")] = False,
    page: Annotated[Path | None, typer.Option(help="Also write the table to this Markdown file.")] = None,
) -> None:
    """Run the five-phase study where the right verdict is known; exit 1 when it is wrong too often."""
    from time import perf_counter

    from mi_utils import calibration, compute

    folder = output if output.is_absolute() else (course.find_root() or Path.cwd()) / output
    if fresh:
        (folder / calibration.FILE).unlink(missing_ok=True)
    started = perf_counter()
    outcomes = calibration.calibrate(short, workers, None if short else folder)
    header, *rows = calibration.table(outcomes)
    shown = Table(*header)
    for row in rows:
        shown.add_row(*map(escape, row), style="bold" if row[0].startswith("all ") else None)
    console.print(shown)
    here = compute.environment()
    cpu = sum(outcome.cpu_seconds for outcome in outcomes)
    took = (
        f"It took {cpu / 60:.1f} minutes of processor time ({(perf_counter() - started) / 60:.1f} minutes by the clock "
        f"for this call, {workers} processes on {here['cpu_count']} cores) with torch {here['packages'].get('torch')} "
        f"on Python {here['python']}."
    )
    console.print(took, highlight=False)
    if page is not None:
        page.write_text(calibration.page(outcomes, took), encoding="utf-8")
    if not calibration.passes(outcomes):
        console.print("[red]Too many false alarms, or too little power.[/]")
        raise typer.Exit(1)


@app.command()
def runs(
    studies: Annotated[
        list[str] | None, typer.Argument(help="Studies to compare, by (part of) name or by plan hash.")
    ] = None,
    output: Output = Path("build"),
) -> None:
    """List course runs, past studies with their verdicts, and logged runs; or compare the studies named."""
    build = output if output.is_absolute() else (course.find_root() or Path.cwd()) / output
    if studies:
        _compare_studies(build, studies)
        return
    states = course.list_runs(build)
    table = Table("course run", "notebooks done", "verdict", "folder")
    for state in states:
        done = sum(entry.status == "done" for entry in state.entries.values())
        name = f"{state.model}, seed {state.seed}"
        table.add_row(
            escape(name),
            f"{done} of {len(state.entries)}",
            state.verdict() or "-",
            state.folder.relative_to(build).as_posix(),
        )
    console.print(table if states else f"No course run below {output}.")

    _list_studies(build)
    logged = _logged_runs(build / "runs")
    if logged:
        table = Table("logged run", "results")
        for record in logged:
            shown = {k: v for k, v in record.get("results", {}).items() if k != "measured"}
            results = ", ".join(f"{name}={value}" for name, value in shown.items())
            table.add_row(escape(str(record.get("name"))), escape(results))
        console.print(table)


def _list_studies(build: Path) -> None:
    from mi_utils.archive import find_studies

    past = find_studies(build)
    if not past:
        return
    table = Table("study", "model", "seed", "plan", "locked", "verdict", "does not hold, or missing")
    for each in past:
        if each.study is None:
            table.add_row(escape(each.name), "", "", "", "", "[red]unreadable[/]", escape(each.problem))
            continue
        verdict = each.study.verdict()
        table.add_row(
            escape(each.name), escape(each.study.model), str(each.study.seed), (each.study.hash or "-")[:8],
            (each.study.locked_at or "not locked")[:16], verdict.status,
            escape(", ".join(verdict.failed + verdict.missing)),
        )  # fmt: skip
    console.print(table)
    console.print("Compare some of them: python -m mi_utils runs STUDY STUDY", highlight=False)


def _compare_studies(build: Path, names: list[str]) -> None:
    from mi_utils import archive

    past = archive.find_studies(build)
    try:
        chosen = {each.name: each.study for each in (archive.pick(past, name) for name in names)}
    except ValueError as error:
        raise _refuse(error) from error
    header, *rows = archive.compare(chosen)
    table = Table(*map(escape, header))
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _logged_runs(directory: Path) -> list[dict[str, Any]]:
    if not directory.is_dir():
        return []
    from mi_utils.runlog import read_runs

    return read_runs(directory)


if __name__ == "__main__":
    app(prog_name="python -m mi_utils")
