"""The commands. Each imports what it needs when it runs, so that `tunefleet --help` answers at once.

Exit codes: 0 done, 1 the run failed, 2 the recipe or the command is at fault, 130 and 143 stopped by a signal.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tunefleet.cli_jobs import jobs, submit
from tunefleet.cli_words import AsJson, Overrides, RecipePath, console, errors, print_json, print_plain
from tunefleet.errors import BrokenOff, Refused, RunFailed

if TYPE_CHECKING:
    from tunefleet.recipe.sections import Recipe
    from tunefleet.search.tuner import SearchOutcome

app = typer.Typer(
    name="tunefleet",
    help="Fine-tuning that is native to Ray: one flat YAML, one tuning method, anywhere from a laptop to a cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.command()(submit)
app.add_typer(jobs, name="jobs")

Address = Annotated[str | None, typer.Option(help="An existing Ray cluster; the same as ray_address in the recipe.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from tunefleet import __version__

        sys.stdout.write(f"tunefleet {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before a command."""


def main() -> None:
    """Run a command and turn its errors into one sentence and an exit code."""
    from tunefleet.recipe.problems import RecipeError
    from tunefleet_strategies.errors import StrategyError

    _quiet_libraries()
    try:
        app()
    except RecipeError as error:
        for problem in error.problems:
            print_plain(errors, problem.line(), "red")
        sys.exit(2)
    except (Refused, StrategyError) as error:
        print_plain(errors, str(error), "red")
        sys.exit(2)
    except RunFailed as error:
        print_plain(errors, str(error), "red")
        sys.exit(1)
    except BrokenOff as error:
        print_plain(errors, str(error))
        sys.exit(130)


def _quiet_libraries() -> None:
    """Keep what libraries tell their developers away from those who run a command."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT loads it, and nothing here computes with it


@contextmanager
def _only_the_answer() -> Iterator[None]:
    """One short command, one answer: no bars for the loading of its model, nothing of libraries on stdout."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with redirect_stdout(sys.stderr):
        yield


def _read(path: Path, overrides: list[str] | None, address: str | None = None) -> Recipe:
    from tunefleet.launch.job_folder import refuse_left_at_home
    from tunefleet.recipe.read import read_recipe

    refuse_left_at_home(path)
    words = _words(overrides, address)
    read = read_recipe(path, words)
    more = _settled(path, words)
    return read_recipe(path, [*words, *more]) if more else read


def _words(overrides: list[str] | None, address: str | None) -> list[str]:
    return [*(overrides or []), *([] if address is None else [f"ray_address={address}"])]


def _settled(path: Path, words: list[str]) -> tuple[str, ...]:
    """What is laid over a recipe, because of where it runs."""
    from tunefleet.launch.job_folder import settled

    found = settled(path, words, Path.cwd())
    for notice in found.notices:
        print_plain(errors, notice)
    return found.words


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, address: Address = None, as_json: AsJson = False) -> None:
    """Train. The same command continues a run that was interrupted."""
    read = _read(recipe, overrides, address)
    from tunefleet.artifacts.report import summary_table
    from tunefleet.launch.display import open_display
    from tunefleet.launch.job_folder import lasting
    from tunefleet.launch.train import train as run

    display_console = errors if as_json else console
    outcome = run(read, open_display(display_console), Path.cwd())
    found = lasting(outcome.output_dir, outcome.run.child("model").uri)
    if as_json:
        print_json({"output_dir": found, "run": outcome.run.uri, **outcome.summary})
    elif outcome.exit_code:
        text = f"Stopped at step {outcome.summary['step']} with a checkpoint; the same command goes on from it."
        print_plain(console, text)
    else:
        console.print(summary_table(outcome.summary))
        print_plain(console, found, "bold")
    sys.exit(outcome.exit_code)


