"""The command line."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from headgram.errors import MANIFEST, HeadgramError
from headgram.foreign import plain

if TYPE_CHECKING:
    from headgram.atlas.reader import Atlas

app = typer.Typer(
    help="Measures the geometry of attention heads, from checkpoints. `init` begins a project, and `run` measures its models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; what is wrong with the input is one sentence on stderr, and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters
    try:
        app()
    except HeadgramError as error:
        print(f"headgram: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror or error}")
        raise SystemExit(1) from None


def _say(sentence: str) -> None:
    """A sentence on stderr."""
    print(f"headgram: {plain(sentence)}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        from headgram.version import __version__

        print(f"headgram {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="The folder to write. It may exist, but not contain a project.")]) -> None:
    """Begin a project: write a small folder with a manifest and options. It uses the installed workflow."""
    from headgram.run.project import new_project

    for path in new_project(folder):
        print(f"wrote {path}")
    print(f"next: cd {shlex.quote(str(folder))}, and read README.md; `headgram run` measures the models of config/models.tsv")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    more: typer.Context,
    cores: Annotated[str, typer.Option(help="How many cores jobs may use together; `all` is every core here.")] = "all",
    gpus: Annotated[Optional[int], typer.Option(min=0, help="How many GPUs jobs may use together; 0 is the CPU.")] = None,  # noqa: UP045
    dry: Annotated[bool, typer.Option("-n", "--dry-run", help="Only say what would run.")] = False,
) -> None:
    """Measure the models of this folder's manifest. It prints the snakemake command that it runs, and passes other options on."""
    from headgram.run.project import run as run_snakemake

    raise SystemExit(run_snakemake(cores, gpus, dry, more.args))


@app.command()
def plan(cost: Annotated[bool, typer.Option("--cost", help="Also estimate what each stage costs on GPUs.")] = False) -> None:
    """Say how many jobs the locked models of this folder take. It runs nothing."""
    from headgram.run.startup import planned
    from headgram.study.cost import costs, table

    found = planned({})
    print(f"{len(found.models)} models, {len(found.records())} jobs")
    if cost:
        print(table(costs(found)))


