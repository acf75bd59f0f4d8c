"""Tiny models, a tokenizer of whole words and pairs for TRL's trainers; and two trainers held against each other."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

REASON = 'needs pip install "fastpref[trl]"'
datasets = pytest.importorskip("datasets", reason=REASON)
trl = pytest.importorskip("trl", reason=REASON)

WORDS = ["the", "sky", "is", "blue", "green", "what", "colour", "of", "today", "?", "one", "two", "very"]
ROWS = [
    {
        "prompt": f"what is the colour of {WORDS[i]} ?",
        "chosen": " the sky is blue" + " very" * (i % 4),
        "rejected": " the green" + " one" * (i % 3),  # begins as the chosen one does
    }
    for i in range(13)
]
RELATIVE = 1e-4
SHAPE = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *WORDS]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def enlarge(model: Any) -> Any:
    """Weights as small as initial ones give almost the same logits everywhere."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    return enlarge(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})))


@pytest.fixture(autouse=True, scope="session")
def frozen() -> Iterator[None]:
    """`train()` ends with a garbage collection, which walks through all that was imported: longer than it trains."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def installed() -> Iterator[None]:
    """TRL asks twice a step whether PEFT is installed, and its metadata is read each time: a fifth of such a step."""
    from accelerate.utils import imports

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imports, "_is_package_available", functools.cache(imports._is_package_available))
        yield


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    yield
    if bars:
        datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Any]:
    return llama


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    return ROWS


@pytest.fixture(scope="session")
def make_trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A trainer of the class given; a reference that is not the policy, unless told otherwise."""

    def make(
        cls: Any,
        *,
        model: Any = None,
        reference: Any = "other",
        config: Any = None,
        parts: Any = None,
        data: Any = None,
        **changes: Any,
    ) -> Any:
        config = trl.DPOConfig if config is None else config
        policy = llama() if model is None else model
        if reference == "other":
            torch.manual_seed(5)
            reference = copy.deepcopy(policy)
            with torch.no_grad():
                for parameter in reference.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("trl")
        options = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "max_steps": 10,
            "learning_rate": 1e-2,
            "beta": 0.3,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        }
        return cls(
            model=policy,
            ref_model=reference,
            args=config(**options),
            train_dataset=datasets.Dataset.from_list(ROWS if data is None else data),
            processing_class=word_tokenizer(),
            **(parts or {}),
        )

    return make


@pytest.fixture(scope="session")
def make_both(make_trainer: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """TRL's trainer and ours on equal models."""

    from fastpref.integrations.trl import FastPrefDPOTrainer

    def make(model: Callable[[], Any] = llama, **options: Any) -> tuple[Any, Any]:
        classes = trl.DPOTrainer, FastPrefDPOTrainer
        theirs, ours = (make_trainer(cls, model=model(), **options) for cls in classes)
        return theirs, ours

    return make


def once(module: Any) -> Callable[..., Any]:
    """The module, run the first time alone: several losses of one forward."""
    outputs: list[Any] = []

    def run(**inputs: Any) -> Any:
        if not outputs:
            outputs.append(module(**inputs))
        return outputs[0]

    return run


def one_step(
    trainer: Any, batch: dict[str, Any], model: Any = None
) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradients of a batch; `model` runs in place of the trainer's, and may be run backward again."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    loss = trainer.compute_loss(trainer.model if model is None else model, batch)
    loss.backward(retain_graph=model is not None)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    gradients = {name: x.grad for name, x in trainer.model.named_parameters() if x.grad is not None}
    return loss.item(), metrics, gradients


def assert_equal_steps(theirs: Any, ours: Any) -> float:
    """What `one_step` gives for both; the norm of the gradient."""
    (expected, metrics, gradients), (loss, our_metrics, our_gradients) = theirs, ours
    assert loss == pytest.approx(expected, rel=RELATIVE, abs=1e-6)
    assert list(our_metrics) == list(metrics)
    for name, value in metrics.items():
        assert our_metrics[name] == pytest.approx(value, rel=RELATIVE, abs=1e-5), name
    assert set(our_gradients) == set(gradients)
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    for name, gradient in gradients.items():
        away = (our_gradients[name] - gradient).norm()
        assert away <= RELATIVE * gradient.norm() + 1e-6 * whole, (name, away / gradient.norm())
    return whole


def follow(theirs: Any, ours: Any) -> None:
    """A step along the gradient, after which both have equal weights."""
    with torch.no_grad():
        moved = [parameter for parameter in theirs.model.parameters() if parameter.grad is not None]
        norm = torch.cat([parameter.grad.flatten() for parameter in moved]).norm().clamp(min=1e-6)
        for parameter in moved:
            parameter -= 0.02 * parameter.grad / norm
        state = theirs.model.state_dict()
        for name, parameter in ours.model.state_dict().items():
            parameter.copy_(state[name])


@pytest.fixture(scope="session")
def same_steps() -> Callable[..., None]:
    """10 steps of both trainers on the same batches and from equal weights: loss, metrics and gradients agree.

    With `losses` each of these types at each step, of one forward; the step is along the gradient of the last.
    """

    def check(theirs: Any, ours: Any, *, steps: int = 10, change: Any = None, losses: Any = (None,)) -> None:
        batches = [batch for _ in range(4) for batch in theirs.get_train_dataloader()][:steps]
        assert len(batches) == steps
        largest = dict.fromkeys(losses, 0.0)
        references = theirs.ref_model, ours.ref_model
        for batch in batches:
            given = batch if change is None else change(batch)
            models = [None, None]
            if losses != (None,):
                models = [once(trainer.model) for trainer in (theirs, ours)]
                theirs.ref_model, ours.ref_model = (once(reference) for reference in references)
            for loss in losses:
                if loss is not None:
                    theirs.loss_types = ours.loss_types = [loss]
                found = [one_step(t, dict(given), model) for t, model in zip((theirs, ours), models, strict=True)]
                largest[loss] = max(largest[loss], assert_equal_steps(*found))
            follow(theirs, ours)
        theirs.ref_model, ours.ref_model = references
        assert all(largest.values()), largest

    return check
