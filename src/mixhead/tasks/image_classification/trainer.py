"""The `Trainer` of transformers with the loss, the optimizer, the images and the measurements of classification."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.image_processing_base import ImageProcessingMixin

from mixhead.data.image_batches import ImageOrder, MixingCollator, TrainTransform
from mixhead.data.labelled_images import LabelledImages, part
from mixhead.errors import MixheadError
from mixhead.files import write_text
from mixhead.models.hugging_face import MoHModelMixin, RoutingTrace
from mixhead.models.moh_vit import MoHTransNeXtForImageClassification
from mixhead.routing import Routing
from mixhead.tasks.image_classification.config import ImageTrainConfig
from mixhead.tasks.image_classification.evaluate import evaluate_images
from mixhead.training.health import HEALTH
from mixhead.training.progress import read_rows
from mixhead.training.trainer import CHECKPOINTING, RunMixin, training_arguments


class ImageTrainer(RunMixin):
    """Cross entropy with soft targets, and the balance loss of the routers."""

    columns = ("loss", "cross_entropy", *HEALTH)
    unit = "images"
    former_bf16 = True

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ImageProcessingMixin,
        config: ImageTrainConfig,
        images: LabelledImages,
        run: Path,
    ) -> None:
        self.training, self.processor = config, processor
        self.keep_checkpoints, self.bf16 = config.keep_checkpoints, config.bf16
        arguments = training_arguments(
            run,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            max_steps=1,  # set below: it depends on the number of processes, which these arguments find out
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            dataloader_num_workers=config.dataloader_workers,
            **CHECKPOINTING if config.gradient_checkpointing else {},
            **sharding(model) if config.fsdp else {},
        )
        per_step = config.batch_size * config.gradient_accumulation * arguments.world_size
        steps_per_epoch = len(images.labels) / per_step
        self.units_per_step = per_step
        arguments.max_steps = int(config.epochs * steps_per_epoch)
        if arguments.max_steps == 0:
            raise MixheadError(
                f"epochs={config.epochs} of {len(images.labels):,} images do not reach for one optimizer step, which "
                f"reads {per_step:,}."
            )
        self.learning_rate_factor = partial(config.factor, steps=arguments.max_steps)
        arguments.save_steps = max(round(config.save_every * steps_per_epoch), 1)
        transform = TrainTransform(
            size=image_side(processor),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            augmentation=config.augmentation,
        )
        order = ImageOrder(images, transform, arguments.max_steps * per_step, config.seed, config.repeated_augmentation)
        collator = MixingCollator(len(images.classes), config.augmentation, config.seed)
        super().__init__(model=model, args=arguments, train_dataset=order, data_collator=collator)
        # The loss below is a mean over the micro-batch, whatever the model would take: the Trainer divides it.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the micro-batch of the cross entropy, and the balance loss times its coefficient."""
        del num_items_in_batch
        outputs, routings, coefficient = self.routed(model, inputs["pixel_values"])
        cross_entropy = F.cross_entropy(outputs.logits.float(), inputs["targets"])
        loss = cross_entropy + self.balance(routings, coefficient)
        self.note(self.equal_share, loss=loss, cross_entropy=cross_entropy)
        return (loss, outputs) if return_outputs else loss

    def balance(self, routings: list[Routing], coefficient: float) -> Tensor | float:
        """The mean balance loss of the layers whose heads compete, times its coefficient; noted for the log."""
        balances = [routing.balance_loss for routing in routings if routing.probs_BNH is not None]
        if not balances:
            return 0.0
        self.note_routings(routings, self.equal_share)
        return coefficient * torch.stack(balances).mean()

    def routed(self, model: nn.Module, pixels_BCYX: Tensor, **asked: Any) -> tuple[Any, list[Routing], float]:
        """The output of the model, the routings of its layers, and the weight of their balance loss."""
        if isinstance(self.base_model, MoHTransNeXtForImageClassification):
            outputs = model(pixel_values=pixels_BCYX, output_routing=True, **asked)
            return outputs, list(outputs.routing), self.base_model.config.balance_coefficient
        if isinstance(self.base_model, MoHModelMixin):
            trace = RoutingTrace()
            outputs = model(pixel_values=pixels_BCYX, routing_trace=trace, **asked)
            coefficient = self.base_model.config.moh["balance_coefficient"]
            return outputs, [routing for _, routing in trace.layers], coefficient
        return model(pixel_values=pixels_BCYX, **asked), [], 0.0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; what the model exempts, or else all biases and norms, has no weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        exempt = self.base_model.no_weight_decay() if hasattr(self.base_model, "no_weight_decay") else set()
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in (self.model if model is None else model).named_parameters():
            if parameter.requires_grad:
                plain = name.removeprefix("module.")
                groups[parameter.dim() > 1 and plain not in exempt].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": self.training.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=self.training.learning_rate,
            fused=self.args.device.type in ("cpu", "cuda"),
        )
        return self.optimizer


class Evaluations(TrainerCallback):
    """Measures the model at checkpoints; every process looks at its part of the images.

    Args:
        trainer: whose model it is.
        images: to measure on.
    """

    def __init__(self, trainer: ImageTrainer, images: LabelledImages) -> None:
        accelerator = trainer.accelerator
        self.trainer = trainer
        self.images = part(images, accelerator.process_index, accelerator.num_processes)
        # In units of checkpoints: they are whole numbers of steps, epochs are not.
        self.every = round(trainer.training.evaluate_every / trainer.training.save_every)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds a row to `evaluations.csv`, behind those of earlier steps."""
        if state.global_step % (self.every * args.save_steps):
            return
        trainer = self.trainer
        autocast = torch.bfloat16 if trainer.bf16_autocast else None
        result = evaluate_images(trainer.base_model, trainer.processor, self.images, 256, autocast=autocast)
        right = int(result.confusion_CL.diagonal().sum())
        counts = torch.tensor([result.images, right, result.top5], dtype=torch.float64, device=args.device)
        total, right, top5 = trainer.accelerator.reduce(counts, "sum").tolist()
        if trainer.accelerator.is_main_process:
            path = trainer.run_folder / "evaluations.csv"
            rows = [row for row in read_rows(path) if int(row["step"]) < state.global_step]
            row = {"step": state.global_step, "images": int(total), "top1": right / total, "top5": top5 / total}
            lines = [",".join(str(value) for value in r.values()) for r in (*rows, row)]
            write_text(path, "\n".join([",".join(row), *lines]) + "\n")


def sharding(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of the Trainer that shard the model, one part for each of its blocks; checkpoints hold it whole.

    Raises:
        MixheadError: on CPUs, where accelerate would copy the model to every process without a word.
    """
    if not torch.accelerator.is_available():
        raise MixheadError("fsdp=true needs GPUs: without them several processes train with copies (fsdp=false).")
    blocks = list(model._no_split_modules or ())
    config = {"version": 2, "transformer_layer_cls_to_wrap": blocks, "state_dict_type": "FULL_STATE_DICT"}
    return {"fsdp": True, "fsdp_config": config}


def image_side(processor: ImageProcessingMixin) -> int:
    """The side in pixels of what a processor hands to the model.

    Raises:
        MixheadError: where that is no square.
    """
    crops = getattr(processor, "do_center_crop", None)
    size = processor.crop_size if crops else processor.size
    height, width = size.get("height"), size.get("width")
    if height is None or height != width:
        raise MixheadError(f"The image processor makes images of {dict(size)}: training needs square ones.")
    return int(height)
