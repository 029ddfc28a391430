"""The commands of `qft`, and their arguments."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from qft_plugin.cli import doctor as health
from qft_plugin.cli.hosts import Format, Host, Order, Storage, host_for, inspected, loaded
from qft_plugin.cli.images import Preparation
from qft_plugin.cli.quantize import quantize_to_file
from qft_plugin.cli.saying import FAILED, check_writable, hushed, said, tell, wrong_use
from qft_plugin.cli.sources import batches_of, check_data_name, check_model_name, model_of
from qft_plugin.config import QFTConfig
from qft_plugin.config_file import load_config
from qft_plugin.errors import ConfigError, DataError
from qft_plugin.files import write_whole
from qft_plugin.packages import require
from qft_plugin.report.data import Report
from qft_plugin.report.display import shown
from qft_plugin.report.progress import phase

EPILOG: Final = "Exit codes: 0 all is well, 1 the job failed, 2 wrong arguments, 130 interrupted."

app = typer.Typer(
    help="4-bit weights at nearly float accuracy by one short finetune without labels (QFT).",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MODEL_HELP: Final = (
    "The float network: package.module:function, a function without arguments that returns it (the current folder can "
    "be imported from), or a file .onnx."
)
DATA_HELP: Final = (
    "Unlabeled images: a folder, searched with all folders in it, or package.module:function, a function without "
    "arguments that returns an iterable of batches of the network's inputs."
)
SIZE_HELP: Final = (
    "Of a folder: crop the middle of H by W pixels, as 224 or 224x160, after the shorter side was resized (see "
    "--resize). Without it images are taken as they are."
)

Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Data = Annotated[str, typer.Option(help=DATA_HELP, show_default=False)]
Config = Annotated[Path | None, typer.Option(help="Settings, .toml or .json; all others are at their defaults.")]
Images = Annotated[
    int | None, typer.Option(min=1, help="Read at most so many images; of a folder, evenly spread ones.")
]
Batch = Annotated[int, typer.Option(min=1, help="Of a folder: images in a batch.")]
Size = Annotated[str | None, typer.Option(help=SIZE_HELP)]
Resize = Annotated[int | None, typer.Option(min=1, help="Of a folder: length of the shorter side before the crop; by default the size over 0.875, as 256 for 224. Bilinear.")]  # fmt: skip  # noqa: E501
Mean = Annotated[str | None, typer.Option(help="Of a folder: subtracted from each channel, as 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(help="Of a folder: each channel is divided by it, as 0.229,0.224,0.225.")]
Scale = Annotated[bool, typer.Option("--scale/--no-scale", help="Of a folder: divide by 255 first, to 0..1.")]
Grey = Annotated[bool, typer.Option("--grey", help="Of a folder: one channel instead of red, green and blue.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say errors and warnings only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from, and the log.")]


@app.command(epilog=EPILOG)
def quantize(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="The result: .xml (NNCF, OpenVINO) or .onnx (Brevitas).")],
    host: Annotated[Host | None, typer.Option(help="By default the one that writes such a file.")] = None,
    form: Annotated[Format, typer.Option("--format", help="Of an .onnx file.")] = Format.qcdq,
    storage: Annotated[Storage, typer.Option(help="Of the weights in an .xml file.")] = Storage.i4,
    config: Config = None,
    images: Images = None,
    images_fed: Annotated[int | None, typer.Option(min=1, help="How many images the finetune shows in total.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the order of the images.")] = None,
    weight_bits: Annotated[int | None, typer.Option(min=2, max=8, help="Bits of the weights.")] = None,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="One scale for each weight tensor.")] = False,
    size: Size = None,
    resize: Resize = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = True,
    grey: Grey = False,
    batch: Batch = 32,
    report: Annotated[Path | None, typer.Option(help="Write the report as a page, .html.")] = None,
    json_report: Annotated[Path | None, typer.Option("--json", help="Write the report as .json.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder in which the job is kept: the same command goes on with it.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a network, and write it to a file that is proved to compute the same."""
    with said(debug=debug):
        chosen = host_for(out, host)
        _check_sources(model, data)
        for path, suffix in ((out, out.suffix), (report, ".html"), (json_report, ".json")):
            if path is not None:
                check_writable(path, suffix)
        if chosen is Host.nncf and form is not Format.qcdq:
            wrong_use("--format is of .onnx files. Leave it out.")
        if chosen is Host.brevitas and storage is not Storage.i4:
            wrong_use("--storage is of .xml files. Leave it out.")
        settings = _settings(config, images, images_fed, seed, weight_bits, per_tensor=per_tensor)
        _check_images(images, data, settings)
        prepare = _preparation(size, resize, mean, std, scale=scale, grey=grey)
        with hushed(quiet):
            with shown(not quiet), phase(f"loading {chosen.value}"):
                loaded(chosen)
            if report is not None:
                require("jinja2", extra="report")
            batches, first = batches_of(data, prepare, batch_size=batch, images=images)
            order = Order(chosen, form, storage, settings, out, report, json_report, checkpoint)
            result = quantize_to_file(order, model, batches, first, quiet=quiet)
        if not quiet:
            tell(result)


