"""Which pixels of a test image explain its loss, in addition to training images: captum, imported on demand.

It explains f(x) = −L(x, class), the same loss that `influence rank` explains: a pixel above zero lowers the loss and
speaks for the class, a pixel below zero speaks against it.

- ``integrated-gradients``: (x − x₀) · ∫₀¹ ∇f(x₀ + α(x − x₀)) dα from an input x₀ of zeros (Sundararajan et al., ICML
  2017); the pixels sum to f(x) − f(x₀). The finest.
- ``grad-cam``: ReLU(Σ_k mean(∂f/∂A_k) A_k) over the channels A_k of the last convolution (Selvaraju et al., ICCV 2017):
  where, coarsely, in one backward pass.
- ``occlusion``: f(x) − f(x with a patch set to the mean of the image), mean over the patches that cover a pixel (Zeiler
  & Fergus, ECCV 2014): needs no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.data.split import raw_item, to_input
from influence_cli.errors import InfluenceError, require_extra
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task

METHODS = ("integrated-gradients", "grad-cam", "occlusion")
# Points of the path integral: the sum over pixels then matches f(x) − f(x₀) to about 1% on a network with ReLU.
STEPS = 64
# Copies of the image that go through the model at once, and the most numbers in all of them.
COPIES, NUMBERS = 64, 2**22


def check_attribution(method: str | None) -> None:
    """Refuse an unknown method, before any work.

    Args:
        method: of ``--attribution``, or None for none.

    Raises:
        InfluenceError: it is not one of `METHODS`, or captum is not installed.
    """
    if method is None:
        return
    if method not in METHODS:
        raise InfluenceError(f"--attribution {method}: there is no such method", f"known: {', '.join(METHODS)}")
    require_extra("captum", "attribution", "--attribution")


def check_model(task: Task, method: str) -> None:
    """Refuse inputs that are not images, and for Grad-CAM a model without a convolution, before long work.

    Args:
        task: with at least one readable training example (`load_tasks` has run one).
        method: one of `METHODS`.

    Raises:
        InfluenceError: it cannot be drawn for this model.
    """
    split = task.test or task.train
    index = int(split.indices[0])
    x = to_input(split, raw_item(split, index)[0], split.title(index))
    _require_image(x)
    if method == "grad-cam":
        last_convolution(task.model, x.to(task.device))


def attribute(task: Task, image: Tensor, target: int, method: str) -> np.ndarray:
    """Explain the loss of a class by the pixels of one input.

    Args:
        task: model (in eval mode) and loss.
        image: [C, H, W], as the model takes it.
        target: the class whose loss is explained.
        method: one of `METHODS`.

    Returns:
        float64 [H, W] in nats (for cross-entropy), not scaled: > 0 lowers the loss. Grad-CAM is ≥ 0, in its own
        unit.

    Raises:
        InfluenceError: the input is not an image, or the model has no convolution for Grad-CAM.
    """
    from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam, Occlusion

    _require_image(image)
    x = image.to(task.device)[None].clone().requires_grad_()
    copies = max(1, min(COPIES, NUMBERS // x.numel()))
    f = _explained(task, target)
    if method == "integrated-gradients":
        attribution = IntegratedGradients(f).attribute(
            x, torch.zeros_like(x), n_steps=STEPS, internal_batch_size=copies
        )
    elif method == "grad-cam":
        layer = last_convolution(task.model, image.to(task.device))
        coarse = LayerGradCam(f, layer).attribute(x, relu_attributions=True)
        attribution = LayerAttribution.interpolate(coarse, tuple(x.shape[-2:]), interpolate_mode="bilinear")
    else:
        height, width = patch(image)
        # Steps of half a patch: four patches cover every pixel except those at the border.
        strides = (x.shape[1], max(1, height // 2), max(1, width // 2))
        with torch.no_grad():
            attribution = Occlusion(f).attribute(
                x,
                sliding_window_shapes=(x.shape[1], height, width),
                strides=strides,
                baselines=x.mean(dim=(2, 3), keepdim=True).expand_as(x),
                perturbations_per_eval=copies,
            )
            # captum gives a pixel's value to each channel of the patch.
            attribution = attribution.mean(dim=1, keepdim=True)
    return np.asarray(attribution.detach()[0].cpu().double().sum(dim=0).numpy())


def patch(image: Tensor) -> tuple[int, int]:
    """Give height and width of the patch that `occlusion` moves: an eighth of either side."""
    return max(1, round(image.shape[-2] / 8)), max(1, round(image.shape[-1] / 8))


def last_convolution(model: nn.Module, image: Tensor) -> nn.Module:
    """Find the last convolution with a map as output, in the order of a forward pass, not of the definition.

    Args:
        model: any classifier.
        image: [C, H, W] on the model's device.

    Raises:
        InfluenceError: there is none.
    """
    ran: list[nn.Module] = []

    def seen(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            ran.append(module)

    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    hooks = [module.register_forward_hook(seen) for module in model.modules() if isinstance(module, kinds)]
    try:
        with torch.no_grad():
            model(image[None])
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise InfluenceError(
            "--attribution grad-cam: the model runs no two-dimensional convolution",
            "use --attribution integrated-gradients or occlusion",
        )
    return ran[-1]


def _explained(task: Task, target: int) -> Callable[[Tensor], Tensor]:
    """Give f(x) = −L(x, target) as a function of a batch."""

    def f(inputs: Tensor) -> Tensor:
        targets = torch.full((len(inputs),), target, device=inputs.device)
        return -task.loss(logits_of(task.model(inputs)), targets)

    return f


def _require_image(image: Tensor) -> None:
    if image.ndim != 3 or not image.is_floating_point():
        raise InfluenceError(
            f"--attribution: an input of the model is {image.dtype} of shape {list(image.shape)}",
            "pixels are drawn for images [channels, height, width] of floats",
        )
