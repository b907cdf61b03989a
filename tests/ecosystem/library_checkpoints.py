"""Checkpoints as timm, Lightning, transformers, accelerate, peft, fastai and ultralytics write them."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.ecosystem.checkpoint import Checkpoint, State
from tests.ecosystem.pictures import batch
from tests.ecosystem.torch_checkpoints import cloned, shifted

# ---------------------------------------------------------------------------------------------------------------- timm


def _timm(folder: Path, model: nn.Module) -> State:
    """As train.py: its saver, an average of the weights, and its arguments beside them."""
    from timm.utils import CheckpointSaver, ModelEmaV3

    plain, average = cloned(model), ModelEmaV3(model, decay=0.5)
    args = argparse.Namespace(
        model="resnet18", num_classes=3, opt="adamw", weight_decay=0.05, lr=0.001, img_size=None,
        input_size=(3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop_pct=1.0,
        smoothing=0.1, seed=42,
        model_kwargs={"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8},
    )  # fmt: skip
    shifted(model)
    average.update(model)
    model.load_state_dict(plain)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    folder.joinpath("output").mkdir()
    saver = CheckpointSaver(
        model, optimizer, args=args, model_ema=average, checkpoint_dir=str(folder / "output"),
        recovery_dir=str(folder / "output"),
    )  # fmt: skip
    saver.save_checkpoint(0, metric=50.0)
    saver.save_checkpoint(1, metric=40.0)
    return plain


def _timm_average(folder: Path, model: nn.Module) -> State:
    _timm(folder, model)
    content = torch.load(folder / "output" / "last.pth.tar", weights_only=False)["state_dict_ema"]
    return dict(content)


TIMM = Checkpoint(
    "timm, train.py", "`state_dict`, `state_dict_ema`, optimizer, `args`: a Namespace",
    "checkpoint: output/model_best.pth.tar", _timm,
)  # fmt: skip
TIMM_EMA = Checkpoint(
    "timm, train.py", "the same; the averaged weights",
    "checkpoint: {file: output/last.pth.tar, key: state_dict_ema}", _timm_average,
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------- Lightning

LIGHTNING = """
import lightning
import torch
import torchmetrics
from torch import nn

from model import build


class Lit(lightning.LightningModule):
    def __init__(self, outputs=3, lr=0.01, weight_decay=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.model = build(outputs)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)


class LitObjects(lightning.LightningModule):
    def __init__(self, net, optimizer, criterion):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.criterion = net, criterion
        self.train_acc = torchmetrics.classification.MulticlassConfusionMatrix(num_classes=3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        self.train_acc.update(self(x), y)
        return self.criterion(self(x), y)

    def configure_optimizers(self):
        return self.hparams.optimizer(self.parameters())
"""


def _modules(folder: Path, **sources: str) -> dict[str, Any]:
    """Import modules of a project's folder, and forget them: the commands import them anew."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    sys.path.insert(0, str(folder))
    try:
        return {name: __import__(name) for name in sources}
    finally:
        sys.path.remove(str(folder))


def _fit(module: Any, folder: Path, name: str) -> None:
    """Train for an epoch as Lightning does, and save a checkpoint as its callback would."""
    import lightning

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch("train")), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / name)
    module.eval()


def _lightning(folder: Path, model: nn.Module) -> State:
    made = _modules(folder, model=(folder / "model.py").read_text(), lit=LIGHTNING)
    try:
        module = made["lit"].Lit()
        module.model.load_state_dict(model.state_dict())
        _fit(module, folder, "last.ckpt")
    finally:
        for name in made:
            del sys.modules[name]
    return cloned(module.model)


def _lightning_objects(folder: Path, model: nn.Module) -> State:
    made = _modules(folder, model=(folder / "model.py").read_text(), lit=LIGHTNING)
    try:
        criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0]))
        module = made["lit"].LitObjects(model, functools.partial(torch.optim.SGD, lr=0.01), criterion)
        _fit(module, folder, "epoch=0-step=3.ckpt")
    finally:
        for name in made:
            del sys.modules[name]
    return cloned(module.net)


