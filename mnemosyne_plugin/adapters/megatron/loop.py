"""What Megatron-LM's training loop counts, as it is at the begin of a step."""

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mnemosyne_plugin.errors import StateMismatch

_COUNTED = ("consumed_train_samples", "skipped_train_samples")
_RERUN = (
    *("state", "current_iteration", "first_iteration_complete", "rerun_requested"),
    *("checkpoint_requested", "restart_again_requested", "continue_requested"),
    *("large_value_counts", "max_values"),
)


class Loop:
    """Implements Counters.

    The loop counts a step when ``train_step`` has returned, the state of the job is
    the next one's when the step is made: so here it is counted ahead.
    """

    def __init__(self, module: Any, chunks: Sequence[Any]) -> None:
        """module: ``megatron.training.training``."""
        core = "megatron.core."
        self._args = module.get_args()
        self._timers = module.get_timers()
        self._module = module
        self._chunks = chunks
        self._calculator = importlib.import_module(core + "num_microbatches_calculator")
        rerun = importlib.import_module(core + "rerun_state_machine")
        self._rerun = rerun.get_rerun_state_machine()
        self.iterators: list[Any] = []
        """The RerunDataIterators that a step takes from."""
        self._running: set[str] | None = None  # until the first step begins
        args = self._args
        self._values = {name: getattr(args, name) for name in _COUNTED} | {
            "iteration": args.iteration,
            "operations": args.num_floating_point_operations_so_far,
            "consumed_valid_samples": args.consumed_valid_samples,
            # Megatron leaves the hooks that gather parameters in forward out of the
            # first steps, until one has mutated.
            "gathers_in_forward": False,
        }

    @property
    def iteration(self) -> int:
        """Number of the next step, as Megatron counts."""
        return int(self._values["iteration"])

    @property
    def operations(self) -> float:
        """Floating-point operations of all steps before that, for checkpoints."""
        operations: float = self._values["operations"]
        return operations

    def enter(self) -> None:
        """On a newcomer: have the script's loop begin where the job is."""
        args, values = self._args, self._values
        args.iteration = values["iteration"]
        args.num_floating_point_operations_so_far = values["operations"]
        args.consumed_valid_samples = values["consumed_valid_samples"]
        self.count_samples()
        self._update_num_microbatches()
        if self.is_over:
            # Megatron's samplers refuse to begin where no sample is left.
            args.consumed_train_samples -= args.micro_batch_size * (
                args.data_parallel_size
            )

    def count_samples(self) -> None:
        """Have Megatron's counts of samples be those of the job."""
        for name in _COUNTED:
            setattr(self._args, name, self._values[name])

    @property
    def is_over(self) -> bool:
        """Whether all steps are made."""
        return self.iteration >= int(self._args.train_iters)

    @property
    def is_to_exit(self) -> bool:
        """Whether Megatron exits in front of the next step, by its arguments."""
        args, iteration = self._args, self.iteration
        return bool(
            (args.exit_interval and iteration % args.exit_interval == 0)
            or iteration in (args.phase_transition_iterations or ())
        )

    def begin(self) -> None:
        """In front of a step; raises StateMismatch if the loop is elsewhere."""
        names = {name: name for name in _COUNTED} | {"curr_iteration": "iteration"}
        for name, ours in names.items():
            if getattr(self._args, name) != self._values[ours]:
                raise StateMismatch(
                    f"Megatron's {name} is {getattr(self._args, name)}, expected "
                    f"{self._values[ours]}",
                    key=name,
                )
        if self._running is None:  # the loader has corrected it
            self._values["consumed_valid_samples"] = self._args.consumed_valid_samples
        self._running = self.running_timers()

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Have all as it was in front of the step, which may be an earlier one."""
        self._update_num_microbatches()
        hooked = [chunk for chunk in self._chunks if chunk.use_forward_hook]
        wants = bool(self._values["gathers_in_forward"])
        changed = [
            c for c in hooked if bool(c.remove_forward_pre_hook_handles) != wants
        ]
        config = self._chunks[0].config
        sync = getattr(config, "param_sync_func", None)
        for chunk in changed:
            _set_hooks(chunk, wants)
        if changed and self._chunks[0].ddp_config.align_param_gather:
            syncs = [chunk.start_param_sync for chunk in self._chunks]
            config.param_sync_func = (
                None if not wants else syncs if len(syncs) > 1 else syncs[0]
            )
        try:
            yield
        finally:
            for chunk in changed:
                _set_hooks(chunk, not wants)
            if changed:
                config.param_sync_func = sync

    def advance(self, *, has_mutated: bool) -> None:
        """The step is made."""
        calculator, values = self._calculator, self._values
        batch = calculator.get_current_global_batch_size()
        running = calculator.get_current_running_global_batch_size()
        values["consumed_train_samples"] += running
        values["skipped_train_samples"] += batch - running
        values["iteration"] += 1
        # What the loop itself adds next, but for packed sequences of various lengths.
        values["operations"] += self._module.num_floating_point_operations(
            self._args, running
        )
        values["gathers_in_forward"] |= has_mutated
        args = self._args
        if (
            args.do_valid
            and args.eval_interval
            and values["iteration"] % args.eval_interval == 0
        ):
            values["consumed_valid_samples"] += self.num_valid_samples()

    # --- Counters -------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        rerun = {name: copy.copy(getattr(self._rerun, name)) for name in _RERUN}
        return {**self._values, "rerun": rerun}

    def load(self, values: Mapping[str, Any]) -> None:
        self._values = {name: v for name, v in values.items() if name != "rerun"}
        for name, value in values["rerun"].items():
            setattr(self._rerun, name, copy.copy(value))
        for iterator in self.iterators:
            iterator.saved_microbatches = []
            iterator.replaying, iterator.replay_pos = False, 0
        if self._running is not None:
            self.stop_timers(self._running)

    # --- evaluation ------------------------------------------------------------------

    def num_valid_samples(self, *, of_this_rank: bool = False) -> int:
        """Return how many samples an evaluation takes; or micro-batches, of one rank.

        Source: ``evaluate``. From 0.18 on it has batch sizes of its own.
        """
        args = self._args
        batch = getattr(args, "eval_global_batch_size", None) or args.global_batch_size
        if of_this_rank:
            size = getattr(args, "eval_micro_batch_size", None) or args.micro_batch_size
            replicas = args.data_parallel_size * getattr(
                args, "gtp_weight_remat_size", 1
            )
            batch //= size * replicas
        return int(args.eval_iters * batch)

    def leave_out_evaluation(self) -> None:
        """Count the one that was due behind the last step as all ranks do."""
        self._args.consumed_valid_samples = self._values["consumed_valid_samples"]

    def modes(self) -> Callable[[], None]:
        """Return what brings back the modes that an evaluation changes for a while."""
        config = self._chunks[0].config
        timers, mode = config.timers, self._rerun.get_mode()
        training = [chunk.training for chunk in self._chunks]
        running = self.running_timers()

        def put_back() -> None:
            config.timers = timers
            if self._rerun.get_mode() != mode:
                self._rerun.set_mode(mode)
            for chunk, is_training in zip(self._chunks, training, strict=True):
                chunk.train(is_training)
            self.stop_timers(running)

        return put_back

    # --- timers ----------------------------------------------------------------------

    def running_timers(self) -> set[str]:
        """Return the timers that have been started and not stopped."""
        timers = self._timers._timers.items()
        return {name for name, timer in timers if timer._started}

    def stop_timers(self, running: set[str]) -> None:
        """Have just ``running`` run, after what was unwound."""
        for name, timer in self._timers._timers.items():
            timer._started = name in running

    def _update_num_microbatches(self) -> None:
        consumed = self._values["consumed_train_samples"]
        self._calculator.update_num_microbatches(consumed, consistency_check=False)


def _set_hooks(chunk: Any, wants: bool) -> None:
    if wants:
        chunk.enable_forward_pre_hook()
    else:
        chunk.disable_forward_pre_hook(param_sync=False)
