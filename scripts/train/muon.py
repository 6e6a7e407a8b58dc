"""Muon for the matrices in a network's middle: momentum, made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

A convolution counts as a matrix with a row for each channel that it makes. Steps are as long as AdamW's (Liu et al. 2025,
arXiv 2502.16982), so both take the same learning rate.
"""

import torch

LEAST = 32  # rows and columns of a matrix worth it
MOMENTUM = 0.95
AS_LONG = 0.2  # root mean square of AdamW's steps in units of the learning rate


def split(parameters):
    """Matrices for Muon, but for the first, which takes the input in; and what is left for AdamW."""
    matrices = [p for p in parameters if p.dim() > 1 and min(p.shape[0], p[0].numel()) >= LEAST][1:]
    taken = set(map(id, matrices))
    return matrices, [p for p in parameters if id(p) not in taken]


def orthogonal(matrices):
    """[n, rows, columns] with all singular values near 1, by five steps of a Newton-Schulz iteration."""
    wide = matrices.shape[1] < matrices.shape[2]
    x = matrices.mT if wide else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x.mT @ x
        x = x @ (3.4445 * torch.eye(x.shape[2], device=x.device, dtype=x.dtype) - 4.7750 * square + 2.0315 * square @ square)
    return x.mT if wide else x


class Muon(torch.optim.Optimizer):
    """Steps as above; a gradient that is not finite may be reported in `found_inf`, and is skipped then."""

    def __init__(self, parameters, lr, weight_decay, kind):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.kind = kind  # of number, for the iteration
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((len(p), p[0].numel()), []).append(p)
            for shape, parameters in alike.items():
                self.step_of(shape, parameters, group["lr"], group["weight_decay"])

    def step_of(self, shape, parameters, lr, decay):
        """One step of matrices of one shape."""
        gradients = [p.grad for p in parameters]
        if self.found_inf is not None:
            lr = lr * (1 - self.found_inf)
            gradients = [torch.where(self.found_inf > 0, 0.0, g) for g in gradients]
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        means = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - MOMENTUM)
        ahead = torch.stack([g.lerp(m, MOMENTUM).reshape(shape) for g, m in zip(gradients, means)])
        length = AS_LONG * max(shape) ** 0.5
        for p, change in zip(parameters, orthogonal(ahead.to(self.kind)).float()):
            p.mul_(1 - lr * decay).sub_(lr * length * change.view_as(p))