LIGHTNING_MODULE = Checkpoint(
    "Lightning, Trainer.save_checkpoint", "`state_dict` of the module, loops, plain hyper-parameters",
    "{factory: './lit.py:Lit', checkpoint: last.ckpt}", _lightning,
)  # fmt: skip
LIGHTNING_NET = Checkpoint(
    "Lightning, Trainer.save_checkpoint", "the same, for the network inside the module",
    "checkpoint: last.ckpt", _lightning,
)  # fmt: skip
LIGHTNING_OBJECTS = Checkpoint(
    "Lightning, Trainer.save_checkpoint",
    "hyper-parameters that are objects (net, loss, optimizer); `criterion.weight` and buffers beside the net's weights",
    "checkpoint: {file: epoch=0-step=3.ckpt, strip: net.}", _lightning_objects,
)  # fmt: skip

# -------------------------------------------------------------------------------------------------------- transformers

FROM_PRETRAINED = "factory: transformers.AutoModelForImageClassification.from_pretrained"


def _processor(folder: Path) -> Any:
    from transformers import ViTImageProcessor

    made = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    made.save_pretrained(folder)
    return made


def _folder(folder: Path, model: Any) -> State:
    model.save_pretrained(folder / "out")
    _processor(folder / "out")
    return cloned(model)


def _shards(folder: Path, model: Any) -> State:
    model.save_pretrained(folder / "out", max_shard_size="16KB")
    _processor(folder / "out")
    assert len(list((folder / "out").glob("model-*.safetensors"))) > 1
    return cloned(model)