@app.command()
def doctor() -> None:
    """Say what this machine has of what headgram needs: devices, folders, Slurm, and packages for each format."""
    from headgram.run.doctor import examine

    wrong = 0
    for finding in examine():
        wrong += finding.state == "wrong"
        # A command to copy stays on one line.
        text = re.sub("pip install .*", lambda command: command[0].replace(" ", "\xa0"), plain(finding.text))
        wrap = textwrap.TextWrapper(80, f"{finding.state:8} ", " " * 9, break_long_words=False, break_on_hyphens=False)
        print(wrap.fill(text).replace("\xa0", " "))
    if wrong:
        raise HeadgramError(f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong here")


@app.command()
def lock(
    manifest: Annotated[Path, typer.Option(help="The table of models.")] = MANIFEST,
    upgrade: Annotated[Optional[list[str]], typer.Option(help="Resolve this model again. May be repeated.")] = None,  # noqa: UP045
) -> None:
    """Pin the content of each model of the manifest that the lock does not have yet."""
    from headgram.study.lock import lock_path, missing_rows, read_lock, write_lock
    from headgram.study.manifest import read_manifest
    from headgram.study.resolve import resolve_all

    table = read_manifest(manifest)
    names = [row.name for row in table.rows]
    for name in upgrade or []:
        if name not in names:
            raise HeadgramError(f"The manifest {manifest} has no model '{name}'; there are: {', '.join(names)}.")
    missing = missing_rows(table.rows, read_lock(lock_path(manifest)))
    chosen = [row for row in table.rows if row in missing or row.name in (upgrade or [])]
    resolved, problems = resolve_all(chosen, progress=lambda line: print(plain(line), file=sys.stderr))
    if resolved:
        write_lock(lock_path(manifest), resolved)
    table.check(*problems)
    print(f"{plain(lock_path(manifest))}: {len(chosen)} locked, {len(names) - len(chosen)} already locked")


@app.command()
def null(
    model: Annotated[str, typer.Argument(help="A model of the manifest.")],
    seed: Annotated[int, typer.Option(min=1, max=999_999, help="Another number gives another twin.")] = 1,
    manifest: Annotated[Path, typer.Option(help="The table of models.")] = MANIFEST,
) -> None:
    """Add a model's random twin to the manifest, as a control: heads keep their spectra, but are turned at random."""
    from headgram.study.manifest import add_twin

    name = add_twin(manifest, model, seed)
    print(plain(f"{manifest}: added '{name}'; the next run measures it as any other model"))


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A hub id, folder, .safetensors, .gguf or torch file, or package:NAME/PATH.")],
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")] = None,  # noqa: UP045
) -> None:
    """Show what a checkpoint holds, without reading its weights."""
    from rich.console import Console
    from rich.table import Table

    from headgram.described import layer_ranges
    from headgram.proofs.adopt import open_or_derive

    checkpoint, derived, _ = open_or_derive(source, revision)
    with checkpoint:
        location = checkpoint.location
        table = Table("stack", "layers", "heads", "key heads", "rank", "width", "stored as", "q/k bytes")
        for stack in checkpoint.stacks:
            numbers = [str(value) for value in (stack.heads, stack.kv_heads, stack.rank, stack.hidden)]
            table.add_row(stack.name, layer_ranges(stack.layers), *numbers, plain(stack.dtype), f"{stack.qk_bytes:,}")
        total = sum(location.size(name) for name in location.weights)
        share = sum(stack.qk_bytes for stack in checkpoint.stacks) / total
    console = Console(markup=False, emoji=False, highlight=False)
    how = " (derived: the layout that is proven for its unknown type)" if derived else ""
    commit = f", commit {location.commit}" if location.commit else ""
    console.print(plain(source), style="bold", end="")
    console.print(plain(f": {checkpoint.architecture}{how}, {location.format}{commit}"))
    console.print(table)
    said = ["each tensor is read from the file that the index names for it"] if location.choice.index is not None else []
    said += checkpoint.remarks
    said += [f"{stack.name}: {note}" for stack in checkpoint.stacks for note in dict.fromkeys(stack.notes.values())]
    said += [f"not read, since these were found first: {', '.join(others)}"] if (others := location.choice.passed_over) else []
    console.print(*map(plain, said), sep="\n", end="\n" if said else "")
    console.print(f"{len(location.weights)} weight file(s), {total:,} bytes; q and k are {share:.1%} of them")


_Results = Annotated[Path, typer.Option(help="The results folder.")]
_Stack = Annotated[Optional[str], typer.Option(help="Which stack. Without it, what the command's description says.")]  # noqa: UP045
_Circuit = Annotated[str, typer.Option(help="What heads look for (qk), what they move (ov), or another form that was measured.")]
_AnyCircuit = Annotated[Optional[str], typer.Option(help="qk, ov or another form. Without it, all that both have.")]  # noqa: UP045
_Where = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="COLUMN=VALUE: only models of a lineage, a step or another label of the manifest. May be repeated."),
]
_Top = Annotated[int, typer.Option(min=1, help="Rows of each list of heads.")]


@contextlib.contextmanager
def _opened(results: Path, where: list[str] | None) -> Iterator[Atlas]:
    """The atlas of the models that are asked for; whatever ends its reading is said to be damage, if there is any."""
    from headgram.atlas.reader import open_atlas
    from headgram.atlas.verify import blamed_on_damage

    wanted: dict[str, list[str | float]] = {}
    for text in where or []:
        column, sign, value = text.partition("=")
        if not sign:
            raise HeadgramError(f"--where {text}: write COLUMN=VALUE, such as --where lineage=pythia-70m")
        wanted.setdefault(column, []).append(value)
        with contextlib.suppress(ValueError):
            wanted[column].append(float(value))
    with blamed_on_damage(results):
        atlas = open_atlas(results)
        yield atlas.where(**wanted) if wanted else atlas


