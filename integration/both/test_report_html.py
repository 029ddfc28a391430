"""The page of a real job and its real file, under both hosts."""

import nets
import pytest
import torch
from conftest import few_steps, four_bits
from hosts import UnderBrevitas

from qft_plugin.report.kept import report_of

pytest.importorskip("jinja2", reason="jinja2 makes the page")


def test_a_job_and_its_file_become_a_page(host, tmp_path):
    """Every layer, the file's proof and what it runs in are on the page, and no NaN."""
    items = nets.items("residual")
    net, config = nets.build("residual"), four_bits(analyse=True, finetune=few_steps())
    if isinstance(host, UnderBrevitas):  # which folds what it quantizes, and folds once more to save
        from qft_plugin import brevitas

        model = brevitas.quantize(net, items, config=config)
    else:
        model = host.quantize(net, items, config)
    report = report_of(model)
    file = host.save(model, tmp_path, items[0])
    path = report.save_html(tmp_path / "report.html", file=file, latency={"ours": 1.0})
    text = path.read_text(encoding="utf-8")
    assert all(f'id="layer-{n}"' in text and x.weight in text for n, x in enumerate(report.layers, 1))
    assert len(report.layers) > 3
    assert "weights, equal in every integer" in text
    assert f"Convolutions: {len(file.convolutions)} run" in text
    assert "loss only it" in text
    assert text.count("<figure>") > 3 * len(report.layers)
    assert ">nan" not in text.lower()
    assert torch.isfinite(torch.tensor(report.final_loss))