@app.command(epilog=EPILOG)
def inspect(
    model: Model,
    data: Data,
    host: Annotated[
        Host | None, typer.Option(help="Whose quantizers are looked at; by default NNCF's, where it is installed.")
    ] = None,
    config: Config = None,
    images: Images = None,
    size: Size = None,
    resize: Resize = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = True,
    grey: Grey = False,
    batch: Batch = 32,
    html: Annotated[Path | None, typer.Option(help="Write it as a page, .html.")] = None,
    json_report: Annotated[Path | None, typer.Option("--json", help="Write it as .json.")] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a job would do with a network, before it is done: layers, bits, and what stays in float and why."""
    with said(debug=debug):
        _check_sources(model, data)
        for path, suffix in ((html, ".html"), (json_report, ".json")):
            if path is not None:
                check_writable(path, suffix)
        settings = _settings(config, images, None, None, None, per_tensor=False)
        _check_images(images, data, settings)
        prepare = _preparation(size, resize, mean, std, scale=scale, grey=grey)
        with hushed(quiet):
            chosen = host or (Host.nncf if find_spec("nncf") is not None else Host.brevitas)
            with shown(not quiet), phase(f"loading {chosen.value}"):
                loaded(chosen)
            batches, first = batches_of(data, prepare, batch_size=batch, images=images)
            found = inspected(chosen, model_of(model, first)[0], batches, settings, quiet=quiet)
            if json_report is not None:
                write_whole(json_report, found.to_json())
            if html is not None:
                found.save_html(html)
        if not quiet:
            tell(str(found))


@app.command(epilog=EPILOG)
def report(
    source: Annotated[Path, typer.Argument(metavar="REPORT", help="A report that `qft quantize --json` wrote.")],
    html: Annotated[
        Path | None, typer.Option(help="Where the page is written, .html; by default beside the report.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a page of a saved report."""
    with said(debug=debug):
        page = source.with_suffix(".html") if html is None else html
        check_writable(page, ".html")
        require("jinja2", extra="report")
        try:
            made: Any = Report.from_json(source.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{source} should be a report that `qft quantize --json` wrote. Found {type(error).__name__}: {error}. "
                "Look at the name of the file."
            ) from error
        made.save_html(page)
        if html is None:
            typer.echo(str(page))


@app.command(epilog=EPILOG)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    debug: Debug = False,
) -> None:
    """Look at what is installed, and say what mends what is wrong; exit code 1 where a host cannot work."""
    with said(debug=debug):
        with hushed(True):
            findings = health.look()
        if as_json:
            typer.echo(json.dumps([f.as_dict() for f in findings], indent=1))
        else:
            typer.echo(health.table(findings))
        if any(f.state is health.State.bad for f in findings):
            raise typer.Exit(FAILED)


def _check_sources(model: str, data: str) -> None:
    check_model_name(model)
    check_data_name(data)


def _check_images(images: int | None, data: str, settings: QFTConfig) -> None:
    if images is not None and settings.finetune is None and not Path(data).is_dir():
        wrong_use("--images should come with a folder, or with a finetune, which stops reading there. Leave it out.")


def _settings(
    config: Path | None,
    images: int | None,
    images_fed: int | None,
    seed: int | None,
    weight_bits: int | None,
    *,
    per_tensor: bool,
) -> QFTConfig:
    """Return the settings of a file, or the defaults, with what the command says in their place."""
    settings = QFTConfig() if config is None else load_config(config)
    asked = {"max_images": images, "images_fed": images_fed, "seed": seed}
    changed: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if settings.finetune is not None:
        settings = replace(settings, finetune=replace(settings.finetune, **changed))
    elif changed.keys() - {"max_images"}:
        raise ConfigError(
            f"{config}: finetune should be set for --images-fed and --seed. Found that there is none. Leave them out."
        )
    if weight_bits is not None:
        settings = replace(settings, weight_bits=weight_bits)
    if per_tensor:
        settings = replace(settings, hardware=replace(settings.hardware, rescale="layerwise"))
    return settings


def _preparation(
    size: str | None, resize: int | None, mean: str | None, std: str | None, *, scale: bool, grey: bool
) -> Preparation:
    pixels = None
    if size is not None:
        numbers = size.lower().split("x")
        if not 1 <= len(numbers) <= 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            wrong_use(f"--size should be H or HxW in pixels, as 224 or 224x160. Found {size!r}.")
        pixels = (int(numbers[0]), int(numbers[-1]))
    if resize is not None and pixels is None:
        wrong_use("--resize should come with --size, which is cut out after it.")
    if resize is not None and pixels is not None and resize < max(pixels):
        wrong_use(f"--resize should be at least the size. Found {resize} for {size}.")
    channels = 1 if grey else 3
    return Preparation(
        pixels, resize, _numbers("--mean", mean, channels), _numbers("--std", std, channels), scale=scale, grey=grey
    )


def _numbers(option: str, text: str | None, count: int) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) not in (1, count) or (option == "--std" and not all(number > 0 for number in found)):
        positive = " above 0" if option == "--std" else ""
        wrong_use(f"{option} should be 1 or {count} numbers{positive} with commas between them. Found {text!r}.")
    return found
