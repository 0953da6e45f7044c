"""
Low-rank adapters: finetune a model by training few parameters (Hu et al. 2021, arXiv 2106.09685).

    python train.py config/finetune.py --init_from=out/tiny --objective=lora --learning_rate=3e-3

Each matrix W of the core becomes W + up @ down, with `down` of adapter_rank rows and `up` of as many columns.
Only these two are trained, and all other parameters stay as they are. `up` starts at 0, so that training
starts from the model of init_from. Only the trained parameters have gradients and optimizer state. The run's
checkpoints hold all three matrices; what loads one for another use gets a plain model of their sums.
"""

from dataclasses import dataclass

from torch import nn

import experiments
from model import check_settings
from nanostlm.machine import print0
from nanostlm.variants import LoRA, replace_linear


@dataclass(frozen=True)
class Config:
    adapter_rank: int = 8  # rows of `down` and columns of `up`

    def validate(self) -> None:
        check_settings(self, {"adapter_rank": (1, 10**9)}, {})


class Objective(experiments.Objective):
    """The cross-entropy, with adapters in a model whose other parameters are frozen."""

    def __init__(self, config, model: nn.Module, data):
        super().__init__(config, model, data)
        if not config.init_from:
            raise ValueError("objective=lora adapts a trained model: name it with --init_from=out/RUN")
        if not hasattr(model, "core"):
            raise ValueError(f"leave out objective=lora: architecture={config.architecture} has no core")

    def prepare_model(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        replace_linear(model.core, self.adapted)
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        print0(f"trains   {sum(trained) / 1e6:.3f}M parameters: adapters of {len(trained) // 2} matrices")

    def adapted(self, layer: nn.Linear) -> LoRA:
        adapted = LoRA(layer, self.config.adapter_rank).to(layer.weight)  # its device and dtype
        nn.init.zeros_(adapted.up.weight)
        return adapted
