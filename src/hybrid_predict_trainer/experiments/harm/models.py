"""Small models, a thousand to a hundred thousand weights.

Shapes: N samples, T tokens, W width, H heads, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...tasks.language.lora import add_lora
from ...tasks.language.text import NUM_BYTE_TOKENS
from . import data
from .settings import Setting

WIDTH, NUM_HEADS, NUM_LAYERS = 48, 3, 2


class Mlp(nn.Module):
    """Two hidden layers of 64."""

    def __init__(self, num_in: int, num_out: int, activation: type[nn.Module], dropout: float = 0.0) -> None:
        """Draw the weights."""
        super().__init__()
        self.first, self.second, self.head = nn.Linear(num_in, 64), nn.Linear(64, 64), nn.Linear(64, num_out)
        self.activation, self.dropout = activation(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)."""
        for layer in (self.first, self.second):
            x = self.dropout(self.activation(layer(x)))
        return self.head(x)  # type: ignore[no-any-return]


class Cnn(nn.Module):
    """Three convolutions of 8, 16 and 16 channels, mean over the image, a linear head."""

    def __init__(self, num_out: int, *, norm: bool) -> None:
        """Draw the weights; ``norm``: a batch norm behind each convolution."""
        super().__init__()
        layers: list[nn.Module] = []
        for channels_in, channels, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
            layers += [nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=not norm)]
            layers += [nn.BatchNorm2d(channels)] if norm else []
            layers += [nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(16 * 9, num_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, side * side) -> (N, classes)."""
        x = self.features(x.view(-1, 1, data.GLYPH_SIDE, data.GLYPH_SIDE))
        return self.head(functional.max_pool2d(x, 2).flatten(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Embedding, a GRU or an LSTM, a linear head."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], vocab: int, width: int) -> None:
        """Draw the weights."""
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab)
        self.rnn = kind(width, width, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) -> (N, T, V)."""
        return self.head(self.rnn(self.embed(tokens))[0])  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer's block: as in GPT-2, or ``modern``: RMSNorm, QK-norm, rotary positions, relu^2, no biases."""

    def __init__(self, *, modern: bool, dropout: float) -> None:
        """Draw the weights; modern output projections begin at zero."""
        super().__init__()
        self.modern, self.dropout = modern, dropout
        norm = nn.RMSNorm if modern else nn.LayerNorm
        self.norm_1, self.norm_2 = norm(WIDTH), norm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=not modern), nn.Linear(WIDTH, WIDTH, bias=not modern)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=not modern)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=not modern)
        for layer in (self.qkv, self.up, self.out, self.down):
            nn.init.normal_(layer.weight, std=0.02 if not modern else WIDTH**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for layer in (self.out, self.down):
            if modern:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, W) -> (N, T, W)."""
        x = x + self._drop(self._attend(self.norm_1(x)))
        hidden = self.up(self.norm_2(x))
        hidden = functional.relu(hidden).square() if self.modern else functional.gelu(hidden)
        return x + self._drop(self.down(hidden))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def _attend(self, x: Tensor) -> Tensor:
        heads = (*x.shape[:2], NUM_HEADS, -1)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.modern:
            q, k = (rotated(functional.rms_norm(part, (part.shape[-1],))) for part in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


@functools.cache
def _angles(num_tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(num_tokens)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    return angle.cos(), angle.sin()


def rotated(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) for (N, H, T, width of a head)."""
    cos, sin = _angles(x.shape[-2], x.shape[-1] // 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Gpt(nn.Module):
    """Decoder-only transformer of two blocks; the old kind has learned positions, the modern one rotary ones."""

    def __init__(self, *, modern: bool, dropout: float = 0.0, tied: bool = False) -> None:
        """Draw the weights; ``tied``: the head is the embedding."""
        super().__init__()
        self.modern = modern
        self.embed = nn.Embedding(NUM_BYTE_TOKENS, WIDTH)
        self.positions = None if modern else nn.Embedding(data.CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(modern=modern, dropout=dropout) for _ in range(NUM_LAYERS))
        self.norm = nn.RMSNorm(WIDTH) if modern else nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, NUM_BYTE_TOKENS, bias=False)
        nn.init.normal_(self.embed.weight, std=1.0 if modern else 0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) -> (N, T, V)."""
        x: Tensor = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))  # type: ignore[no-any-return]


class TorchGpt(nn.Module):
    """The same of torch's layers and initial values: tables of deviation 1, norms behind every part, ReLU, biases."""

    def __init__(self, dropout: float) -> None:
        """Draw the weights."""
        super().__init__()
        self.embed, self.positions = nn.Embedding(NUM_BYTE_TOKENS, WIDTH), nn.Embedding(data.CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, NUM_HEADS, 4 * WIDTH, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, NUM_LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, NUM_BYTE_TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) -> (N, T, V)."""
        length = tokens.shape[1]
        x = self.embed(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        return self.head(self.encoder(x, mask=mask, is_causal=True))  # type: ignore[no-any-return]


class RowEncoder(nn.Module):
    """An encoder of torch's layers over the rows of an image; its only table holds positions, of deviation 1."""

    def __init__(self, num_out: int) -> None:
        """Draw the weights."""
        super().__init__()
        self.rows, self.positions = nn.Linear(data.GLYPH_SIDE, WIDTH), nn.Embedding(data.GLYPH_SIDE, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, NUM_HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, NUM_LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, num_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, side * side) -> (N, classes)."""
        x = self.rows(x.view(-1, data.GLYPH_SIDE, data.GLYPH_SIDE)) + self.positions.weight
        return self.head(self.encoder(x).mean(1))  # type: ignore[no-any-return]


#: Inputs and outputs by source.
SIZES = {
    "glyphs": (data.GLYPH_SIDE**2, data.NUM_CLASSES),
    "glyphs-turned": (data.GLYPH_SIDE**2, data.NUM_CLASSES),
    "digits": (64, data.NUM_CLASSES),
    "teacher": (data.TEACHER_INPUTS, data.NUM_CLASSES),
    "drift": (data.TEACHER_INPUTS, data.NUM_CLASSES),
    "friedman": (10, 1),
    "regression": (8, 1),
    "poisson": (1, 1),
    "oscillator": (1, 1),
}


def build_model(setting: Setting, seed: int) -> nn.Module:
    """The setting's model with the seed's initial weights; torch's global generator goes on from there."""
    bases = {"mlp-lora": _trained_mlp, "gpt-lora": _trained_gpt, "gpt-trained": _trained_gpt}
    if setting.model in bases:
        trained = bases[setting.model]()
        torch.manual_seed(seed)
        return _adapted(trained, setting)
    torch.manual_seed(seed)
    return _new_model(setting)


