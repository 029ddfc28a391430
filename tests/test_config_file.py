"""Settings in files: they come back as they were, and what is wrong is refused by its name."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qft_plugin import (
    ConfigError,
    EfQAT,
    FinetuneConfig,
    HardwareSpec,
    HostError,
    QFTConfig,
    config_from_dict,
    config_to_dict,
    load_config,
    save_config,
)

CONFIGS = {
    "defaults": QFTConfig(),
    "nested": QFTConfig(
        weight_bits=3,
        layer_bits={"features.0.*": 8, 'odd "name" = [1]': 5},
        activation_range="max",
        sparsity="2:4",
        hardware=HardwareSpec(rescale="layerwise", rescale_factor="power_of_two", bias_bits=24),
        finetune=FinetuneConfig(
            learning_rate=1e-3, loss_at={"layer3": 0.1, "fc": 1 / 3}, blocks=("a", "b"), seed=2**63 - 1
        ),
    ),
    "part": QFTConfig(sparsity=None, finetune=FinetuneConfig(train=EfQAT(mode="cwpn", ratio=0.1))),
    "no finetune": QFTConfig(finetune=None),
    "weights only": QFTConfig(hardware=HardwareSpec(activation_bits=None, doubly_per_channel=True)),
    "one scale": QFTConfig(hardware=HardwareSpec(elementwise_rescale="none", rescale_factor=12), sparsity=0.5),
    "names": QFTConfig(finetune=FinetuneConfig(loss_at=("x", "none"))),
    "a name": QFTConfig(finetune=FinetuneConfig(loss_at="none")),
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a file of settings."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("suffix", [".toml", ".json"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_is_read_back_as_it_was(tmp_path: Path, name: str, suffix: str) -> None:
    """What is written is read to an equal object, None included, and nothing else is left in the folder."""
    path = tmp_path / f"qft{suffix}"
    if suffix == ".toml":
        pytest.importorskip("tomli_w")
    save_config(CONFIGS[name], path)
    assert load_config(path) == CONFIGS[name]
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_at_its_default_is_left_out() -> None:
    """A file holds what was chosen."""
    assert config_to_dict(QFTConfig()) == {}
    chosen = QFTConfig(weight_bits=3, finetune=FinetuneConfig(train=EfQAT()))
    assert config_to_dict(chosen) == {"weight_bits": 3, "finetune": {"train": {}}}


def test_every_field_can_be_read() -> None:
    """Each setting of each class is known by its name, with its default as the value."""

    def everything(config: object) -> dict[str, object]:
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]
        return {k: everything(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}

    full = QFTConfig(finetune=FinetuneConfig(train=EfQAT(ratio=1)))
    assert config_from_dict(everything(full)) == full


def test_lists_become_tuples() -> None:
    """A list of names is read as a tuple of the same names."""
    settings = config_from_dict({"finetune": {"blocks": ["a", "b"]}}).finetune
    assert settings is not None
    assert settings.blocks == ("a", "b")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"wieght_bits": 4},
            "QFTConfig should have known settings only. Found 'wieght_bits' .did you mean 'weight_bits'",
        ),
        ({"hardware": {"bits": 4}}, "HardwareSpec .* Found 'bits'"),
        (
            {"finetune": {"image_fed": 1, "sed": 2}},
            "'image_fed' .did you mean 'images_fed'.*'sed' .did you mean 'seed'",
        ),
        ({"finetune": {"train": {"ration": 1}}}, "EfQAT .*did you mean 'ratio'"),
        ({"zzz": 1}, "Found 'zzz' .known are weight_bits, "),
        ({"weight_bits": "4"}, "QFTConfig.weight_bits should be a whole number. Found '4'"),
        ({"weight_bits": 4.0}, "QFTConfig.weight_bits should be a whole number. Found 4.0"),
        ({"equalize": 1}, "QFTConfig.equalize should be True or False. Found 1"),
        ({"hardware": 3}, "QFTConfig.hardware should be a table of settings by name. Found 3"),
        ({"hardware": None}, "QFTConfig.hardware should be a HardwareSpec. Found None"),
        ({"finetune": {"train": "all"}}, "FinetuneConfig.train should be a table of settings by name. Found 'all'"),
        ({"layer_bits": {"a": 99}}, "QFTConfig.layer_bits should map names to 2 to 8 bits"),
        (["weight_bits"], "QFTConfig should be a table of settings by name"),
    ],
)
def test_what_is_wrong_is_refused_by_name(written: Callable[[str, str], Path], data: object, said: str) -> None:
    """The message begins with the file, then names class, field and what was found."""
    with pytest.raises(ConfigError, match=rf"qft\.json: .*{said}"):
        load_config(written("qft.json", json.dumps(data)))


def test_what_is_wrong_in_toml_is_refused_by_name(written: Callable[[str, str], Path]) -> None:
    """Likewise of the other format, in a table of a table."""
    text = '[finetune.train]\nmode = "cwpl"\nrato = 0.1\n'
    with pytest.raises(ConfigError, match=r"qft\.toml: EfQAT should .* Found 'rato' .did you mean 'ratio'"):
        load_config(written("qft.toml", text))


@pytest.mark.parametrize("name", ["qft.toml", "qft.json"])
def test_a_broken_file_is_told_with_its_place(written: Callable[[str, str], Path], name: str) -> None:
    """What the parser says is in the message."""
    with pytest.raises(ConfigError, match=rf"{name}: should be a .* file\. Found .*line 1"):
        load_config(written(name, '{"a": '))


def test_files_that_are_not_there_or_are_no_settings(tmp_path: Path) -> None:
    """Reading and writing name the file."""
    with pytest.raises(ConfigError, match=r"no\.toml: should be a file of settings\. Found none"):
        load_config(tmp_path / "no.toml")
    with pytest.raises(ConfigError, match=r"should end with \.toml or \.json. Found '\.yaml'"):
        load_config(tmp_path / "qft.yaml")
    with pytest.raises(ConfigError, match="should be a file in a folder that can be written to"):
        save_config(QFTConfig(), tmp_path / "nowhere" / "qft.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption in the middle leaves what was there, and no draft."""
    path = tmp_path / "qft.json"
    save_config(QFTConfig(weight_bits=3), path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_config(QFTConfig(), path)
    monkeypatch.undo()
    assert load_config(path) == QFTConfig(weight_bits=3)
    assert list(tmp_path.iterdir()) == [path]


def test_the_settings_in_the_docs_are_read(written: Callable[[str, str], Path]) -> None:
    """As they are printed."""
    text = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text()
    block = text.split("```toml\n")[1].split("```")[0]
    expected = QFTConfig(
        layer_bits={"features.0.*": 8},
        hardware=HardwareSpec(rescale="layerwise"),
        finetune=FinetuneConfig(images_fed=12288, loss_at=("layer3", "fc"), train=EfQAT(mode="cwpl", ratio=0.05)),
    )
    assert load_config(written("qft.toml", block)) == expected


def test_a_function_cannot_be_written() -> None:
    """It is refused by the name of its field."""

    @dataclass(frozen=True)
    class Settings:
        evaluate: Callable[[], float] | None = None

    assert config_to_dict(Settings()) == {}
    with pytest.raises(ConfigError, match=r"Settings\.evaluate should be None to be written to a file"):
        config_to_dict(Settings(evaluate=lambda: 1.0))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there the parser is another package too")
def test_a_missing_writer_names_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TOML needs a package to be written."""
    monkeypatch.setitem(sys.modules, "tomli_w", None)
    with pytest.raises(HostError, match=r"not JSON, tomli-w should be installed.*'\.\[cli\]'"):
        save_config(QFTConfig(), tmp_path / "qft.toml")