@app.command()
def tune(recipe: RecipePath, overrides: Overrides = None, address: Address = None, as_json: AsJson = False) -> None:
    """Search: many trials of a recipe with a `tune:` block. The same command goes on with one that was interrupted."""
    from tunefleet.launch.job_folder import refuse_left_at_home

    refuse_left_at_home(recipe)
    written = _words(overrides, address)
    with ExitStack() as stack:
        server = None
        if _wants_warm_hosts(recipe, written):
            from tunefleet.search.warm.forks import fork_server

            server = stack.enter_context(fork_server())  # imports beside this process
        from tunefleet.recipe.tune import read_search

        search = read_search(recipe, written)
        more = _settled(recipe, written)
        search = read_search(recipe, [*written, *more]) if more else search
        from tunefleet.search.live import open_search_display
        from tunefleet.search.tuner import tune as run

        display = open_search_display(errors if as_json else console, search.tune.metrics[0])
        outcome = run(search, display, Path.cwd(), server)
    _tell_of_search(outcome, as_json)
    sys.exit(outcome.exit_code)


def _wants_warm_hosts(path: Path, overrides: list[str]) -> bool:
    """Whether a search asks for them; what else its recipe says is read later, with imports that take seconds."""
    from tunefleet.recipe.yaml_text import read_mapping, read_overrides, read_text

    block, laid = read_mapping(read_text(path), str(path))[0].get("tune"), read_overrides(overrides)[0]
    own = block.get("trial_host") if isinstance(block, dict) else None
    return laid.get("tune.trial_host", own) == "warm"


def _tell_of_search(outcome: SearchOutcome, as_json: bool) -> None:
    from tunefleet.launch.job_folder import lasting
    from tunefleet.search.ending import result_table, tournament_table, winning
    from tunefleet.search.result import RESULT_FOLDER
    from tunefleet.search.tournament import as_json as standings_as_json
    from tunefleet.search.tournament import standings

    found = lasting(outcome.output_dir, outcome.search.child(RESULT_FOLDER).uri)
    if as_json:
        best = [asdict(trial) for trial in winning(outcome.book, outcome.tune)]
        counts = {"trials": len(outcome.book.trials), "ended": sum(trial.ended for trial in outcome.book.trials)}
        place = {"output_dir": found, "search": outcome.search.uri}
        table = standings_as_json(standings(outcome.book, outcome.tune), outcome.tune)
        ranked = {"tournament": table} if outcome.tune.tournament else {}
        print_json({**place, **counts, "best": best, **ranked})
    elif outcome.exit_code:
        left = len(outcome.book.open_trials)
        text = f"Stopped with {left} trial(s) under way; the same command goes on from their checkpoints."
        print_plain(console, text)
    else:
        console.print(result_table(outcome.book, outcome.tune))
        if outcome.tune.tournament:
            console.print(tournament_table(standings(outcome.book, outcome.tune), outcome.tune))
        print_plain(console, found, "bold")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    address: Address = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Do not tokenise; print what is known without.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print every number of a run without loading weights."""
    read = _read(recipe, overrides, address)
    from tunefleet.launch.cluster import cluster_address, joined_shape, local_shape, ray_session
    from tunefleet.launch.display import open_display
    from tunefleet.launch.draft import draft
    from tunefleet.launch.tables import plan_table

    with ExitStack() as stack:
        joins = cluster_address(read.ray) is not None
        if joins:
            stack.enter_context(ray_session(read.ray))
        cluster = joined_shape(read.ray) if joins else local_shape(read.ray)
        stages = stack.enter_context(open_display(errors).preparing())
        made = draft(read, cluster, Path.cwd(), stages, with_data=not no_data)
    if as_json:
        print_json(made.model_dump(mode="json"))
        return
    console.print(plan_table(made))
    for notice in made.notices:
        console.print(f"[yellow]note[/] {escape(notice)}", highlight=False, emoji=False)


@app.command()
def data(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show tokenised rows; what is learned stands out in colour, or in a file between [[ and ]]."""
    read = _read(recipe, overrides)
    from tunefleet.data.show import rows_as_json, rows_as_plain, rows_as_text
    from tunefleet.launch.display import open_display
    from tunefleet.launch.draft import tokenised
    from tunefleet.launch.tables import data_table
    from tunefleet.models import load_tokenizer

    with open_display(errors).preparing() as stages:
        prepared = tokenised(read, stages)
    tokenizer = load_tokenizer(read.model)
    if prepared.train is None:
        raise Refused("The recipe names no training data: write dataset.")
    if as_json:
        print_json(rows_as_json(prepared.train, tokenizer, rows))
        return
    console.print(data_table(prepared))
    if not console.is_terminal:
        for row in rows_as_plain(prepared.train, tokenizer, rows):
            print_plain(console, row)
        return
    for text in rows_as_text(prepared.train, tokenizer, rows):
        console.print(text)


