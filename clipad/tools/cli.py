"""The command line. Heavy imports stay inside the commands, so that ``clipad --help`` answers at once."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import click

from clipad import __version__

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
existing = click.Path(exists=True, path_type=Path)
rate = click.FloatRange(0, 0.25, min_open=True)
neighbours = click.Choice(["no", "alone", "added"])
detectors = click.Choice(["sdp", "sdp_plus", "winclip", "clip_surgery", "direct"])


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="clipad", message="%(prog)s %(version)s")
def app() -> None:
    """CLIP-AD (arXiv 2311.00453) step by step: run the notebooks, check data and machine.

    \b
    First steps:
      clipad doctor              what this machine has and lacks, with the fix for each fault
      clipad run 00              execute notebooks/00_*.ipynb on the shipped model and images
      clipad run --all           execute every notebook
      clipad params 00           what can be set in a notebook, and to what
      clipad detect photo.jpg --object "metal nut"
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does


@app.command()
@click.argument("notebook", required=False)
@click.option("--all", "every", is_flag=True, help="Run every notebook, in order.")
@click.option("--preset", help="demo (shipped, offline, minutes) or paper (published protocol).")
@click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter.")
@click.option("-y", "texts", multiple=True, metavar="YAML", help="Parameters: lists, mappings.")
@click.option("-f", "files", multiple=True, type=existing, help="A YAML file of parameters.")
@click.option("--output-dir", help="Folder of the results, not outputs/<preset>-<dataset>.")
def run(notebook, every, preset, pairs, texts, files, output_dir) -> None:
    """Execute a notebook. NOTEBOOK: its first characters (03), its name, or a file.

    Wrong parameters are refused before it starts; one left empty ("" or 0) means what the preset says; relative paths
    count from here. With --all a parameter goes to the notebooks that have it, a failure does not stop the others, and
    all claims come on one page (claims.md, claims.csv) beside the executed copies.

    \b
    Examples:
      clipad run 00 --preset paper -p data_root ~/data/mvtec
      clipad run 00 -y 'categories: [screw, nut]'
      clipad run --all -f my_settings.yaml

    Exit code: 0 it ran, or says why it skips, 1 it failed, 2 wrong usage, 130 stopped; the same command continues.
    """
    from clipad.tools.claims import write_claims
    from clipad.tools.notebooks import find_notebook, notebook_paths
    from clipad.tools.parameters import read_parameters
    from clipad.tools.runner import plan, run_notebook

    runs = []
    with one_line_errors():
        if every == (notebook is not None):
            raise ValueError("name one notebook, as in `clipad run 00`, or give --all")
        paths = notebook_paths() if every else [find_notebook(notebook)]
        values = read_parameters(pairs, texts, files) | ({"preset": preset} if preset else {})
        for path, own in plan(paths, values):
            done = run_notebook(path, own, output_dir)
            said = f"{done.notebook}: {done.status} after {done.seconds / 60:.1f} min, {done.output_path}"
            click.echo(f"{said}\n  {done.reason}".rstrip(), err=done.status == "failed")
            runs.append(done)
    failed = [run.notebook for run in runs if run.status == "failed"]
    if every:
        records = [run.output_path.with_suffix(".json") for run in runs if run.status == "ok"]
        if page := write_claims(filter(Path.is_file, records), runs[0].output_path.parent):
            click.echo(f"what was found: {page}")
        click.echo(f"{len(runs)} notebooks, failed: {', '.join(failed) or 'none'}")
    _exit_if(failed)


