"""The same layer in plain PyTorch, and with TorchDEQ; written from the equations.

Run by compare.py, with an interpreter that has torch (and torchdeq): reads "forward" or "step"
lines, answers with wall-clock and processor seconds. Imports nothing of msdspn_jax. Runs on a GPU
where torch finds one; "tensorfloat32" as the last argument allows its products in tf32.

"torch-bfloat16" multiplies in bfloat16 (torch.autocast), fast where the processor knows it.
"torch-compiled" is the same through torch.compile. As that cannot go backward through
torch.autograd.grad, the inner gradient is torch.func.grad's there.
"""

import json
import sys
import time

import torch
from torch import nn


def simplex(points):
    u = torch.sort(points, -1, descending=True).values
    sums = u.cumsum(-1) - 1
    k = torch.arange(1, points.shape[-1] + 1, dtype=points.dtype)
    size = (u - sums / k > 0).sum(-1, keepdim=True)
    return torch.relu(points - sums.gather(-1, size - 1) / size)


def encoder(d, width, n):
    def uniform(*shape):
        return ((2 * torch.rand(*shape) - 1) * shape[0] ** -0.5).requires_grad_()

    return {
        "hidden": (uniform(d, width), uniform(width)),
        "output": (uniform(width, width), uniform(width)),
        "pool": (torch.randn(n, width) * n**-0.5).requires_grad_(),
    }


def encode(params, sets):
    kernel, bias = params["hidden"]
    hidden = torch.relu(sets @ kernel + bias)
    kernel, bias = params["output"]
    features = torch.sort(hidden @ kernel + bias, 1).values
    return (features * params["pool"]).sum(1)


class Layer:
    def __init__(self, case, use_torchdeq=False, compiled=False):
        torch.manual_seed(0)
        self.compiled = compiled
        self.case = case
        n, d, width, classes = (case[k] for k in ("n", "d", "width", "classes"))
        self.input_encoder = encoder(classes or d, width, n)
        self.energy_encoder = encoder(d + (classes or 0), width, n)
        self.initial = None if classes else (0.1 * torch.randn(n, d)).requires_grad_()
        if classes:
            index = torch.randint(classes, (case["batch"], n))
            self.inputs = torch.nn.functional.one_hot(index, classes).float()
        else:
            self.inputs = torch.randn(case["batch"], n, d)
        self.cotangent = torch.randn(case["batch"], n, d)
        self.deq = None
        if use_torchdeq:
            from torchdeq import get_deq

            # One-step gradient at the fixed point: the counterpart of the identity rule.
            self.deq = get_deq(
                f_solver="fixed_point_iter",
                f_max_iter=case["num_steps"],
                f_tol=0.0,
                ift=False,
                grad=1,
            )

    def energy(self, sets, latent, start):
        joined = torch.cat([sets, self.inputs], -1) if self.case["classes"] else sets
        residual = encode(self.energy_encoder, joined) - latent
        energy = 0.5 * residual.square().mean(-1).sum()
        if self.initial is not None:
            energy = energy + 0.05 * (sets - start).square().mean((1, 2)).sum()
        return energy

    def gradient(self, sets, latent, start, create_graph):
        if self.compiled:
            return torch.func.grad(self.energy)(sets, latent, start)
        energy = self.energy(sets, latent, start)
        return torch.autograd.grad(energy, sets, create_graph=create_graph)[0]

    def project(self, sets):
        return simplex(sets) if self.case["classes"] else sets

    def forward(self, differentiable=False):
        case = self.case
        latent = encode(self.input_encoder, self.inputs)
        shape = self.cotangent.shape
        start = 0.1 * torch.randn(shape) if case["classes"] else self.initial.expand(shape)
        sets = self.project(start.detach())
        if self.deq is not None:

            def step(sets):
                with torch.enable_grad():
                    graph = sets.requires_grad
                    point = sets if graph else sets.detach().requires_grad_()
                    moved = self.project(
                        point - self.gradient(point, latent, start, differentiable)
                    )
                return moved if differentiable else moved.detach()

            return self.deq(step, sets)[0][-1]
        momentum = torch.zeros(shape)
        fixed = latent.detach()
        last = sets
        for _ in range(case["num_steps"]):
            last = sets
            point = sets.detach() if self.compiled else sets.detach().requires_grad_()
            grads = self.gradient(point, fixed, start.detach(), False)
            if case["max_grad_norm"]:
                norm = grads.flatten(1).norm(dim=1)[:, None, None]
                grads = grads * torch.clamp(case["max_grad_norm"] / (norm + 1e-6), max=1)
            momentum = case["momentum"] * momentum + grads
            sets = self.project(sets - grads - case["momentum"] * momentum)
        if not differentiable:
            return sets
        point = last.detach() if self.compiled else last.detach().requires_grad_()
        step = self.project(point - self.gradient(point, latent, start, True))
        return sets + step - step.detach()

    def value(self):
        return (self.forward(True) * self.cotangent).sum()

    def step(self):
        parts = [self.input_encoder, self.energy_encoder]
        params = [x for p in parts for x in (*p["hidden"], *p["output"], p["pool"])]
        params += [] if self.initial is None else [self.initial]
        return torch.autograd.grad(self.value(), params, allow_unused=self.deq is not None)


