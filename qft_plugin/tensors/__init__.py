"""Quantization of tensors: grids, ranges, scales, and gradients, without a network around them."""