StoragePath = Annotated[str, typer.Option("--storage", help="The ray_storage_path of the recipes: a folder or a URI.")]


@app.command()
def ps(
    storage: Annotated[str, typer.Argument(help="A ray_storage_path: a folder or a URI.")] = "~/tunefleet",
    as_json: AsJson = False,
) -> None:
    """List the runs and searches of a storage path: state, step, best metric, from their records."""
    from tunefleet.commands.overview import overview_table, overviews
    from tunefleet.storage import place

    if not storage.strip():
        raise Refused("ps was given an empty path: name the ray_storage_path of your recipes, or leave it out.")
    now = datetime.now(UTC)
    found = overviews(place(storage), now)
    if as_json:
        print_json([asdict(one) for one in found])
    elif not found:
        print_plain(console, f"No run and no search below {storage}.")
    else:
        console.print(overview_table(found, now))


@app.command()
def fetch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's or search's name; or its own path or URI.")],
    to: Annotated[Path, typer.Option(help="A folder on this machine.")],
    storage: StoragePath = "~/tunefleet",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over files of something else.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the model and record of a finished run, or what a search found, from its storage."""
    from tunefleet.commands.fetch import fetch as bring
    from tunefleet.commands.fetch import named

    source = named(run, storage)
    folder = bring(source, to, overwrite=overwrite)
    if as_json:
        print_json({"folder": str(folder), "run": source.uri})
    else:
        print_plain(console, str(folder), "bold")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A trained folder: an adapter or a full model.")],
    to: Annotated[Path, typer.Argument(help="A new folder for the merged model.")],
    base: Annotated[str | None, typer.Option(help="The base model, if it is not where the adapter says.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as stored.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base: a folder that transformers loads by itself."""
    from tunefleet.artifacts.export import export as write

    with _only_the_answer():
        written = write(source, to, dtype=dtype, base=base)
    if as_json:
        print_json({"folder": str(written)})
    else:
        print_plain(console, str(written), "bold")


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="A trained folder; the base of an adapter is found by itself.")],
    prompt: Annotated[str, typer.Option(help="What to answer.")],
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    base: Annotated[str | None, typer.Option(help="The base model, if it is not where the adapter says.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt."""
    from tunefleet.artifacts.generate import answer

    with _only_the_answer():
        text = answer(
            folder, prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature, base=base, seed=seed
        )
    if as_json:
        print_json({"prompt": prompt, "answer": text})
    else:
        print_plain(console, text)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The same as a page (docs/recipe.md).")] = False,
) -> None:
    """Print the JSON Schema of a recipe, so that editors complete and check it."""
    from tunefleet.recipe.docs import recipe_markdown
    from tunefleet.recipe.schema import recipe_schema

    if markdown:
        sys.stdout.write(recipe_markdown())
    else:
        print_json(recipe_schema())


@app.command()
def methods(
    as_json: AsJson = False,
    matrix: Annotated[bool, typer.Option("--matrix", help="Where each method runs, and what refuses it.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The matrix as a page (docs/places.md).")] = False,
) -> None:
    """List the tuning methods, each with how it is selected and the keys that it owns."""
    from tunefleet.launch.tables import methods_table
    from tunefleet_strategies.registry import methods as registered

    if matrix or markdown:
        _print_matrix(as_json, markdown)
    elif as_json:
        print_json(
            [
                {
                    "name": method.name,
                    "summary": method.summary,
                    "selector": dict(method.selector),
                    "keys": list(method.model_fields),
                }
                for method in registered()
            ]
        )
    else:
        console.print(methods_table(registered()))


def _print_matrix(as_json: bool, markdown: bool) -> None:
    from tunefleet.launch.tables import matrix_table
    from tunefleet.places import matrix, matrix_markdown

    if markdown:
        sys.stdout.write(matrix_markdown())
    elif as_json:
        print_json([asdict(line) for line in matrix()])
    else:
        table, sentences = matrix_table(matrix())
        console.print(table)
        for sentence in sentences:
            print_plain(console, sentence)


@app.command()
def manifest(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A flat YAML file.")] = None,
    overrides: Overrides = None,
    check: Annotated[
        Path | None, typer.Option(help="Check a file of Kubernetes objects instead; - reads standard input.")
    ] = None,
    crds: Annotated[
        Path | None, typer.Option(help="With --check: a folder of official CRD files, used on top.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="s3://..., gs://..., or pvc://CLAIM\\[/FOLDER] for a ReadWriteMany claim.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="What every pod runs; default: what k8s/Dockerfile makes.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Where the objects belong.")] = None,
    queue: Annotated[str | None, typer.Option(help="A LocalQueue of Kueue, which starts the job.")] = None,
    name: Annotated[str | None, typer.Option(help="The job's name; default: from the run's.")] = None,
    workers_per_pod: Annotated[int | None, typer.Option(min=1, help="Workers that share a pod.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of a worker's pod, such as 64Gi.")] = None,
    service_account: Annotated[str | None, typer.Option(help="Whose rights on the storage the pods have.")] = None,
    secret: Annotated[list[str] | None, typer.Option(help="NAME=SECRET:KEY, a variable from a Secret.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say in comments why each number is what it is.")] = False,
) -> None:
    """Print a RayJob for Kubernetes that runs exactly this recipe, or check a manifest."""
    if (check is None) == (recipe is None):
        raise Refused("manifest takes a RECIPE, or --check FILE: name one of them.")
    if check is not None:
        given: dict[str, object] = {"--storage": storage, "--image": image, "--namespace": namespace, "--queue": queue}
        given |= {"--name": name, "--workers-per-pod": workers_per_pod, "--memory": memory}
        given |= {"--service-account": service_account, "--secret": secret or None, "--explain": explain or None}
        _refuse_beside_check([option for option, value in given.items() if value is not None])
        sys.exit(_check_manifest(check, crds))
    if crds is not None:
        raise Refused("--crds is for --check FILE: leave it out, what is rendered is checked by our own types.")
    assert recipe is not None
    from tunefleet.launch.manifest import ManifestOptions, default_image, render, secret_variable
    from tunefleet.search.onto_cluster import demand_of

    demand, place = demand_of(recipe, overrides or [], storage, workers_per_pod)
    options = ManifestOptions(
        image=default_image() if image is None else image,
        namespace=namespace,
        queue=queue,
        name=name,
        memory=memory,
        service_account=service_account,
        secrets=tuple(secret_variable(text) for text in secret or ()),
    )
    sys.stdout.write(render(demand, place, options, explain=explain))


def _refuse_beside_check(options: list[str]) -> None:
    if options:
        raise Refused(
            f"{options[0]} is for a RECIPE that is rendered, and --check FILE takes a manifest as it is: leave out "
            f"{', '.join(options)}."
        )


def _check_manifest(file: Path, crds: Path | None) -> int:
    from tunefleet.kube.check import check_bytes, check_file
    from tunefleet.kube.schemas import Schemas

    schemas = None if crds is None else Schemas(crds)
    piped = str(file) == "-"
    name = "standard input" if piped else str(file)
    checked = check_bytes(sys.stdin.buffer.read(), name, schemas) if piped else check_file(file, schemas)
    for finding in checked.findings:
        print_plain(errors, finding.line(), "red")
    official = f", {checked.by_schema} of them by official schemas too" if crds is not None else ""
    verdict = f"{len(checked.findings)} problem(s)" if checked.findings else "no problem"
    print_plain(console, f"{name}: {checked.objects} object(s) checked{official}, {verdict}")
    return 2 if checked.findings else 0


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what of the stack is here: versions, devices, number formats, Ray."""
    from tunefleet.launch.doctor import examine
    from tunefleet.launch.tables import doctor_table

    findings = examine()
    if as_json:
        print_json([finding.__dict__ for finding in findings])
    else:
        console.print(doctor_table(findings))
    sys.exit(0 if all(finding.ok for finding in findings) else 1)
