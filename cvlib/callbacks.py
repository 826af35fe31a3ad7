"""What watches a run while Trainer runs it: a guard, a keeper of checkpoints, and a writer of steps.

The guard turns two failures that stay silent elsewhere into a stop with a reason:

* a trainable parameter without a gradient (traps 14 and 21: the loss prints, nothing learns),
* a loss that is not finite, or exactly 0 (trap 9).

Trainer logs every step, so a bad loss is seen before anything of that step is saved.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from cvlib import InputError, checkpoints


class Guard(TrainerCallback):
    """Stop a run that looks alive and learns nothing."""

    def on_train_begin(self, args, state, control, **_):
        if 2 * args.warmup_steps > state.max_steps and args.warmup_steps >= 1:  # trap 13
            raise InputError(
                f"schedule.warmup_steps is {args.warmup_steps:.0f}, but the run has {state.max_steps} steps; choose "
                "fewer, or 0 to climb for schedule.warmup_ratio of them"
            )
        if args.get_warmup_steps(state.max_steps) >= state.max_steps:
            raise InputError(
                f"all {state.max_steps} steps of this run are warm-up, from rate 0; set schedule.warmup_ratio=0, or "
                "train for longer"
            )

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        missing = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        if missing:
            raise InputError(
                f"{len(missing)} trainable parameters got no gradient (first: {missing[0]}); load the base with "
                "cvlib.loading, which keeps quantised and checkpointed models trainable"
            )

    def on_log(self, args, state, control, logs=None, **_):
        loss = (logs or {}).get("loss")
        if loss is not None and not 0 < loss < float("inf"):
            raise InputError(
                f"the loss is {loss} at step {state.global_step}; lower schedule.learning_rate, "
                "and on cards older than Turing use bits: 16"
            )


class Keeper(TrainerCallback):
    """Mark each checkpoint when it is whole; on Ctrl-C, or a cluster's SIGTERM, save one and stop."""

    def __init__(self):
        self.asked, self.stopped_at = False, 0

    def __enter__(self) -> Keeper:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self.asked and number == signal.SIGINT:  # Ctrl-C a second time: at once
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **_):
        asked = torch.tensor(int(self.asked), device=args.device)
        if args.world_size > 1:  # every process must stop after the same step
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if state.global_step == state.max_steps:
            control.should_save = False  # the run itself is written now
        elif asked:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **_):
        checkpoints.wait()  # the other processes' random numbers belong to it
        if not state.is_world_process_zero:
            return
        checkpoints.mark(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class Steps(TrainerCallback):
    """One line per optimiser step into `metrics.jsonl`, and a progress bar with loss and tokens per second."""

    def __init__(self, path: Path):
        self.path, self.bar = path, None
        self.rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []

    def on_train_begin(self, args, state, control, **_):
        from tqdm import tqdm

        self.started, self.tokens = time.perf_counter(), state.num_input_tokens_seen
        self.earlier = self.rows[-1]["seconds"] if self.rows else 0.0
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:
            return
        exact, seconds = state.log_history[-1], time.perf_counter() - self.started
        row = {"step": state.global_step, "loss": exact["loss"], "learning_rate": exact["learning_rate"]}
        row |= {"tokens": state.num_input_tokens_seen, "seconds": round(self.earlier + seconds, 3)}
        self.rows.append(row)
        if self.bar is None:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        speed = (state.num_input_tokens_seen - self.tokens) / seconds
        self.bar.set_postfix({"loss": f"{row['loss']:.3f}", "tokens/s": f"{speed:.0f}"}, refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def close(self) -> None:
        """End the progress bar's line, also when the run was stopped."""
        if self.bar is not None:
            self.bar.close()
