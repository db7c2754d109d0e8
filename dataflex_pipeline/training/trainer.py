"""TRL's SFTTrainer with a weight per row, an evaluation that no batch size changes, and whole checkpoints.

Loss of an optimizer step over its rows i and their response tokens t (all micro-batches, all processes):

    L = sum_i w_i sum_t l_it / sum_i T_i + c a

with l_it the negative log-likelihood in nats and T_i the number of labels != -100 after the shift by one
(a label at the very first position has nothing before it and counts nowhere). The denominator is TRL's
own and carries no weights, so w = 1 is exactly TRL's loss and a step of a single row feels its weight. a is
the load-balancing loss of a mixture of experts, the mean over the step's micro-batches of what the model
itself gives for one, over all its tokens and without weights; c is router_aux_loss_coef, by default the
model's own. Other models have no such term.

TRL computes l from the last hidden states and the head's weight. On the first row that a process trains, that
is compared with the model's own logits; where they differ, l comes from the model's own (own_logits.py).
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253 (this module is only imported to train)
from safetensors import SafetensorError
from transformers import set_seed  # noqa: TID253
from trl import SFTTrainer  # noqa: TID253

from dataflex_pipeline.errors import RunError, UserError
from dataflex_pipeline.models.base import widest_float
from dataflex_pipeline.models.room import give_memory_back, memory_failure
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.training.arguments import no_aux_loss
from dataflex_pipeline.training.own_logits import OwnLogits
from dataflex_pipeline.training.pieces import Pieces, cut, halved
from dataflex_pipeline.training.sharded import save_adam_states

if TYPE_CHECKING:
    from dataflex_pipeline.training.conductor import Conductor

NOT_KEPT = ("training_args.bin", "README.md", "zero_to_fp32.py", "zero_to_torch.py")
"""Files that transformers, peft and DeepSpeed write beside the weights: a pickle, which is never read here, a
model card without content, and programs."""

FAILED_WRITES = ("(os error ", "inline_container.cc", "PytorchStreamWriter", "iostream error")
"""What errors of no kind of their own say when a write failed: tokenizers' (the first) and torch.save's."""

LOSS_TOLERANCE, COARSE_LOSS_TOLERANCE = 1e-3, 1.0
"""Difference (nats) of one token's log-probability that rounding explains where logits are as large as 64:
sums in another order in fp32, and in bf16 the rounding of 64 to its 8 bits, twice."""
ROUTING = ("output_router_logits", "router_aux_loss_coef")
"""What TRL changes of a mixture of experts' configuration, which is saved with the checkpoint."""

NOT_FOR_WANT_OF_ROOM = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
"""Errors of the system that the command explains itself: the folder is read-only, or its disk has failed."""


class WeightedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on rows of input_ids, labels and weight.

    Args:
        conductor: decides when to evaluate, save and stop, and keeps the books of the round.
        seed: of the random stream of a process that the checkpoint has none for.
        aux_loss_asked: whether the configuration asks for a load-balancing loss, so that it must be there.
        arguments: as for SFTTrainer; the model has the weights of the checkpoint that is continued.
    """

    def __init__(self, conductor: Conductor, seed: int, aux_loss_asked: bool, **arguments: Any) -> None:
        text = arguments["model"].config.get_text_config()
        routing = {name: getattr(text, name) for name in ROUTING if hasattr(text, name)}
        super().__init__(callbacks=[conductor], **arguments)
        for name, value in routing.items():  # what TRL puts there would be saved with the checkpoint
            setattr(text, name, value)
        self.conductor = conductor
        self.stream_seed = seed
        self.aux_loss_asked = aux_loss_asked
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.own_logits = OwnLogits(base)
        self.loss_is_checked = False
        self.pieces: Pieces | None = None
        self.evaluation_tokens: int | None = None
        self.control: Any
        self.loss_of_step = torch.zeros((), device=self.args.device)
        self.norm_of_step: float | None = None

    def _set_signature_columns_if_needed(self) -> None:
        # A column that is not named here is dropped before the collator sees it, without a word.
        self._signature_columns = ["input_ids", "labels", "weight"]

    def take_rows_at_a_time(self, rows: int) -> None:
        """Divide the rows of a step among more micro-batches, before the training begins.

        Args:
            rows: per process and micro-batch; divides what there were so far.
        """
        self.args.gradient_accumulation_steps *= self.args.per_device_train_batch_size // rows
        self.args.per_device_train_batch_size = rows
        self._train_batch_size = self.args.train_batch_size

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load nothing: the model has the checkpoint's weights from the start (`load_for_training`)."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load Adam's states, which go by number, and check that each number still is the same parameter."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        live = _parameter_names(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        for number, (name, saved) in enumerate(zip(live, _parameter_names(self.optimizer), strict=True)):
            if name != saved:
                raise RunError(
                    f"The optimizer states in {checkpoint} are those of other parameters: number {number} "
                    f"was {saved} and is {name}.",
                    "They are loaded by number, so each would go to another parameter without a word.",
                    "Go on with the versions of transformers and peft that made the checkpoint, or train "
                    "from the warm-up on under another run name.",
                )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: a checkpoint inside a run is described by its marker."""

    def create_optimizer(self, model: Any = None) -> Any:
        """Create AdamW as transformers does, and put the parameters' names into its groups."""
        optimizer = super().create_optimizer(model)
        names = {id(parameter): name for name, parameter in (model or self.model).named_parameters()}
        for group in optimizer.param_groups:
            group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
        return optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the micro-batch's share of the step's loss, each row's tokens scaled by its weight."""
        weight = inputs.pop("weight")  # [B]
        if not self.loss_is_checked:
            self._check_loss(model, inputs)

        def scale(_module: Any, _inputs: Any, outputs: Any) -> Any:
            # The loss is linear in the tokens' log-probabilities, so scaling them here leaves the rest of
            # TRL's computation (denominator, ranks, auxiliary losses) as it is.
            outputs.log_probs = outputs.log_probs * weight[:, None]  # [B, T - 1]
            return outputs

        hook = model.register_forward_hook(scale)
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            hook.remove()

    def _check_loss(self, model: Any, inputs: dict[str, Any]) -> None:
        """Compare TRL's loss with the model's own on the first row of a batch; all processes decide alike.

        Raises:
            ConfigError: a load-balancing loss was asked for and the model gives none.
        """
        length = int(inputs["attention_mask"][0].sum())
        row = {name: tensor[:1, :length] for name, tensor in inputs.items()}
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                found = self.own_logits.check(model, row, self.aux_loss_enabled)
        finally:
            self.model.train(was_training)
        difference = torch.tensor([found.difference], device=self.args.device)
        worst = float(self.accelerator.gather(difference).max())
        self.own_logits.on = not worst <= (COARSE_LOSS_TOLERANCE if self.args.bf16 else LOSS_TOLERANCE)
        if self.own_logits.on:
            why = f" ({found.failure})" if found.failure else ""
            self.conductor.note(
                f"TRL's fused head does not compute this model's logits{why}: the loss comes from the "
                "model's own logits, which takes more memory."
            )
        if self.aux_loss_enabled:
            self._settle_aux_loss(found.gives_aux_loss)
        self.loss_is_checked = True

    def _settle_aux_loss(self, is_given: bool) -> None:
        kind, c = self.model.config.get_text_config().model_type, self.router_aux_loss_coef
        if is_given:
            self.conductor.note(
                f"The load-balancing loss of the experts is added, {c} times (router_aux_loss_coef); the "
                "rows' weights do not change it."
            )
            return
        if self.aux_loss_asked:
            raise no_aux_loss(c, kind)
        self.aux_loss_enabled = False
        self.conductor.note(f"A model of type {kind} gives no load-balancing loss, so none is added.")

    def watch_memory(self, dropout: bool) -> None:
        """Take micro-batches in smaller pieces where the memory is too small for them (pieces.py).

        Args:
            dropout: whether the model draws random numbers.
        """
        self.pieces = Pieces(
            self.conductor.plan,
            self.args.device,
            self.conductor.note,
            lambda: self.model.zero_grad(set_to_none=True),
            dropout,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of the next step, and how many tokens they predict."""
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        if self.pieces is not None:
            self.pieces.begin(batches)
        return batches, tokens

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one micro-batch and add its loss to the step's."""
        whole = super().training_step
        if self.pieces is None:
            loss: torch.Tensor = whole(model, inputs, num_items_in_batch)
        else:
            step = self.state.global_step + 1
            loss, anew = self.pieces.take(step, lambda piece: whole(model, piece, num_items_in_batch))
            if anew:
                self.loss_of_step.zero_()
        self.loss_of_step += loss
        return loss

    def take_step_loss(self) -> float:
        """Return the loss of the step that just ended, over all processes, and begin the next one."""
        # Each process holds its share times the number of processes, because DDP averages gradients.
        value: float = self.accelerator.gather(self.loss_of_step.reshape(1)).mean().item()
        self.loss_of_step.zero_()
        return value

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.norm_of_step = None if norm is None else float(norm)  # DeepSpeed at stage 0 gives none
        return norm

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on the whole target.

        Returns:
            eval_loss: sum of the tokens' negative log-likelihoods over all rows / number of those tokens
            (nats per token; a long answer counts more than a short one, a batch size changes nothing).
            eval_token_accuracy: share of those tokens that are the model's most likely one.
        """
        # A data loader draws from the random stream when it starts; dropout must not depend on evaluations.
        with torch.random.fork_rng(devices=[]):
            nll, correct, tokens = self._sum_over_rows().tolist()
        metrics = {
            f"{metric_key_prefix}_loss": nll / max(tokens, 1.0),
            f"{metric_key_prefix}_token_accuracy": correct / max(tokens, 1.0),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.conductor.keep_best(self)
        return metrics

    def _sum_over_rows(self) -> torch.Tensor:
        model = self.model_wrapped
        model.eval()
        rows = []
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                inputs.pop("weight")
                # Gathering row by row drops what the loader repeated to fill the processes' last batches.
                rows.append(self.accelerator.gather_for_metrics(self._row_sums(inputs)).cpu().double())
        return torch.cat(rows).sum(0)  # [3]

    def _row_sums(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the sums of each row of a batch, which is cut where the memory is too small. [B, 3]"""
        if self.args.world_size > 1 or self.is_deepspeed_enabled:  # whose forward passes call each other
            return self._piece_sums(inputs)
        while True:
            found: list[torch.Tensor] = []
            pieces = cut(inputs, self.evaluation_tokens)
            failure = memory_failure(lambda: found.extend(map(self._piece_sums, pieces)))  # noqa: B023
            if failure is None:
                return torch.cat(found)
            found.clear()
            give_memory_back()
            rows, length = pieces[0]["input_ids"].shape
            self.evaluation_tokens = halved(rows, length, "an evaluation", failure, self.args.device)
            self.conductor.note(
                f"The memory of {self.args.device} was too small for an evaluation of {rows} rows of up to "
                f"{length:,} tokens: at most {self.evaluation_tokens:,} padded tokens are taken at a time."
            )

    def _piece_sums(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return negative log-likelihood, tokens predicted right and tokens of each row. [B, 3]"""
        with self.compute_loss_context_manager():
            out = self.model_wrapped(**inputs, use_cache=False, fused_lm_head=True)
        widest = widest_float(out.log_probs.device)
        per_row = [-out.log_probs.to(widest).sum(1), out.is_top1.sum(1), out.label_mask.sum(1)]
        return torch.stack([column.to(widest) for column in per_row], dim=1)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        world = self.args.world_size
        names = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
        if checkpoint is None or all((Path(checkpoint) / name).is_file() for name in names):
            super()._load_rng_state(checkpoint)
            return
        # Another number of processes than the checkpoint was made with: dropout, if there is any, cannot
        # be what it would have been; it must still not be the same on every process.
        step = self.state.global_step
        set_seed(derive_seed(self.stream_seed, "resume", step, self.args.process_index) % 2**32)
        self.conductor.say_streams_restarted()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # What the library logs are means since the process began; ours are the same after any kill.
        before = [line for line in self.state.log_history if line["step"] <= self.conductor.plan.first_step]
        self.state.log_history = before + [dict(line) for line in self.conductor.log.lines]
        with writing(folder):
            super()._save_checkpoint(model, trial)
            if self.is_deepspeed_enabled:
                save_adam_states(self, folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with writing(folder):
                remove_unkept(folder)
                self.conductor.complete(folder)
            self.conductor.prune(folder)
        self.accelerator.wait_for_everyone()


def _parameter_names(optimizer: Any) -> list[str]:
    """Return the names of an optimizer's parameters, in its order."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failed write (a full disk, a quota) into an error that says so; the folder is removed.

    safetensors and torch raise errors of their own kinds where the system's write fails, tokenizers a bare
    Exception that ends in the system's error number. Any other error leaves the folder and goes on.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in NOT_FOR_WANT_OF_ROOM:
            raise
        own = isinstance(error, OSError | SafetensorError)
        if not own and not any(sign in str(error) for sign in FAILED_WRITES):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 2**20
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"The checkpoint {folder} could not be written: {found}",
            f"{free:.0f} MiB are free there (a quota or a file-size limit may allow less).",
            "Make room and run the same command again; it goes on from the last complete checkpoint.",
        ) from error


def remove_unkept(folder: Path) -> None:
    """Remove what a checkpoint should not hold (`NOT_KEPT`), and put the adapter's modules in order."""
    for name in NOT_KEPT:
        (folder / name).unlink(missing_ok=True)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        # peft keeps the module names as a set, whose order differs from process to process.
        content = json.loads(adapter.read_text("utf-8"))
        for key, value in content.items():
            if isinstance(value, list) and all(isinstance(name, str) for name in value):
                content[key] = sorted(value)
        adapter.write_text(json.dumps(content, indent=2, sort_keys=True), "utf-8")


def refuse_not_finite(loss: float, norm: float | None, step: int, rows: list[int]) -> None:
    """Raise RunError when the loss of a step or the norm of its gradient (where known) is not finite."""
    if not (math.isfinite(loss) and (norm is None or math.isfinite(norm))):
        raise RunError(
            f"The training loss of step {step} is {loss}, its gradient's norm {norm} "
            f"(pool rows {', '.join(map(str, rows[:8]))}...).",
            "A weight update with it would spoil the model; nothing was saved after the last checkpoint.",
            "Lower learning_rate, set max_grad_norm, or look at those rows.",
        )
