"""The benchmarks' networks in PyTorch, and their weights in the layout of the file."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

STAGES = {"resnet8": ((1, 1, 1), 16), "resnet18": ((2, 2, 2, 2), 64)}


def build(model: str, params: dict[str, np.ndarray]) -> nn.Module:
    """Build a network and load its weights."""
    module = _Net(model, {name: value.shape for name, value in params.items()})
    load(module, params)
    return module


def load(module: nn.Module, params: dict[str, np.ndarray]) -> None:
    """Copy weights into a network."""
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in params.items():
            at = _torch_name(name)
            own[at].copy_(torch.from_numpy(_to_torch(value, own[at].shape, module, at)))


def assign(params: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy tensors into parameters."""
    with torch.no_grad():
        torch._foreach_copy_(params, values)


def save(module: nn.Module) -> dict[str, np.ndarray]:
    """Return a network's weights in the layout of the file."""
    params = {}
    for at, value in module.named_parameters():
        path, _, kind = at.replace(".", "/").rpartition("/")
        kind = {"weight": "scale" if value.ndim == 1 else "kernel"}.get(kind, kind)
        params[f"{path}/{kind}"] = _from_torch(value.detach().cpu().numpy(), module, at)
    return params


def descend(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    rows: torch.Tensor,
    learning_rate: float,
) -> None:
    """Take a step of SGD on each minibatch of `rows [t, b]`."""
    params = list(model.parameters())
    for row in rows:
        loss = F.cross_entropy(model(x[row]), y[row])
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            torch._foreach_add_(params, grads, alpha=-learning_rate)


def descend_stacked(
    model: nn.Module,
    stacked: dict[str, torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    rows: torch.Tensor,
    learning_rate: float,
) -> None:
    """Take a step of SGD on each minibatch of `rows [m, t, b]`, all clients at once.

    Args:
      model: The network.
      stacked: Its parameters `[m, ...]`, which are changed.
      x: All images.
      y: All labels.
      rows: Of every client and step.
      learning_rate: Of SGD.
    """

    def loss(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    gradient = vmap(grad(loss))
    for row in rows.unbind(1):
        grads = gradient(stacked, x[row], y[row])
        torch._foreach_add_(
            list(stacked.values()), [grads[k] for k in stacked], alpha=-learning_rate
        )


class Data:
    """The arrays of a workload as tensors."""

    def __init__(self, workload, device: str = "cpu") -> None:
        x = np.ascontiguousarray(workload.x.transpose(0, 3, 1, 2))
        self.x = torch.from_numpy(x).to(device)
        self.y = torch.from_numpy(workload.y).long().to(device)
        self.rows = torch.from_numpy(workload.rows).long().to(device)


def set_precision(precision: str) -> None:
    """Set the precision of float32 products; an empty one leaves it as it is.

    Args:
      precision: "float32" or "tensorfloat32", as JAX names them.
    """
    if precision:
        own = "ieee" if precision == "float32" else "tf32"
        torch.backends.cuda.matmul.fp32_precision = own
        torch.backends.cudnn.conv.fp32_precision = own


def _torch_name(name: str) -> str:
    path, _, kind = name.rpartition("/")
    return f"{path.replace('/', '.')}.{'bias' if kind == 'bias' else 'weight'}"


def _channels(module: nn.Module, at: str) -> int:
    """Tell how many channels were flattened before this layer, 1 if none were."""
    return module.flattened if at == "body.Dense_0.weight" else 1


def _to_torch(value, shape, module, at):
    if value.ndim == 4:
        value = value.transpose(3, 2, 0, 1)
    elif value.ndim == 2:
        parts = value.reshape(-1, _channels(module, at), value.shape[1])
        value = parts.transpose(2, 1, 0).reshape(shape)
    return np.ascontiguousarray(value)


def _from_torch(value, module, at):
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if value.ndim == 2:
        parts = value.reshape(value.shape[0], _channels(module, at), -1)
        return parts.transpose(2, 1, 0).reshape(-1, value.shape[0])
    return value


def _layer(name: str, shape: tuple[int, ...], shapes: dict) -> nn.Module:
    """Build a layer from the shape of its kernel."""
    if len(shape) == 1:
        return nn.GroupNorm(shape[0] // 16, shape[0], eps=1e-6)
    if len(shape) == 2:
        return nn.Linear(*shape)
    high, wide, channels, features = shape
    return nn.Conv2d(channels, features, (high, wide), bias=f"{name}/bias" in shapes)


class _Net(nn.Module):
    """A body and a head whose parameters are named as in the file."""

    def __init__(self, model: str, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.model = model
        for name, shape in shapes.items():
            path, _, kind = name.rpartition("/")
            if kind in ("kernel", "scale"):
                *parents, last = path.split("/")
                place = self
                for parent in parents:
                    if not hasattr(place, parent):
                        place.add_module(parent, nn.Module())
                    place = getattr(place, parent)
                place.add_module(last, _layer(path, shape, shapes))
        self.flattened = 1 if model == "mlp" else 64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits, `[b, c, h, w] -> [b, classes]`."""
        body = self.body
        if self.model == "mlp":
            z = F.relu(body.Dense_0(x.flatten(1)))
        elif self.model == "cnn":
            for conv in (body.ConvPool_0, body.ConvPool_1):
                x = F.relu(F.max_pool2d(_conv(x, conv), 2))
            z = F.relu(body.Dense_0(x.flatten(1)))
        elif self.model == "pfl_cnn":
            x = F.relu(body.Conv_0(x))
            x = F.relu(F.max_pool2d(body.ConvPool_0(x), 2))
            z = F.relu(body.Dense_0(x.flatten(1)))
        else:
            z = self._resnet(x)
        return self.head(z)

    def _resnet(self, x):
        body = self.body
        x = F.relu(body.GroupNorm_0(_conv(x, body.Conv_0)))
        count = 0
        for stage, blocks in enumerate(STAGES[self.model][0]):
            for number in range(blocks):
                block = getattr(body, f"Block_{count}")
                stride = 2 if stage and not number else 1
                y = F.relu(block.GroupNorm_0(_conv(x, block.Conv_0, stride)))
                y = block.GroupNorm_1(_conv(y, block.Conv_1))
                if x.shape != y.shape:
                    x = block.GroupNorm_2(_conv(x, block.Conv_2, stride))
                x = F.relu(x + y)
                count += 1
        return x.mean((2, 3))


def _conv(x: torch.Tensor, conv: nn.Conv2d, stride: int = 1) -> torch.Tensor:
    """Convolve with the padding that TensorFlow and JAX call SAME."""
    size, kernel = x.shape[-1], conv.kernel_size[0]
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    low, high = total // 2, total - total // 2
    if low != high:
        x, low = F.pad(x, (low, high, low, high)), 0
    return F.conv2d(x, conv.weight, conv.bias, stride, low)