@app.command()
def show(
    model: Annotated[Optional[str], typer.Argument(help="A measured model. Without it, a line for each model.")] = None,  # noqa: UP045
    results: _Results = Path("results"),
    stack: _Stack = None,
    circuit: _Circuit = "qk",
    head: Annotated[Optional[str], typer.Option(help="LAYER.HEAD, such as 16.0: only this head.")] = None,  # noqa: UP045
    where: _Where = None,
    top: _Top = 5,
) -> None:
    """Show a measured model: its layers, its most and least symmetric heads, and its strongest couplings, for all stacks.

    With --head, show one head of the first stack or of --stack: its numbers, heads like it, heads that feed or read it, tokens.
    """
    from headgram.atlas.display import console, show_head, show_model, show_models

    if head is not None and model is None:
        raise HeadgramError("--head needs a model: write `headgram show MODEL --head LAYER.HEAD`")
    if head is not None and not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", head):
        raise HeadgramError(f"--head names a head of a model as LAYER.HEAD, such as 16.0, not {head!r:.60}")
    with _opened(results, where) as atlas:
        if model is None:
            show_models(atlas, console())
        elif head is None:
            show_model(atlas, model, stack, circuit, top, console())
        else:
            layer, index = map(int, head.split("."))
            show_head(atlas, model, stack or atlas.stacks(model, circuit)[0], circuit, layer, index, top, console())


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="A measured model.")],
    after: Annotated[str, typer.Argument(help="A later one with the same layers and heads, such as another checkpoint.")],
    results: _Results = Path("results"),
    stack: _Stack = None,
    circuit: _AnyCircuit = None,
    top: _Top = 10,
    out: Annotated[Optional[Path], typer.Option(help="Also write a row per head to this CSV file.")] = None,  # noqa: UP045
) -> None:
    """Show which heads moved between two measured models: cosines, overlaps and numbers, for all stacks and circuits."""
    from headgram.atlas.compare import compare as compare_models
    from headgram.atlas.display import console, show_comparison
    from headgram.atlas.export import harmless
    from headgram.results.files import write_text

    with _opened(results, None):
        comparison = compare_models(before, after, results, stack, circuit)
        show_comparison(comparison, top, console())
    if out:
        write_text(out, harmless(comparison.heads).to_csv(index=False))
        print(plain(f"wrote {out}"))


@app.command()
def export(
    models: Annotated[Optional[list[str]], typer.Argument(help="Measured models. Without them, all.")] = None,  # noqa: UP045
    to: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("export"),
    format: Annotated[
        Literal["csv", "netcdf"],
        typer.Option(help="CSV: a file for each table. NetCDF: a file for each model, with a group for each circuit and stack."),
    ] = "csv",
    results: _Results = Path("results"),
    where: _Where = None,
) -> None:
    """Write all tables of the atlas as CSV or NetCDF."""
    from headgram.atlas.export import export_csv, export_netcdf

    with _opened(results, where) as atlas:
        for model in models or []:
            atlas.stacks(model)  # refuse an unknown name before anything is written
        paths = {"csv": export_csv, "netcdf": export_netcdf}[format](atlas, list(dict.fromkeys(models or atlas.models)), to)
    print(plain(f"wrote {', '.join(str(path) for path in paths)}"))


