"""What is said of packages that are missing."""

from importlib import metadata

import pytest
import torch

from qft_plugin.errors import HostError
from qft_plugin.packages import install_line, missing, require


def test_the_line_keeps_the_torch_that_is_there() -> None:
    """It installs the checkout with the extra, and names the installed torch in the same command."""
    version = torch.__version__.partition("+")[0]
    assert install_line("nncf") == f"in a checkout of qft_plugin: pip install torch=={version} '.[nncf]'"


def test_the_line_where_nothing_is_known_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it names the extra alone."""

    def find(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", find)
    assert install_line("brevitas,export").endswith("pip install '.[brevitas,export]'")


def test_all_that_is_missing_is_named() -> None:
    """What is there is not named."""
    require("torch", "numpy", extra="export")
    with pytest.raises(
        HostError, match=r"^absent_one, absent_two should be installed\. Found none\. Run, in a "
    ) as found:
        require("absent_one", "torch", "absent_two", extra="export")
    assert str(found.value) == str(missing("absent_one, absent_two", extra="export"))
    assert str(found.value).endswith("'.[export]'.")
