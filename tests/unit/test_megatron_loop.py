"""What Megatron-LM's loop counts, ahead of it."""

import sys
from types import SimpleNamespace

import pytest

from mnemosyne_plugin.adapters.megatron.loop import Loop


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """megatron.training.training of a run of 8 samples a step, at its third."""
    rerun = SimpleNamespace(
        state=0,
        current_iteration=2,
        first_iteration_complete=True,
        rerun_requested=False,
        checkpoint_requested=False,
        restart_again_requested=False,
        continue_requested=False,
        large_value_counts={},
        max_values={},
    )
    fakes = {
        "num_microbatches_calculator": SimpleNamespace(
            get_current_global_batch_size=lambda: 8,
            get_current_running_global_batch_size=lambda: 8,
            update_num_microbatches=lambda consumed, **kwargs: None,
        ),
        "rerun_state_machine": SimpleNamespace(get_rerun_state_machine=lambda: rerun),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, f"megatron.core.{name}", fake)
    return megatron_at(iteration=2)


def megatron_at(iteration: int) -> SimpleNamespace:
    args = SimpleNamespace(
        iteration=iteration,
        consumed_train_samples=8 * iteration,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        train_iters=10,
        do_valid=False,
        num_floating_point_operations_so_far=1000 * iteration,
    )
    return SimpleNamespace(
        get_args=lambda: args,
        get_timers=lambda: SimpleNamespace(_timers={}),
        num_floating_point_operations=lambda args, batch_size: 125 * batch_size,
    )


def test_a_newcomer_counts_on_from_where_the_job_is(megatron: SimpleNamespace) -> None:
    survivor = Loop(megatron, [])
    survivor.advance(has_mutated=True)

    unknowing = megatron_at(iteration=0)
    newcomer = Loop(unknowing, [])
    newcomer.load(survivor.values())
    newcomer.enter()

    args = unknowing.get_args()
    assert (args.iteration, args.consumed_train_samples) == (3, 24)
    assert args.num_floating_point_operations_so_far == 3000
    newcomer.advance(has_mutated=True)
    assert newcomer.operations == 4000