class Pool:
    """FSPool alone, [16, n, 64]; the gradient is with respect to features and weight."""

    def __init__(self, n):
        torch.manual_seed(0)
        self.features = torch.randn(16, n, 64).requires_grad_()
        self.weight = torch.randn(n, 64).requires_grad_()
        self.cotangent = torch.randn(16, 64)

    def value(self):
        return ((torch.sort(self.features, 1).values * self.weight).sum(1) * self.cotangent).sum()

    def forward(self):
        with torch.no_grad():
            return self.value()

    def step(self):
        return torch.autograd.grad(self.value(), (self.features, self.weight))


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut."""

    def __init__(self, channels, features, stride):
        super().__init__()

        def convolution(inputs, size, stride):
            padding = size // 2
            layer = nn.Conv2d(inputs, features, size, stride, padding, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(features))

        self.first, self.second = convolution(channels, 3, stride), convolution(features, 3, 1)
        same = stride == 1 and channels == features
        self.shortcut = nn.Identity() if same else convolution(channels, 1, stride)

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class Encoder:
    """ResNet-18 in training mode, channels last, forward and backward to all parameters."""

    def __init__(self, case):
        torch.manual_seed(0)
        size, width, batch, latent = (case[k] for k in ("size", "width", "batch", "latent_dim"))
        layers = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2, 1)]
        channels = width
        for stage in range(4):
            for block in range(2):
                features = width * 2**stage
                layers += [Block(channels, features, 2 if stage and not block else 1)]
                channels = features
        layers += [nn.Conv2d(channels, latent // (size // 64) ** 2, 2, 2), nn.Flatten()]
        self.network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        images = torch.rand(batch, 3, size, size)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.cotangent = torch.randn(batch, latent)

    def forward(self):
        with torch.no_grad():
            return self.network(self.images)

    def value(self):
        return (self.network(self.images) * self.cotangent).sum()

    def step(self):
        return torch.autograd.grad(self.value(), list(self.network.parameters()))


def main():
    peer, case, precision = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.set_default_device("cuda")
    if precision == ["tensorfloat32"]:
        torch.set_float32_matmul_precision("high")
    compiled = peer == "torch-compiled"
    if "pool" in case:
        layer = Pool(case["pool"])
    elif "size" in case:
        layer = Encoder(case)
    else:
        layer = Layer(case, use_torchdeq=peer == "torchdeq", compiled=compiled)
    if compiled:
        # The backward pass of a compiled forward is compiled as well.
        layer.forward, layer.value = torch.compile(layer.forward), torch.compile(layer.value)
    if peer == "torch-bfloat16":
        mixed = torch.autocast("cpu", torch.bfloat16)
        layer.forward, layer.value = mixed(layer.forward), mixed(layer.value)
    print(json.dumps({"ready": peer, "version": torch.__version__, "gpu": on_gpu}), flush=True)
    for line in sys.stdin:
        run = layer.forward if line.strip() == "forward" else layer.step
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        print(
            json.dumps([time.perf_counter() - wall, time.process_time() - cpu]),
            flush=True,
        )


main()
