"""What a job and its saves open, connect to and unpickle under each host, and what a file of a stranger can do."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import EACH_HOST

INTEGRATION = Path(__file__).parents[1]
AUDITED = INTEGRATION.parent / "tests" / "audited.py"

OF_OTHERS = ("intel", ".cache/Microsoft")
"""Where OpenVINO's and ONNX Runtime's telemetry keep a number of the machine (docs/limits.md)."""

FILES = {"nncf": ["net.bin", "net.xml"], "brevitas": ["qcdq.onnx", "qonnx.onnx"]}


@pytest.mark.parametrize("name", EACH_HOST)
def test_a_job_and_its_saves_stay_in_the_folder_of_the_user(name, tmp_path):
    """With the network refused a job and its files are as ever; nothing is unpickled, and nothing left elsewhere."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed here")
    target, home, notes = tmp_path / "target", tmp_path / "home", tmp_path / "notes.json"
    target.mkdir()
    (home / "tmp").mkdir(parents=True)
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"XDG_CACHE_HOME": str(home / ".cache"), "XDG_CONFIG_HOME": str(home / ".config")}
    environment["PYTHONPATH"] = os.pathsep.join([str(INTEGRATION), *(p for p in sys.path if p)])
    command = [sys.executable, AUDITED, notes, "quantize_and_save:save_alone", name, str(target)]
    subprocess.run(command, env=environment, cwd=home, check=True)
    found = json.loads(notes.read_text())
    assert not {"job network", "job pickle.find_class"} & set(found)
    allowed = (target, home / "tmp", *(home / place for place in OF_OTHERS))
    assert [path for path in found["job writes"] if not path.startswith(tuple(map(str, allowed)))] == []
    assert set(found.get("job programs", [])) <= {"()"}  # OpenVINO forks to send its telemetry, and starts nothing
    assert sorted(path.name for path in target.iterdir()) == FILES[name]
    left = [path for path in home.rglob("*") if path.is_file()]
    assert [path for path in left if not path.is_relative_to(home / "tmp") and not _is_of_others(path, home)] == []
    assert list((home / "tmp").rglob("*qft*")) == []


def _is_of_others(path, home):
    return any(path.is_relative_to(home / place) for place in OF_OTHERS)


def test_a_file_of_a_stranger_runs_nothing(tmp_path):
    """Names in an ONNX file become names in a text that is compiled: code in them is none there."""
    onnx = pytest.importorskip("onnx", reason="the file is one of ONNX")
    pytest.importorskip("onnxruntime", reason="which runs it")
    from onnx import TensorProto, helper, numpy_helper

    from qft_plugin import from_onnx

    mark = tmp_path / "mark"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    x, y, w = (f"{name}): {code}\n    pass #" for name in "xyw")
    names = [f"')+{code}+('", f"{{{code}}}", f"a/{code}/Conv", f"{code}.weight"]
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), f"'+{code}+'.weight")
    nodes = [
        helper.make_node("Conv", [x, weight.name], [w], name=names[0]),
        helper.make_node("Relu", [w], [f"{w}2"], name=names[1]),
        helper.make_node("Sigmoid", [f"{w}2"], [f"{w}3"], name=names[2]),
        helper.make_node("Mul", [f"{w}2", f"{w}3"], [y], name=names[3]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", c, 8, 8]) for name, c in ((x, 3), (y, 4))]
    graph = helper.make_graph(nodes, code, ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)]), tmp_path / "net.onnx")
    model = from_onnx(tmp_path / "net.onnx")
    assert model(torch.ones(2, 3, 8, 8)).shape == (2, 4, 8, 8)
    assert not mark.exists()