def _trainer(folder: Path, model: Any) -> State:
    """As transformers' Trainer after two steps: a folder for each checkpoint."""
    from transformers import Trainer, TrainingArguments

    inputs, labels = batch("train")
    data = [{"pixel_values": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=2, per_device_train_batch_size=16, report_to=[], use_cpu=True,
        disable_tqdm=True, save_steps=2, dataloader_num_workers=0, dataloader_pin_memory=False,
    )  # fmt: skip
    processor = _processor(folder / "base")
    Trainer(model, arguments, train_dataset=data, processing_class=processor).train()  # type: ignore[arg-type]
    model.eval()
    return cloned(model)


def _accelerate(folder: Path, model: nn.Module) -> State:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator.prepare(model, optimizer)
    accelerator.save_state(str(folder / "state"))
    accelerator.free_memory()
    return cloned(model)


ADAPTED = """
import torch
from model import build as base
from peft import LoraConfig, get_peft_model


def build():
    torch.manual_seed(1)
    return get_peft_model(base(), LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights=False
    ))
"""


def _adapter(folder: Path, model: Any) -> State:
    """As peft: the base model in one folder, the trained adapter and the head in another."""
    model.save_pretrained(folder / "base")
    _processor(folder / "base")
    base = _modules(folder, model=(folder / "model.py").read_text())["model"]
    scope: dict[str, Any] = {}
    try:
        exec(ADAPTED, scope)  # our text above
    finally:
        del sys.modules[base.__name__]
    adapted = scope["build"]()
    state = {f"base_model.model.{key}": value for key, value in cloned(model).items()}
    names = {key.replace(".base_layer", "").replace(".modules_to_save.default", ""): key for key in cloned(adapted)}
    with torch.no_grad():
        for key, value in state.items():
            adapted.get_parameter(names[key]).copy_(value)
        adapted.get_parameter(names["base_model.model.classifier.bias"]).add_(0.1)
    adapted.peft_config["default"].base_model_name_or_path = "base"  # as of a base model that was loaded from there
    adapted.save_pretrained(folder / "adapter")
    return cloned(adapted.eval())


MAPPED = f"{{{FROM_PRETRAINED}, args: {{pretrained_model_name_or_path: out}}, checkpoint: out}}"
HF_FOLDER = Checkpoint(
    "transformers, save_pretrained", "a folder: `config.json`, `model.safetensors`", "checkpoint: out", _folder
)
HF_ITSELF = Checkpoint(
    "transformers, save_pretrained", "the same, loaded by transformers itself",
    f"{{{FROM_PRETRAINED}, args: {{pretrained_model_name_or_path: out}}}}", _folder,
)  # fmt: skip
HF_BOTH = Checkpoint("transformers, save_pretrained", "the same, named twice", MAPPED, _folder)
HF_SHARDS = Checkpoint(
    "transformers, save_pretrained", "shards and `model.safetensors.index.json`", "checkpoint: out", _shards
)
HF_TRAINER = Checkpoint(
    "transformers, Trainer", "`checkpoint-2/` with optimizer, scheduler, `training_args.bin`",
    "checkpoint: run/checkpoint-2", _trainer,
)  # fmt: skip
ACCELERATE = Checkpoint(
    "accelerate, save_state", "`model.safetensors`, `optimizer.bin`, `random_states_0.pkl`",
    "checkpoint: state/model.safetensors", _accelerate,
)  # fmt: skip
PEFT = Checkpoint(
    "peft, save_pretrained", "a folder: `adapter_config.json`, `adapter_model.safetensors`",
    f"{{{FROM_PRETRAINED}, args: {{pretrained_model_name_or_path: base}}, checkpoint: adapter}}", _adapter,
    reference=ADAPTED,
)  # fmt: skip

# -------------------------------------------------------------------------------------------------------------- fastai


def _learner(folder: Path, model: nn.Module) -> Any:
    from fastai.vision.all import ImageDataLoaders, Learner, Resize

    data = ImageDataLoaders.from_folder(
        folder, train="train", valid="val", item_tfms=Resize(32), bs=16, num_workers=0, device="cpu"
    )
    learner = Learner(data, model, loss_func=nn.CrossEntropyLoss(), path=folder, lr=0.001)
    with learner.no_logging():
        learner.fit(1)
    model.eval()
    return learner


def _fastai(folder: Path, model: nn.Module) -> State:
    _learner(folder, model).save("m")
    return cloned(model)


def _fastai_weights(folder: Path, model: nn.Module) -> State:
    _learner(folder, model).save("m", with_opt=False)
    return cloned(model)


def _fastai_export(folder: Path, model: nn.Module) -> State:
    _learner(folder, model).export("export.pkl")
    return cloned(model)


FASTAI = Checkpoint("fastai, learn.save", "`model` and `opt`", "checkpoint: models/m.pth", _fastai)
FASTAI_WEIGHTS = Checkpoint(
    "fastai, learn.save(with_opt=False)", "a state dict", "checkpoint: models/m.pth", _fastai_weights
)
FASTAI_EXPORT = Checkpoint(
    "fastai, learn.export", "a pickled `Learner`", "checkpoint: export.safetensors", _fastai_export,
    convert="export.pkl",
)  # fmt: skip

# --------------------------------------------------------------------------------------------------------- ultralytics


def _ultralytics(folder: Path, _model: nn.Module) -> State:
    """As its own trainer: best.pt has the averaged weights, as a pickled module in half precision."""
    import yaml
    from ultralytics import YOLO

    from tests.ecosystem.networks import YOLO as SOURCE

    scope: dict[str, Any] = {}
    exec(SOURCE, scope)  # our text there
    (folder / "tiny-cls.yaml").write_text(yaml.safe_dump(scope["LAYERS"]))
    YOLO(folder / "tiny-cls.yaml", task="classify").train(
        data=str(folder), epochs=1, imgsz=32, batch=16, workers=0, device="cpu", amp=False, plots=False, verbose=False,
        project=str(folder / "runs"), name="train", exist_ok=True,
    )  # fmt: skip
    (folder / "runs" / "train" / "weights" / "best.pt").rename(folder / "best.pt")
    model = torch.load(folder / "best.pt", weights_only=False)["model"]
    assert next(model.parameters()).dtype == torch.float16
    return {key: value.float() if value.is_floating_point() else value for key, value in cloned(model).items()}


ULTRALYTICS = Checkpoint(
    "ultralytics, best.pt", "pickled modules in half precision under `ema` or `model`", "checkpoint: best.safetensors",
    _ultralytics, convert="best.pt",
)  # fmt: skip