@app.command()
def verify(
    results: Annotated[Path, typer.Argument(help="The results folder.")] = Path("results"),
    manifest: Annotated[Path, typer.Option(help="Its lock says which checkpoints are meant. It may be missing.")] = MANIFEST,
    repair: Annotated[bool, typer.Option("--repair", help="Let the next run make again what is wrong.")] = False,
) -> None:
    """Check every artifact again: bytes, schemas, keys, its checkpoint, and what the plan asks for. Name what is wrong."""
    from headgram.atlas.repair import repair as prepare
    from headgram.atlas.verify import Finding
    from headgram.atlas.verify import verify as find
    from headgram.results.asked import asked_for
    from headgram.run.startup import asked_by_study
    from headgram.study.lock import Lock, lock_path, read_lock

    lock, unread = Lock(), []
    try:
        lock = read_lock(lock_path(manifest))
    except HeadgramError as error:
        unread = [Finding(str(error), None, "you")]
    keys = asked_by_study(results) or asked_for(results) or {}
    files, findings = find(results, lock, keys)
    findings = unread + findings
    for finding in findings:
        _say(finding.sentence)
    wrong = f"{results}: {len(findings)} thing{'s are' if len(findings) > 1 else ' is'} wrong"
    if not findings:
        print(f"{plain(results)}: {files} files, all as they were written")
    elif all(finding.mended_by == "you" for finding in findings):
        raise HeadgramError(f"{wrong}: each line above says what to do")
    elif not repair:
        there = [] if results == Path("results") else [str(results)]
        listed = [] if manifest == MANIFEST else ["--manifest", str(manifest)]
        command = shlex.join(["headgram", "verify", *there, *listed, "--repair"])
        raise HeadgramError(f"{wrong}: run `{command}`, then `headgram run`, which makes it anew")
    elif left := prepare(results, findings, keys):
        raise HeadgramError(f"{wrong}, and the next run does not mend all of it:", *(finding.sentence for finding in left))
    else:
        print(f"{plain(wrong)}: `headgram run` makes it anew")


@app.command()
def measure(
    model: Annotated[str, typer.Option(help="A hub id, folder, .safetensors, .gguf or torch file, or package:NAME/PATH.")],
    out: Annotated[Path, typer.Option(help="The JSON to write; the directions go to NAME-eigdirs.pt beside it.")],
    topk: Annotated[int, typer.Option(min=1, help="Directions per head.")] = 8,
    revision: Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")] = None,  # noqa: UP045
    stack: Annotated[Optional[str], typer.Option(help="Which stack; the first if not given.")] = None,  # noqa: UP045
    dtype: Annotated[Literal["stored", "bfloat16", "float32"], typer.Option(help="What weights are rounded to.")] = "bfloat16",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
) -> None:
    """Measure one model in one process, and write the original script's two files."""
    from headgram.measure import measure_model
    from headgram.results.original import directions_path

    measure_model(model, out, topk, revision, stack, dtype, device)
    print(plain(f"wrote {out} and {directions_path(out)}"))


@app.command()
def adopt(model_type: Annotated[str, typer.Argument(help="A type that transformers knows and headgram does not.")]) -> None:
    """Find known types with the layout of an unknown one. Proves each on tiny random models."""
    from headgram.families.registry import families
    from headgram.proofs.adopt import representative
    from headgram.proofs.prove import adopt as prove_in_families

    first = {family.name: representative(family) for family in families()}
    proofs = prove_in_families(model_type)
    for proof in proofs:
        known = first[proof.family]
        if proof.ok:
            print(f"'{model_type}' has the layout of '{known}' (largest residual {proof.residual:.0e}): set model_type = {known}")
        else:
            _say(f"'{model_type}' has tensors like those of '{known}', but {proof.problem}")
    if not any(proof.ok for proof in proofs):
        raise HeadgramError(
            f"no known layout is proven for '{model_type}': describe its own in src/headgram/families/, and its tiny "
            "configuration in src/headgram/proofs/tiny_models.toml, until `headgram prove` agrees"
        )


@app.command()
def prove(
    model_types: Annotated[Optional[list[str]], typer.Argument(help="Model types; all that are known if none is given.")] = None,  # noqa: UP045
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Prove the registry: compare headgram's weights with the scores of tiny random models, built by transformers."""
    from headgram.proofs.prove import COLUMNS, known_types, markdown
    from headgram.proofs.prove import prove as prove_type

    proofs = []
    for model_type in model_types or known_types():
        proofs.append(prove_type(model_type))
        if problem := proofs[-1].problem:
            _say(f"{model_type}: {problem}")
    if as_markdown:
        print("\n".join(markdown(proofs)))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(*COLUMNS)
        for proof in proofs:
            table.add_row(*proof.cells)
        Console().print(table)
    if not all(proof.ok for proof in proofs):
        raise SystemExit(1)
