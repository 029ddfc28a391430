"""Architectures of `structures`: segmentation, detection, transformers, sequences and videos."""

from collections.abc import Callable

import torch
from structures_residual import CLASSES, BasicBlock, ConvNorm
from torch import Tensor, nn
from torch.nn import functional


class UNet(nn.Module):
    """An encoder and a decoder with skip connections; one step up by a transposed convolution, one by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(ConvNorm(3, 8), ConvNorm(8, 8))
        self.down2 = nn.Sequential(ConvNorm(8, 12), ConvNorm(12, 12))
        self.bottom = nn.Sequential(ConvNorm(12, 16), ConvNorm(16, 16))
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.join2 = nn.Sequential(ConvNorm(24, 12), ConvNorm(12, 12))
        self.narrow1 = nn.Conv2d(12, 8, 1)
        self.join1 = nn.Sequential(ConvNorm(16, 8), ConvNorm(8, 8))
        self.out = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(self.pool(one))
        x = self.up2(self.bottom(self.pool(two)))
        x = functional.pad(x, [0, two.shape[3] - x.shape[3], 0, two.shape[2] - x.shape[2]])
        x = self.join2(torch.cat([two, x], dim=1))
        x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.join1(torch.cat([one, self.narrow1(x)], dim=1)))


class SSD(nn.Module):
    """A plain backbone, an L2 norm with a scale for each channel, and heads on several levels: a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2, ceil_mode=True),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.scale_weight = nn.Parameter(5 + torch.rand(12))
        self.conv4 = nn.Sequential(
            nn.MaxPool2d(2, 2), nn.Conv2d(12, 16, 3, padding=2, dilation=2), nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.extra = nn.Sequential(
            nn.Conv2d(16, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True)
        )
        widths = (12, 16, 16)
        self.classes = nn.ModuleList(nn.Conv2d(w, 2 * CLASSES, 3, padding=1) for w in widths)
        self.boxes = nn.ModuleList(nn.Conv2d(w, 2 * 4, 3, padding=1) for w in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.conv3(x)
        second = self.conv4(first)
        levels = [self.scale_weight.view(1, -1, 1, 1) * functional.normalize(first), second, self.extra(second)]
        scores = [self.per_anchor(head(f), CLASSES) for head, f in zip(self.classes, levels, strict=True)]
        boxes = [self.per_anchor(head(f), 4) for head, f in zip(self.boxes, levels, strict=True)]
        return {"boxes": torch.cat(boxes, dim=1), "scores": torch.cat(scores, dim=1)}

    def per_anchor(self, x: Tensor, columns: int) -> Tensor:
        batch, _, height, width = x.shape
        x = x.view(batch, -1, columns, height, width).permute(0, 3, 4, 1, 2)
        return x.reshape(batch, -1, columns)


class YOLO(nn.Module):
    """Leaky ReLUs, a pyramid of max pools, nearest upsampling and concatenation; a list of outputs."""

    def __init__(self) -> None:
        super().__init__()

        def leaky(inplace: bool) -> nn.Module:
            return nn.LeakyReLU(0.1, inplace=inplace)

        def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Module:
            return ConvNorm(inputs, outputs, kernel, stride, activation=leaky)

        self.stem, self.down = conv(3, 8, 3, 2), conv(8, 16, 3, 2)
        self.split1, self.split2 = conv(16, 8), conv(16, 8)
        self.inner1, self.inner2, self.merge = conv(8, 8), conv(8, 8, 3), conv(16, 16)
        self.deep = conv(16, 24, 3, 2)
        self.spp, self.pool, self.spp_out = conv(24, 8), nn.MaxPool2d(5, 1, 2), conv(32, 24)
        self.lateral, self.up, self.mix = conv(24, 8), nn.Upsample(scale_factor=2, mode="nearest"), conv(24, 16, 3)
        self.head1, self.head2 = nn.Conv2d(16, 2 * (5 + CLASSES), 1), nn.Conv2d(24, 2 * (5 + CLASSES), 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.down(self.stem(x))
        inner = self.split1(x)
        inner = inner + self.inner2(self.inner1(inner))
        shallow = self.merge(torch.cat((inner, self.split2(x)), 1))
        x = self.spp(self.deep(shallow))
        once = self.pool(x)
        twice = self.pool(once)
        deep = self.spp_out(torch.cat((x, once, twice, self.pool(twice)), 1))
        mixed = self.mix(torch.cat((self.up(self.lateral(deep)), shallow), 1))
        outputs = []
        for head, feature in ((self.head1, mixed), (self.head2, deep)):
            found = head(feature)
            batch, _, height, width = found.shape
            outputs.append(found.view(batch, 2, 5 + CLASSES, height, width).permute(0, 1, 3, 4, 2).contiguous())
        return outputs


class RetinaNet(nn.Module):
    """A feature pyramid whose levels share one head; a tuple of a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 2)
        self.layer2, self.layer3 = BasicBlock(8, 12, 2), BasicBlock(12, 16, 2)
        self.inner2, self.inner3 = nn.Conv2d(12, 8, 1), nn.Conv2d(16, 8, 1)
        self.outer2, self.outer3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.p6 = nn.Conv2d(8, 8, 3, 2, 1)
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.classes, self.boxes = nn.Conv2d(8, CLASSES, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        c2 = self.layer2(self.stem(x))
        c3 = self.layer3(c2)
        top = self.inner3(c3)
        lower = self.inner2(c2)
        lower = lower + functional.interpolate(top, size=lower.shape[-2:], mode="nearest")
        p2, p3 = self.outer2(lower), self.outer3(top)
        levels = [p2, p3, self.p6(functional.relu(p3))]
        towers = [self.tower(level) for level in levels]
        scores = [self.classes(t).flatten(2).transpose(1, 2) for t in towers]
        boxes = torch.cat([self.boxes(t).flatten(2).transpose(1, 2) for t in towers], 1)
        return scores, {"boxes": boxes}


class ViTBlock(nn.Module):
    """An encoder block of torchvision's kind, whose attention is one module."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = self.dropout(y) + x
        return x + self.mlp(self.ln_2(x))


class FusedBlock(nn.Module):
    """An encoder block of timm's kind: one linear layer for query, key and value, and torch's attention function."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gamma = nn.Parameter(0.5 + torch.rand(dim))
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.gamma * self.proj(y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches, a class token, position embeddings, and encoder blocks with the norm first."""

    def __init__(self, block: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        dim = 16
        self.conv_proj = nn.Conv2d(3, dim, 8, 8)
        self.class_token = nn.Parameter(0.3 * torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(0.3 * torch.randn(1, 17, dim))
        self.layers = nn.Sequential(block(dim, 2), block(dim, 2))
        self.ln, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = self.conv_proj(x).reshape(batch, 16, 16).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(batch, -1, -1), x], dim=1)
        x = self.ln(self.layers(x + self.pos_embedding))
        return self.head(x[:, 0])


class BERTLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dense, self.norm1 = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-12)
        self.intermediate, self.output = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.norm2, self.dropout = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(0.1)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, self.size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(query, key.transpose(-1, -2)) / self.size**0.5 + mask
        context = torch.matmul(self.dropout(functional.softmax(scores, dim=-1)), value)
        context = context.permute(0, 2, 1, 3).contiguous()
        context = context.view(*context.shape[:2], self.heads * self.size)
        x = self.norm1(self.dropout(self.dense(context)) + x)
        return self.norm2(self.dropout(self.output(functional.gelu(self.intermediate(x)))) + x)


class BERT(nn.Module):
    """Embedded tokens, encoder layers with the norm last, a mask; a dictionary with two outputs."""

    position_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        dim = 16
        self.words, self.positions = nn.Embedding(32, dim), nn.Embedding(12, dim)
        self.register_buffer("position_ids", torch.arange(12).expand(1, -1))
        self.norm, self.dropout = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(0.1)
        self.layer1, self.layer2 = BERTLayer(dim, 2), BERTLayer(dim, 2)
        self.pooler, self.classifier = nn.Linear(dim, dim), nn.Linear(dim, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.words(tokens) + self.positions(self.position_ids[:, : tokens.shape[1]])
        hidden = (1.0 - mask[:, None, None, :]) * -10000.0
        x = self.layer2(self.layer1(self.dropout(self.norm(x)), hidden), hidden)
        return {"hidden": x, "logits": self.classifier(torch.tanh(self.pooler(x[:, 0])))}


class TCN(nn.Module):
    """One axis: dilated and separable convolutions, padded on one side, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv1d(4, 8, 5, 2, 2, bias=False), nn.BatchNorm1d(8)
        self.conv1, self.bn1 = nn.Conv1d(8, 12, 3, dilation=2, bias=False), nn.BatchNorm1d(12)
        self.shortcut = nn.Conv1d(8, 12, 1)
        self.depth, self.point = nn.Conv1d(12, 12, 3, groups=12, padding=1, bias=False), nn.Conv1d(12, 16, 1)
        self.bn2, self.prelu = nn.BatchNorm1d(16), nn.PReLU(16)
        self.pool, self.fc = nn.MaxPool1d(2), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn0(self.stem(x)))
        y = functional.relu(self.bn1(self.conv1(functional.pad(x, (4, 0)))))
        x = self.pool(functional.relu(y + self.shortcut(x)))
        x = self.prelu(self.bn2(self.point(self.depth(x))))
        return self.fc(functional.adaptive_avg_pool1d(x, 1).squeeze(-1))


class R2Plus1D(nn.Module):
    """Three axes: kernels over space, then over time, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False), nn.BatchNorm3d(8), nn.ReLU(inplace=True),
            nn.Conv3d(8, 8, (3, 1, 1), 1, (1, 0, 0), bias=False), nn.BatchNorm3d(8), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.block = nn.Sequential(
            nn.Conv3d(8, 10, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False), nn.BatchNorm3d(10), nn.ReLU(inplace=True),
            nn.Conv3d(10, 12, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False), nn.BatchNorm3d(12),
        )  # fmt: skip
        self.downsample = nn.Sequential(nn.Conv3d(8, 12, 1, 2, bias=False), nn.BatchNorm3d(12))
        self.relu, self.avgpool = nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d((1, 1, 1))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.block(x) + self.downsample(x))
        return self.fc(self.avgpool(x).flatten(1))