def _new_model(setting: Setting) -> nn.Module:
    num_in, num_out = SIZES.get(setting.source, (0, 0))
    match setting.model:
        case "mlp":
            smooth = setting.source == "regression"
            return Mlp(num_in, num_out, nn.Tanh if smooth else nn.ReLU, setting.dropout)
        case "pinn":
            return Mlp(num_in, num_out, nn.Tanh)
        case "logistic":
            return nn.Linear(num_in, num_out)
        case "cnn" | "cnn-bn":
            return Cnn(num_out, norm=setting.model == "cnn-bn")
        case "gru":
            return Recurrent(nn.GRU, data.NUM_SYMBOLS, 32)
        case "lstm":
            return Recurrent(nn.LSTM, NUM_BYTE_TOKENS, 64)
        case "mlp-bf16":
            return in_bfloat16(Mlp(num_in, num_out, nn.ReLU))
        case "gpt-bf16":
            return in_bfloat16(Gpt(modern=False))
        case "encoder":
            return RowEncoder(num_out)
        case "gpt-torch":
            return TorchGpt(setting.dropout)
    return Gpt(modern=setting.model == "gpt-modern", dropout=setting.dropout, tied=setting.model == "gpt-tied")


def in_bfloat16(model: nn.Module) -> nn.Module:
    """The same model with weights in bfloat16; its inputs are rounded, its outputs are float32 for the loss."""
    model.to(torch.bfloat16)
    model.register_forward_pre_hook(
        lambda _, inputs: tuple(x.to(torch.bfloat16) if x.is_floating_point() else x for x in inputs)
    )
    model.register_forward_hook(lambda _, inputs, output: output.float())
    return model


# ---- what is trained already ----------------------------------------------------------------------------------

#: Of the training of a model that is adapted.
BASE_STEPS = 500


def _adapted(state: dict[str, Tensor], setting: Setting) -> nn.Module:
    """A trained model as it is, or with adapters of rank 4: what is not adapted stays frozen then."""
    model = Mlp(*SIZES["glyphs"], nn.ReLU) if setting.model == "mlp-lora" else Gpt(modern=False)
    model.load_state_dict(state)
    return model if setting.model == "gpt-trained" else add_lora(model, rank=4, alpha=8.0)


@functools.cache
def _trained_mlp() -> dict[str, Tensor]:
    """Trained on the images that are not turned."""
    return _trained(lambda: Mlp(*SIZES["glyphs"], nn.ReLU), data.draw_glyphs, batch=64, steps=BASE_STEPS)


@functools.cache
def _trained_gpt() -> dict[str, Tensor]:
    """Trained on Python's library; the adapters learn the manual."""
    draw = functools.partial(data.draw_windows, data.corpus("stdlib").train)
    return _trained(lambda: Gpt(modern=False), draw, batch=8, steps=BASE_STEPS)


def _trained(new_model: Callable[[], nn.Module], draw: data.Draw, *, batch: int, steps: int) -> dict[str, Tensor]:
    """Weights after a short training, the same in every process of one version of torch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = data.fresh(draw, batch, 4)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50, (steps - step) / (steps / 4))
        x, y = next(batches)
        optimizer.zero_grad()
        functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
