"""Quantizes a float network in an ONNX file with NNCF, and saves it as OpenVINO IR with 4-bit weights.

python examples/onnx_to_openvino.py float.onnx images.npy model.xml

The images are one array, as the network reads them: `np.save("images.npy", images)`, [images, channels, height, width].
"""

import argparse
from pathlib import Path

import nncf
import numpy as np
import torch

import qft_plugin
import qft_plugin.nncf
from qft_plugin import FinetuneConfig, QFTConfig

BATCH = 32


def main() -> None:
    """Do it, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", type=Path, help="float network, *.onnx")
    parser.add_argument("images", type=Path, help="about a thousand images of the kind that will be seen, *.npy")
    parser.add_argument("file", type=Path, help="where the IR goes, *.xml")
    parser.add_argument("--images-fed", type=int, default=FinetuneConfig.images_fed, help="how long is trained")
    args = parser.parse_args()

    model = qft_plugin.from_onnx(args.network)
    images = torch.from_numpy(np.load(args.images)).float()
    dataset = nncf.Dataset(list(images.split(BATCH)))
    config = QFTConfig(finetune=FinetuneConfig(images_fed=args.images_fed))
    quantized = nncf.quantize(model, dataset, algorithm=config)
    report = qft_plugin.nncf.save_openvino(quantized, args.file, images[:BATCH])
    print(f"{report.int8_convolutions} of {len(report.convolutions)} convolutions in int8, {report.bytes} bytes")
    print(report.proof)


if __name__ == "__main__":
    main()