@app.command()
@click.argument("path", metavar="IMAGE|FOLDER", type=existing)
@click.option("--object", "object_name", required=True, help='What they show: "metal nut".')
@click.option("--normal", type=existing, help="A folder of flawless images of the same product.")
@click.option(
    "--false-alarms", type=rate, default=0.05, help="Share of flawless images called bad."
)
@click.option("--normal-folder", help="Sub-folders of this name hold flawless images.")
@click.option("--neighbours", type=neighbours, default="no", help="Maps by nearest flawless patch.")
@click.option("--tiles", type=click.IntRange(1, 8), default=1, help="N: also in N x N pieces.")
@click.option("--detector", type=detectors, default="sdp")
@click.option("--model", default="demo", help="An open_clip model; demo: for the shipped pictures.")
@click.option("--pretrained", help="Its weights: an open_clip tag or a checkpoint file.")
@click.option("--layers", type=existing, help="Linear layers, for sdp_plus.")
@click.option("--prompts", type=existing, help="A YAML file of sentences of your own.")
@click.option("--device", help="cpu, cuda, cuda:1, mps, xpu; a GPU if there is one.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("detections"))
def detect(
    path, object_name, normal, normal_folder, detector, model, pretrained, layers, prompts, device,
    out, false_alarms, neighbours, tiles,
) -> None:  # fmt: skip
    """Find anomalies in images of your own: a verdict (good, check, bad), a region and a report for each.

    Writes report.html, scores.csv, scores.json and folders of pictures (masks/: regions at native size) to --out.
    Flawless images (--normal) give scale, threshold and verdicts: about the share --false-alarms of such images is
    called bad; 0.05 takes at least 19 of them. Without them images are only ranked. --normal-folder names sub-folders
    that hold flawless images, in the folder (for labels, which are never guessed) and in --normal (there . stands for
    all). --neighbours puts the distance to the nearest patch of the flawless images in place of the detector's map
    (alone), or adds it (added). --tiles finds small defects in large images.

    \b
    Examples:
      clipad detect photos/ --object "metal nut" --normal flawless/ --out found \\
          --model ViT-B-16-plus-240 --pretrained laion400m_e31
      clipad detect labelled/ --normal-folder ok --object pill --normal flawless/

    Exit code: 0 all images were read, 1 some could not be, 2 wrong usage, 130 stopped; the same command continues.
    """
    with one_line_errors():
        from clipad.studies.inspection import alarms_allowed
        from clipad.tools.photographs import collect

        images = collect(path, normal, normal_folder or "")
        if normal:  # before the model is loaded
            alarms_allowed(len(images.flawless), false_alarms)
        if model != "demo" and not pretrained:
            raise ValueError(f"--model {model} needs --pretrained: an open_clip tag or a file")
        from clipad.backbone import load_backbone
        from clipad.prompts import load_prompts
        from clipad.studies.experiments import make_detector
        from clipad.tools.detect import detect as run_detection
        from clipad.tools.report import summary

        backbone = load_backbone(model, pretrained, device)
        own = {"prompts": load_prompts(prompts)} if prompts else {}
        chosen = make_detector(detector, backbone, layers, **own)
        report = run_detection(chosen, images, object_name, out, false_alarms, neighbours, tiles)
    click.echo(f"model: {backbone.name}, {backbone.pretrained}")
    click.echo("\n".join(summary(report, out)))
    if report.warning:
        click.secho(report.warning, fg="red", bold=True, err=True)
    _exit_if(report.unread)


@app.command()
@click.argument("notebook")
def params(notebook) -> None:
    """Show what can be set in a notebook: name, type, default, meaning and allowed values."""
    from clipad.tools.notebooks import find_notebook, inspect_parameters

    with one_line_errors():
        found = inspect_parameters(find_notebook(notebook)).values()
    for p in found:
        default = json.dumps(p.default, ensure_ascii=False)
        click.echo(f"{p.name:16} {p.type:10} {default:8} {p.help}")


@app.command()
@click.argument("file", metavar="SWEEP.YAML", type=existing)
@click.option("--workers", type=click.IntRange(min=1), help="Local processes, without --scheduler.")
@click.option("--scheduler", metavar="ADDRESS", help="A running Dask cluster, tcp://10.0.0.1:8786.")
@click.option("--output-dir", help="Folder of the results, not outputs/sweep-<name of the file>.")
def sweep(file, workers, scheduler, output_dir) -> None:
    """Run a grid of notebooks or evaluations on Dask. The file holds one block or a list of blocks; a list is an axis:

    \b
      evaluate: {detectors: [sdp, direct], rvs: [mean, dbscan], categories: [screw, nut]}
    or
      notebook: "05"
      parameters: {seed: [0, 1], categories: [[screw, nut]]}

    Results: table.csv with a row per run and number, runs/ with a folder per run. Without --workers: a local process on
    each GPU that the runs may use, else one per core and at most 4.

    Exit code: 0 all runs ended well, 1 some failed, 2 wrong usage, 130 stopped; the same command continues.
    """
    with one_line_errors():
        from clipad.io.files import REPOSITORY
        from clipad.tools import sweep as sweeps

        folder = Path(output_dir or REPOSITORY / "outputs" / f"sweep-{file.stem}").expanduser()
        records = sweeps.sweep(sweeps.plan(file), folder, workers, scheduler)
    failed = sum(record["status"] == "failed" for record in records)
    click.echo(f"{len(records)} runs, {failed} failed; see {folder / 'table.csv'}")
    _exit_if(failed)


@app.command()
def doctor() -> None:
    """What keeps the notebooks from running here, each fault with its fix, after PyTorch's account of system and
    devices. Exit code: 1 when there is a fault."""
    from clipad.tools.doctor import diagnose

    subprocess.run([sys.executable, "-m", "torch.utils.collect_env"], check=False)
    faults = list(diagnose())
    for fault, fix in faults:
        click.echo(f"{fault}\n  fix: {fix}")
    _exit_if(faults)
    click.echo("no fault found: the notebooks run here")


@app.group()
def data() -> None:
    """Look at data sets."""


@data.command("check")
@click.argument("name")
@click.option("--root", type=existing, help="The folder of the data set; the demo's need none.")
@click.option("--normal-folder", default="", help="For folder: name of the normal sub-folders.")
def check_data(name, root, normal_folder) -> None:
    """Read every image and mask of a data set: layout, counts, unreadable files, masks that miss or look wrong.

    NAME: mvtec, visa, isic, clinicdb, headct, brainmri, folder, demo or demo_aux. --normal-folder none: there are no
    normal images. Exit code: 1 when there are problems.

    \b
    Examples:
      clipad data check mvtec --root ~/data/mvtec
      clipad data check folder --root parts/ --normal-folder pass
    """
    from clipad.tools.check_data import check_dataset

    with one_line_errors():
        report = check_dataset(name, root, normal_folder)
    click.echo(str(report))
    _exit_if(not report.ok)


@contextlib.contextmanager
def one_line_errors():
    """Bad input ends with one line on stderr: exit code 2 for what was typed, 1 for what the system refused."""
    try:
        yield
    except (ValueError, OSError) as error:
        click.echo(f"clipad: {' '.join(str(error).split())}", err=True)
        sys.exit(1 if isinstance(error, OSError) else 2)
    except KeyboardInterrupt:
        click.echo("clipad: stopped; the same command continues", err=True)
        sys.exit(130)


def _exit_if(failed) -> None:
    if failed:
        sys.exit(1)
