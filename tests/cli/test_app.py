"""The commands: what goes wrong is said in a line, with the exit code that is promised, before any work."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import REPORT, HostStandIn, qft, write_images
from torch import Tensor, nn

from qft_plugin import QFTConfig, QFTWarning, save_config
from qft_plugin.cli import app as commands
from qft_plugin.cli.saying import check_writable
from qft_plugin.report.data import Report

NET = "tests_cli_net"


class Net(nn.Module):
    """One convolution of three channels."""

    def __init__(self) -> None:
        """Make it."""
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.conv(x)


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder with a module of the user's, and images."""
    (tmp_path / f"{NET}.py").write_text(
        "import torch\n"
        "from test_app import Net\n"
        "number = 3\n"
        "def make(): return Net().eval()\n"
        "def broken(): raise ValueError('no weights')\n"
        "def nothing(): return 3\n"
        "def batches(): return (torch.randn(4, 3, 12, 10) for _ in range(3))\n"
        "def labelled(): return [[torch.randn(4, 3, 12, 10), torch.zeros(4, dtype=torch.int64)]]\n"
        "def empty(): return []\n"
    )
    write_images(tmp_path / "images", 5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    yield tmp_path
    sys.modules.pop(NET, None)  # the next test has another one


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostStandIn:
    """Let a stand-in be the host."""
    stand_in = HostStandIn()
    monkeypatch.setitem(sys.modules, "qft_plugin.brevitas", stand_in)
    return stand_in


def test_quantize_passes_on_what_it_was_told(host: HostStandIn, user: Path) -> None:
    """Model, images and settings reach the host; the result is said at the end."""
    done = qft(
        *("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--images", 4, "--seed", 5),
        *("--weight-bits", 3, "--per-tensor", "--images-fed", 64, "--batch", 3, "--size", "8x6", "--checkpoint", "job"),
    )
    assert done.exit_code == 0, done.output
    (_, model, images, config, _), (_, _, path, example, _) = host.calls
    assert type(model).__name__ == "Net"
    assert images.shape == (4, 3, 8, 6)
    assert example.shape == (3, 3, 8, 6)
    settings = QFTConfig(weight_bits=3).hardware
    assert (config.weight_bits, config.hardware.rescale, settings.rescale) == (3, "layerwise", "channelwise")
    assert (config.finetune.max_images, config.finetune.images_fed, config.finetune.seed) == (4, 64, 5)
    assert host.kept_in == Path("job")
    assert path == Path("net.onnx")
    assert "net.onnx: 1 bytes, 2 quantized weights, each proved" in done.output
    assert "1 of 1 convolutions" in done.output


def test_data_that_can_be_read_once_is_read_whole(host: HostStandIn) -> None:
    """The batch that the model was tried on is not lost."""
    assert qft("quantize", f"{NET}:make", "--data", f"{NET}:batches", "--out", "net.onnx").exit_code == 0
    assert host.calls[0][2].shape == (12, 3, 12, 10)


def test_settings_come_from_a_file(host: HostStandIn) -> None:
    """What the command says wins."""
    save_config(QFTConfig(weight_bits=5, equalize=False), "qft.json")
    common = ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--config", "qft.json")
    assert qft(*common).exit_code == 0
    assert qft(*common, "--weight-bits", 3).exit_code == 0
    assert [(c[3].weight_bits, c[3].equalize) for c in host.calls if c[0] == "quantize"] == [(5, False), (3, False)]


def test_quiet_says_nothing(host: HostStandIn) -> None:
    """But the file is there."""
    done = qft("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    assert Path("net.onnx").is_file()


def test_reports_are_written(host: HostStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of the job is written as JSON and as a page, which shows the file too."""
    monkeypatch.setattr(Report, "save_html", page_of_file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # what pages are made with
    common = ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx")
    done = qft(*common, "--json", "r.json", "--report", "r.html")
    assert done.exit_code == 0, done.output
    assert Report.from_json(Path("r.json").read_text()) == REPORT
    assert Path("r.html").read_text() == "<p>Net of 1 bytes</p>"


def page_of_file(report: Report, path: Path, *, file: object = None) -> None:
    """Write the model of a report, and how large its file is."""
    size = "" if file is None else f" of {file.bytes} bytes"  # type: ignore[attr-defined]
    Path(path).write_text(f"<p>{report.model}{size}</p>", encoding="utf-8")


def test_jobs_show_themselves(host: HostStandIn) -> None:
    """Progress and report are what the job shows; what the command says of them is the file. --quiet reaches all."""
    common = ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx")
    said, hushed = qft(*common), qft(*common, "--quiet")
    assert [call[-1] for call in host.calls] == [True, True, False, False]
    assert "net.onnx: 1 bytes" in said.output
    assert hushed.output == ""


def test_inspect_shows_what_the_host_finds(host: HostStandIn) -> None:
    """It is called with the model, the images and the settings."""
    common = ("inspect", f"{NET}:make", "--data", "images", "--host", "brevitas")
    done = qft(*common, "--json", "i.json", "--html", "i.html")
    assert (done.exit_code, done.stdout) == (0, "Net 5 4\n")
    assert "loading brevitas ..." in done.stderr
    assert json.loads(Path("i.json").read_text()) == "Net 5 4"
    assert Path("i.html").read_text() == "<p>Net 5 4</p>"
    assert qft(*common, "--quiet").output == ""
    assert host.calls == [("inspect", True), ("inspect", False)]


@pytest.mark.parametrize(("installed", "chosen"), [(True, "nncf"), (False, "brevitas")])
def test_inspect_takes_the_host_that_is_there(
    host: HostStandIn, monkeypatch: pytest.MonkeyPatch, *, installed: bool, chosen: str
) -> None:
    """NNCF, where it is installed and nothing is asked for."""
    monkeypatch.setattr(commands, "find_spec", lambda _: installed or None)
    monkeypatch.setattr(commands, "loaded", lambda asked: asked)
    monkeypatch.setattr(commands, "inspected", lambda asked, *_, **__: asked.value)
    assert qft("inspect", f"{NET}:make", "--data", "images").stdout == f"{chosen}\n"


WRONG = {
    "no module": ("quantize", "net.pt", "--data", "images", "--out", "net.onnx"),
    "no data": ("quantize", f"{NET}:make", "--data", "nowhere", "--out", "net.onnx"),
    "no such suffix": ("quantize", f"{NET}:make", "--data", "images", "--out", "net.bin"),
    "another host": ("quantize", f"{NET}:make", "--data", "images", "--out", "net.xml", "--host", "brevitas"),
    "no folder": ("quantize", f"{NET}:make", "--data", "images", "--out", "no/net.onnx"),
    "another report": ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--json", "r.txt"),
    "a format of IR": ("quantize", f"{NET}:make", "--data", "images", "--out", "net.xml", "--format", "qonnx"),
    "a storage of ONNX": ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--storage", "i8"),
    "size": ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--size", "8y8"),
    "resize alone": ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--resize", "9"),
    "resize below size": (
        "quantize",
        f"{NET}:make",
        "--data",
        "images",
        "--out",
        "net.onnx",
        "--size",
        9,
        "--resize",
        8,
    ),
    "mean": ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--mean", "1,2"),
    "std": ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--std", "0"),
    "no options": ("quantize", f"{NET}:make"),
    "bits": ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--weight-bits", "1"),
}
SAID = {
    "no module": "MODEL should be package.module:function or a file .onnx. Found 'net.pt'",
    "no data": "--data should be a folder of images or package.module:function. Found 'nowhere'",
    "no such suffix": "--out should end with .xml (NNCF, OpenVINO) or .onnx (Brevitas). Found 'net.bin'",
    "another host": "--host should be nncf for a .xml file. Found brevitas",
    "no folder": "should be a file in a folder that can be written to",
    "another report": "r.txt should end with .json",
    "a format of IR": "--format is of .onnx files",
    "a storage of ONNX": "--storage is of .xml files",
    "size": "--size should be H or HxW in pixels",
    "resize alone": "--resize should come with --size",
    "resize below size": "--resize should be at least the size. Found 8 for 9",
    "mean": "--mean should be 1 or 3 numbers",
    "std": "--std should be 1 or 3 numbers above 0",
    "no options": "--data",
    "bits": "--weight-bits",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_end_with_two(host: HostStandIn, name: str) -> None:
    """Each is said with what would be right, and nothing was done."""
    done = qft(*WRONG[name])
    assert done.exit_code == 2
    assert SAID[name] in done.output
    assert "Traceback" not in done.output
    assert host.calls == []


FAILED = {
    "no such module": ("nowhere:make", "images", "nowhere:make should be a function that can be imported from"),
    "no such function": (f"{NET}:other", "images", "Found AttributeError"),
    "no function": (
        f"{NET}:number",
        "images",
        "should be a function without arguments that returns the model. Found int",
    ),
    "no model": (f"{NET}:nothing", "images", "should be a torch.nn.Module"),
    "raises": (f"{NET}:broken", "images", "Error: ValueError: no weights\nRun it with --debug"),
    "labels": (f"{NET}:make", f"{NET}:labelled", "labels are not needed"),
    "no batch": (f"{NET}:make", f"{NET}:empty", "should give at least one batch. Found none"),
    "no iterable": (f"{NET}:make", f"{NET}:nothing", "should return an iterable of batches. Found int"),
}


@pytest.mark.parametrize("name", FAILED)
def test_a_job_that_cannot_be_done_ends_with_one(host: HostStandIn, name: str) -> None:
    """It says why, without a traceback, before the host is asked for anything."""
    model, data, said = FAILED[name]
    done = qft("quantize", model, "--data", data, "--out", "net.onnx")
    assert done.exit_code == 1, done.output
    assert said in done.output
    assert "Traceback" not in done.output
    assert host.calls == []
    assert not Path("net.onnx").exists()


def test_a_model_that_does_not_take_the_images(host: HostStandIn) -> None:
    """It names the shape and the options that change it."""
    done = qft("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--grey")
    assert done.exit_code == 1
    assert "The model should run on the first batch, [5, 1, 12, 10]" in done.output
    assert "--grey" in done.output


def test_a_broken_image_is_found_before_the_model_is_made(host: HostStandIn) -> None:
    """The first one is decoded at once."""
    Path("images/000.png").write_text("no image")
    done = qft("quantize", f"{NET}:broken", "--data", "images", "--out", "net.onnx")
    assert done.exit_code == 1
    assert "000.png: should be an image" in done.output


def test_settings_that_are_wrong_are_named_with_their_file(host: HostStandIn) -> None:
    """As `load_config` names them."""
    Path("qft.json").write_text('{"wieght_bits": 3}')
    done = qft("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--config", "qft.json")
    assert done.exit_code == 1
    assert "qft.json: QFTConfig should have known settings only. Found 'wieght_bits' (did you mean" in done.output
    save_config(QFTConfig(finetune=None), "start.json")
    common = ("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx", "--config", "start.json")
    assert "finetune should be set for --images-fed and --seed" in qft(*common, "--seed", 1).output
    assert qft(*common, "--images", 2).exit_code == 0
    from_function = ("--data", f"{NET}:batches", "--images", 2)
    assert qft("quantize", f"{NET}:make", "--out", "net.onnx", "--config", "start.json", *from_function).exit_code == 2


def test_a_host_that_is_not_installed_is_refused_first() -> None:
    """With the line that installs it."""
    code = "import sys; sys.modules.update(nncf=None); from qft_plugin.cli.entry import main; main()"
    code = f"from importlib import metadata as m; v = m.version; m.version = lambda n: v('no-' + n); {code}"
    arguments = ["quantize", f"{NET}:broken", "--data", "images", "--out", "net.xml"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install '.[nncf]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_where(host: HostStandIn) -> None:
    """The error itself is raised."""
    done = qft("quantize", f"{NET}:broken", "--data", "images", "--out", "net.onnx", "--debug")
    assert isinstance(done.exception, ValueError)


def test_an_interruption_ends_with_130(host: HostStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves no file."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "quantize", interrupted)
    done = qft("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx")
    assert done.exit_code == 130
    assert "Interrupted" in done.output
    assert sorted(p.name for p in Path.cwd().iterdir() if p.is_file()) == [f"{NET}.py"]


def test_warnings_are_a_line_each(host: HostStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the package; others are for --debug."""

    def warning(model: nn.Module, *_: object, **__: object) -> nn.Module:
        warnings.warn("this is\nnot as asked", QFTWarning, stacklevel=2)
        warnings.warn("of another library", UserWarning, stacklevel=2)
        return model

    monkeypatch.setattr(host, "quantize", warning)
    done = qft("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx")
    assert done.exit_code == 0
    assert "Warning: this is not as asked\n" in done.output
    assert "another library" not in done.output


def test_a_saved_report_becomes_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the report writes is at the place that was asked for."""
    monkeypatch.setattr(Report, "save_html", page_of_file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    Path("r.json").write_text(REPORT.to_json())
    assert qft("report", "r.json", "--html", "r.html").exit_code == 0
    assert Path("r.html").read_text() == "<p>Net</p>"
    assert qft("report", "r.json").stdout == "r.html\n"
    Path("other.json").write_text('{"layers": 3}')
    done = qft("report", "other.json", "--html", "o.html")
    assert done.exit_code == 1
    assert "other.json should be a report that `qft quantize --json` wrote" in done.output
    assert not Path("o.html").exists()
    assert qft("report", "r.json", "--html", "r.txt").exit_code == 2


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    """A folder is no file."""
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(commands.typer.Exit) as ended:
        check_writable(tmp_path / "folder.onnx", ".onnx")
    assert ended.value.exit_code == 2


def test_the_module_runs_as_the_command() -> None:
    """`python -m qft_plugin` is `qft`, and names the exit codes."""
    done = subprocess.run([sys.executable, "-m", "qft_plugin", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "quantize" in done.stdout
    assert "Exit codes" in done.stdout


def test_the_docs_name_options_that_exist() -> None:
    """And all commands."""
    text = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text()
    command = commands.typer.main.get_command(commands.app)
    known = {option for each in command.commands.values() for p in each.params for option in p.opts + p.secondary_opts}
    assert set(re.findall(r"--[a-z][a-z-]*", text)) <= {*known, "--help"}
    assert all(f"## qft {name}" in text for name in command.commands)


def test_missing_packages_name_the_line_that_installs_them() -> None:
    """Without typer there is no command line."""
    code = "import sys; sys.modules['typer'] = None; from qft_plugin.cli.entry import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: For the command line, typer should be installed. Found none. Run, in a")
    assert "'.[cli]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_for_one_image_is_tried_on_one(host: HostStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its example is one image then."""

    def one(self: nn.Module, x: Tensor) -> Tensor:
        assert len(x) == 1
        return x

    monkeypatch.setattr(Net, "forward", one)
    assert qft("quantize", f"{NET}:make", "--data", "images", "--out", "net.onnx").exit_code == 0
    assert host.calls[1][3].shape == (1, 3, 12, 10)
    assert isinstance(host.calls[0][2], torch.Tensor)
